"""The frames of a crash: read only from files that cannot make the helper wait, and never at the dump's cost."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.support import cores
from tests.support.collector import wait_until

from core_dump_format.state import X86_64
from core_dump_format.walk import Mapping
from core_dump_helper import backtrace
from core_dump_helper.backtrace import CoreMemory, CrashedProcess, find_frames, mount_types, read_core
from core_dump_helper.crash import OpenedFiles, open_files, parse_arguments

EXE, STACK = 0x40_0000, 0x7FFF_0000_0000
PROGRAM = os.path.realpath("/proc/self/exe")


def core(*, pc=EXE + 0x1234, stack=bytes(64), head=b""):
    """Return a small core of a process that has mapped one program."""
    shape = cores.Shape(machine=X86_64)
    notes = shape.status(7, 11, [(16, pc), (19, STACK), (4, 0)])
    notes += shape.note(cores.AUXV, shape.words(9, EXE + 0x1000, 0, 0))
    notes += shape.files((EXE, EXE + 0x4000, 0, b"/usr/bin/app"))
    return cores.build(shape, notes, [(EXE, head.ljust(4096, b"\0"), True), (STACK, stack, False)])


def opened(tmp_path, kind, *, is_ours=True, path=PROGRAM):
    """Return files whose mount is of some type."""
    found = OpenedFiles()
    descriptor = os.open(path, os.O_PATH)
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        (number,) = [line.split()[1] for line in info if line.startswith("mnt_id")]
    (tmp_path / "mountinfo").write_text(f"{number} 1 8:1 / / rw shared:1 - {kind} /dev/sda rw\n")
    found.files, found.is_ours = {EXE: descriptor}, is_ours
    found.mounts = os.open(tmp_path / "mountinfo", os.O_RDONLY)
    return found


def is_read(files, content):
    process = CrashedProcess(*read_core(content)[:2], CoreMemory(read_core(content)[2]), files)
    try:
        return process.object_of(Mapping(EXE, EXE + 0x4000, 0, "app")) is not None
    finally:
        process.close()
        files.close()


@pytest.fixture
def content():
    with open(PROGRAM, "rb") as file:
        return core(head=file.read(4096))


@pytest.mark.parametrize(
    ("kind", "is_ours", "expected"),
    [
        ("ext4", True, True),
        ("ext4", False, True),
        ("overlay", True, True),
        ("overlay", False, False),
        ("fuse", True, False),
        ("fuse.sshfs", True, False),
        ("nfs4", True, False),
        ("9p", True, False),
    ],
)
def test_files_are_read_only_where_nobody_but_the_kernel_answers(tmp_path, content, kind, is_ours, expected):
    assert is_read(opened(tmp_path, kind, is_ours=is_ours), content) is expected


def test_file_on_an_unknown_mount_is_not_read(tmp_path, content):
    files = opened(tmp_path, "ext4")
    (tmp_path / "mountinfo").write_text("1 1 8:1 / / rw - ext4 /dev/sda rw\nbroken\n\n")
    assert not is_read(files, content)


def test_path_of_a_mount_cannot_name_another_mount(tmp_path, content):
    files = opened(tmp_path, "fuse")
    with (tmp_path / "mountinfo").open("a", newline="") as file:
        number = (tmp_path / "mountinfo").read_text().split()[0]
        file.write(f"1 1 0:50 / /tmp/a\r{number} rw - tmpfs none rw\n")
    assert not is_read(files, content)


def test_file_that_is_not_the_one_in_memory_is_not_read(tmp_path):
    assert not is_read(opened(tmp_path, "ext4"), core(head=b"\x7fELF" + bytes(60)))


def test_pipe_behind_a_mapping_is_not_read(tmp_path, content):
    os.mkfifo(tmp_path / "fifo")
    assert not is_read(opened(tmp_path, "ext4", path=tmp_path / "fifo"), content)


def test_mountinfo_is_read_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(backtrace, "MAX_MOUNTINFO_BYTES", 1 << 16)
    (tmp_path / "m").write_bytes(b"5 1 8:1 / / rw - ext4 a rw\n" * 100_000)
    descriptor = os.open(tmp_path / "m", os.O_RDONLY)
    assert mount_types(descriptor) == {b"5": b"ext4"}
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 1 << 16
    os.close(descriptor)


CRASH = parse_arguments([f"-P{os.getpid()}", "-s11", "--", "app"])


def test_frames_of_a_small_core_are_found_without_any_file():
    found = find_frames(CRASH, core(), OpenedFiles())
    assert found["frames"] == b"app+0x1234"
    assert found["machine"] == b"x86-64"


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", core()[:200], bytes(4096), core(pc=2**64 - 1), core(stack=b"")]
)
def test_hostile_core_costs_the_frames_only(content):
    assert isinstance(find_frames(CRASH, content, OpenedFiles()), dict)


def test_frames_that_take_too_long_are_given_up(monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(backtrace, "SECONDS", 0.01)
    monkeypatch.setattr(backtrace, "frames_of", lambda *_: release.wait(30))
    try:
        assert find_frames(CRASH, core(), OpenedFiles()) == {}
    finally:
        release.set()


def test_files_of_a_live_process_are_opened_and_other_memory_is_left_out():
    with open("/proc/self/maps") as maps:
        code = [line.split() for line in maps if "x" in line.split()[1]]
    spans = [tuple(int(end, 16) for end in words[0].split("-")) for words in code]
    files = open_files(CRASH, [*spans, (0x1000, 0x2000)])
    try:
        assert set(files.files) == {
            start
            for (start, _), words in zip(spans, code, strict=True)
            if len(words) > 5 and words[5][0] == "/"
        }
        assert files.is_ours
        assert files.mounts > 0
    finally:
        files.close()


MAIN_THREAD_ENDS = """
import ctypes, sys, threading
def wait():
    print(threading.get_native_id(), flush=True)
    sys.stdin.read()
threading.Thread(target=wait).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_files_are_opened_of_a_process_whose_main_thread_has_ended():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", MAIN_THREAD_ENDS], **pipes) as other:
        thread, maps = int(other.stdout.readline()), Path(f"/proc/{other.pid}/maps")
        wait_until(lambda: not maps.read_bytes(), 20)
        crash = parse_arguments([f"-P{other.pid}", f"-i{thread}", "-s11", "--", "app"])
        crash.process = os.open(f"/proc/{other.pid}", os.O_PATH)
        lines = [line.split() for line in Path(f"/proc/{thread}/maps").read_text().splitlines()]
        spans = [tuple(int(end, 16) for end in words[0].split("-")) for words in lines if "x" in words[1]]
        files = open_files(crash, spans)
        assert files.files
        assert files.mounts > 0
        files.close()
        os.close(crash.process)
        other.kill()

"""What happens around the vital part when memory does not answer, packages are missing or the pipe is cut."""

import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.format.test_vital import SPANS, Held, auxv, kernel_core, note, status
from tests.support import kernel

from core_dump_format.front import read_front
from core_dump_format.pages import Pages
from core_dump_helper import mappings, vitalpart
from core_dump_helper.core import LARGE_BYTES, Memory, Reader, Source
from core_dump_helper.crash import parse_arguments
from core_dump_helper.keep import Keep
from core_dump_helper.memory import open_memory
from core_dump_helper.settings import Settings

CRASH = parse_arguments([f"-P{os.getpid()}", "--", "app"])
PAGE = 4096


def spans_of(size):
    return [(0x10000, size, size, 6)]


def prepared(core, pages, monkeypatch, limit=32 << 20):
    """Prepare the vital part of a core whose process has these pages."""
    monkeypatch.setattr(vitalpart, "open_memory", lambda crash, vector: pages)
    return vitalpart.prepare(bytearray(core), lambda count: False, CRASH, limit, keep(1 << 30))


def keep(memory, **given):
    """Return the decision on how much is kept, with so much memory to use."""
    settings = Settings()
    vars(settings).update(given)
    decides = Keep(settings)
    decides.memory_bytes = memory
    return decides


class Killed(Held):
    """Memory of a process that is killed after the first reads."""

    def read(self, address, size):
        return super().read(address, size) if self.reads < 4 else b""


def test_trimmed_dump_of_a_process_that_was_killed_meanwhile_says_so(monkeypatch):
    core = kernel_core(spans_of(LARGE_BYTES * 2), status(0x10100))
    monkeypatch.setattr(vitalpart, "open_memory", lambda crash, vector: Killed(spans_of(LARGE_BYTES * 2)))
    decides = keep(1 << 30, TRIM_ABOVE_BYTES=1, TRIM_BUDGET_BYTES=1 << 20)
    vital = vitalpart.prepare(bytearray(core), lambda count: False, CRASH, 1 << 20, decides)
    assert (vital.trimmed, vital.was_killed, vital.state) == ("trim_above_bytes", True, "partial")


@pytest.mark.parametrize(
    ("given", "joins"), [({"TRIM_ABOVE_BYTES": 1}, True), ({"TRIM_ABOVE_BYTES": 0}, False)]
)
def test_helper_that_trims_needs_memory_and_moves_into_the_prepared_cgroup(
    tmp_path, monkeypatch, given, joins
):
    cgroup = tmp_path / "cgroup.procs"
    cgroup.touch()
    monkeypatch.setattr(vitalpart, "start_new_thread", lambda run, arguments: run(*arguments))
    monkeypatch.setattr(vitalpart, "open_memory", lambda crash, vector: Held(spans_of(LARGE_BYTES * 2)))
    core = kernel_core(spans_of(LARGE_BYTES * 2), status(0x10100))
    decides = keep(1 << 30, CGROUP=str(tmp_path), TRIM_BUDGET_BYTES=1 << 20, **given)
    vital = vitalpart.prepare(bytearray(core), lambda count: False, CRASH, 1 << 20, decides)
    assert bool(vital.trimmed) == joins
    assert cgroup.read_text() == ("0" if joins else "")


class Blocking(Held):
    """Memory of which the second read waits for a file server that never answers."""

    def __init__(self, spans):
        super().__init__(spans)
        self.released = threading.Event()

    def read(self, address, size):
        if self.reads:
            self.released.wait()
        return super().read(address, size)


def test_memory_that_blocks_holds_the_process_until_the_deadline_only(monkeypatch, capfd):
    monkeypatch.setattr(vitalpart, "PREPARE_SECONDS", 0.2)
    pages = Blocking(SPANS)
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010) + status(SPANS[1][0] + 0x100))
    started = time.monotonic()
    try:
        vital = prepared(core, pages, monkeypatch)
    finally:
        pages.released.set()
    assert time.monotonic() - started < 5
    assert vital.state == "partial"
    assert "took longer" in capfd.readouterr().err


class Failing(Pages):
    def read(self, address, size):
        raise MemoryError

    def resident(self, start, end):
        yield start, end


@pytest.mark.parametrize("pages", [Failing(), Held([])])
def test_memory_that_cannot_be_read_leaves_the_kernels_order(monkeypatch, capfd, pages):
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    assert prepared(core, pages, monkeypatch) is None
    assert "does not come first" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError(3, "no such process"), ValueError("another process"), KeyError("Uid")]
)
def test_memory_that_cannot_be_opened_leaves_the_kernels_order(monkeypatch, capfd, error):
    def refuse(crash, vector):
        raise error

    monkeypatch.setattr(vitalpart, "open_memory", refuse)
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    assert vitalpart.prepare(bytearray(core), lambda count: False, CRASH, 32 << 20, 1 << 30) is None
    assert "does not come first" in capfd.readouterr().err


def test_vital_part_longer_than_the_limit_of_the_dump_is_cut_and_partial(monkeypatch):
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    vital = prepared(core, Held(SPANS), monkeypatch)
    assert vital.cut(10_000) == 10_000
    assert vital.state == "partial"
    assert sum(map(len, vital.pieces)) == 10_000


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=20),
    st.integers(0, 4000),
    st.integers(1, 700),
)
def test_source_passes_on_what_is_kept_and_nothing_else(runs, known, step):
    data = os.urandom(20_000)
    source, sink = os.pipe()
    os.write(sink, data[known:])
    os.close(sink)
    reader = Source(source)
    rows = [[length, int(kept)] for length, kept in runs] + [[1 << 62, 1]]
    expected, at = b"", 0
    for length, kept in rows:
        expected += data[at : at + length] if kept else b""
        at += length
    reader.put_back(bytearray(data[:known]), rows)
    found, buffer = b"", memoryview(bytearray(step))
    while size := reader.read(buffer):
        found += bytes(buffer[:size])
    os.close(source)
    assert found == expected


@pytest.mark.parametrize("failure", [None, "end"])
def test_core_that_is_not_reordered_passes_byte_for_byte(failure):
    spans = spans_of(LARGE_BYTES)
    core = kernel_core(spans, status(0x10100) + note(99, bytes(3 << 20)))
    if failure:
        core = core[: 2 << 20]  # the process was killed while its notes were written
    source, sink = os.pipe()
    threading.Thread(target=lambda: (os.write(sink, core), os.close(sink))).start()

    def prepare(head, read):
        assert read(4 << 20) == (not failure)

    reader = Reader(source, Settings(), Memory(Settings()), time.monotonic() + 30, prepare)
    assert reader.start() is None
    assert b"".join(bytes(piece) for piece in reader.chunks()) == core
    assert reader.is_large


def test_memory_of_another_process_is_refused():
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        crash = parse_arguments([f"-P{other.pid}", "--", "app"])
        with open(f"/proc/{other.pid}/auxv", "rb") as file:
            vector = file.read()
        open_memory(crash, vector).close()
        with pytest.raises(ValueError, match="another process"):
            open_memory(crash, vector[:40] + b"\xff" * 8 + vector[48:])
        with pytest.raises(ValueError, match="another process"):
            open_memory(crash, b"")
        mismatch = parse_arguments([f"-P{other.pid}", "-u4242", "--", "app"])
        with pytest.raises(ValueError, match="another process"):
            open_memory(mismatch, vector)
        other.communicate(b"\n")


def test_memory_is_read_up_to_the_first_page_that_cannot_be():
    with open("/proc/self/auxv", "rb") as file:
        memory = open_memory(parse_arguments([f"-P{os.getpid()}", "--", "app"]), file.read())
    data = bytearray(os.urandom(8 * PAGE))
    import ctypes

    address = ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))
    start = -(-address // PAGE) * PAGE
    assert memory.read(start, 4 * PAGE) == bytes(data[start - address :][: 4 * PAGE])
    assert list(memory.resident(start, start + 4 * PAGE)) == [(start, start + 4 * PAGE)]
    for impossible in (0, 2**63, 2**64 - PAGE):
        assert memory.read(impossible, PAGE) == b""
    assert list(memory.resident(2**63, 2**63 + PAGE)) == []


@pytest.mark.parametrize("is_local", [True, False])
def test_absent_page_is_only_read_from_a_local_file_system_and_only_alone(tmp_path, monkeypatch, is_local):
    import ctypes

    if not is_local:
        monkeypatch.setattr(mappings, "local_devices", lambda *_: set())

    (tmp_path / "file").write_bytes(b"f" * 3 * PAGE)
    with open(tmp_path / "file", "r+b") as file, open("/proc/self/auxv", "rb") as vector:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        memory = open_memory(parse_arguments([f"-P{os.getpid()}", "--", "app"]), vector.read())
    mapped[0] = mapped[2 * PAGE] = ord("t")
    view = ctypes.c_char.from_buffer(mapped)
    start = ctypes.addressof(view)
    mapped.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
    runs = [(start, start + PAGE), (start + 2 * PAGE, start + 3 * PAGE)]
    assert list(memory.resident(start, start + 3 * PAGE)) == runs
    assert list(memory.obtainable(start, start + 3 * PAGE)) == (
        [(start, start + 3 * PAGE)] if is_local else runs
    )
    assert memory.read(start + 2 * PAGE, PAGE)[:2] == b"tf"
    monkeypatch.setattr("core_dump_helper.memory.MOST_OBTAINED_BYTES", 2 * PAGE)
    assert len(memory.read(start + 8, 3 * PAGE - 8)) == PAGE - 8
    assert list(memory.resident(start, start + 3 * PAGE)) == runs, "nothing was read of the file"
    assert memory.read(start + PAGE + 8, 8) == (b"f" * 8 if is_local else b"")
    assert memory.read(start + PAGE - 8, 16) == b"f" * (16 if is_local else 8)


class Fetching(Held):
    """Memory of which the first segment is absent; notes what is read there all the same."""

    def __init__(self, spans):
        super().__init__(spans)
        self.fetched = []

    def read(self, address, size):
        if 0 <= address - SPANS[0][0] < SPANS[0][1]:
            self.fetched.append(address)
        return super().read(address, size)

    def resident(self, start, end):
        if start >= SPANS[0][0] + SPANS[0][1]:
            yield start, end


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        ([1, PAGE, SPANS[1][0], SPANS[1][0] + PAGE, 0], True),
        ([1, PAGE, SPANS[0][0], SPANS[0][0] + PAGE, 0], False),
        ([2, PAGE, SPANS[1][0], SPANS[1][0] + PAGE, 0], False),
        ([], False),
    ],
)
def test_forged_address_of_the_vdso_brings_no_page_in_from_a_file(monkeypatch, files, fetched):
    listed = note(0x46494C45, struct.pack(f"<{len(files)}Q", *files) + b"/f\0") if files else b""
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010) + auxv(vdso=SPANS[0][0]) + listed)
    pages = Fetching(SPANS)
    assert prepared(core, pages, monkeypatch)
    assert bool(pages.fetched) == fetched


@pytest.fixture
def large(station):
    """Return a function that crashes with 9 MiB of random memory, its `core`; its arguments are settings."""
    import ctypes

    memory = mmap.mmap(-1, 9 << 20)
    memory[:] = os.urandom(len(memory))
    view = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(view)
    vector = note(6, Path("/proc/self/auxv").read_bytes())
    core = kernel_core([(start, len(memory), len(memory), 6)], status(start + 2 * PAGE) + vector)

    def crash(**given):
        station.settings = {"MAX_TOTAL_BYTES": 0, **given}
        logged = station.run(core)
        return logged, memory[2 * PAGE :]

    crash.core = core
    yield crash
    del view


@pytest.fixture
def tiny_disk(station):
    """Put the watch directory on a file system of 700 KiB."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k,mode=700", "none", station.watch_dir], check=True
    )
    yield station
    subprocess.run(["umount", "-l", station.watch_dir], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, needs root: sudo make test")
@pytest.mark.parametrize("compressor", ["gzip", "none"])
def test_full_disk_within_the_vital_part_keeps_the_newest_frames(tiny_disk, large, compressor):
    _, stack = large(COMPRESSOR=compressor)
    core = tiny_disk.dump().read_bytes() if compressor == "none" else tiny_disk.core()
    assert stack[: 300 << 10] in core
    found = tiny_disk.attributes()
    assert (found["vital"], found["truncated"], found["bytes"]) == ("partial", "disk_full", str(len(core)))
    assert "vital_crc32" not in found


def test_dump_limited_to_less_than_a_mebibyte_is_trimmed_to_the_newest_frames(station, large):
    _, stack = large(MAX_DUMP_BYTES=600_000)
    found, core = station.attributes(), station.core()
    assert 550_000 < len(core) <= 600_000
    assert stack[: 100 << 10] in core
    assert found["truncated"] == found["trimmed"] == "max_dump_bytes"
    assert found["bytes"] == found["expected_bytes"] == str(len(core))


@pytest.mark.parametrize(
    "how", ["raise ImportError('no zlib')", "raise OSError(5, 'failed')", "raise EOFError"]
)
def test_vital_part_that_cannot_be_read_again_costs_its_attributes_only(station, large, how, monkeypatch):
    install = kernel.install_helper

    def spoil(directory, *arguments):
        install(directory, *arguments)
        kernel.replace(directory / "core_dump_helper/vitalpart.py", "    crc = at = 0\n", f"    {how}\n")

    monkeypatch.setattr(kernel, "install_helper", spoil)
    logged, _ = large()
    found = station.attributes()
    assert found["vital"] == "whole"
    assert not {"vital_bytes", "vital_crc32", "truncated"} & set(found), logged
    assert found["bytes"] == found["expected_bytes"] == str(len(station.core()))


def test_compressor_that_does_not_start_again_ends_the_dump_with_its_vital_part(station, large, monkeypatch):
    install = kernel.install_helper

    def spoil(directory, *arguments):
        install(directory, *arguments)
        module = directory / "core_dump_helper/compress.py"
        kernel.replace(
            module,
            '    reason = "directory"\n',
            '    reason = "directory"\n    names = names * (not before)\n',
        )

    monkeypatch.setattr(kernel, "install_helper", spoil)
    large()
    found = station.attributes()
    assert (found["vital"], found["truncated"]) == ("whole", "disk_full")
    assert found["bytes"] == str(len(station.core()))


def test_notes_of_any_size_take_little_memory(station):
    core = kernel_core(spans_of(LARGE_BYTES), (status(0x10100) + note(2, bytes(3300))) * 15_000)
    assert len(core) > 60 << 20
    station.settings = {"BUFFER_BYTES": 0}
    with station.start() as process:
        process.stdin.write(core)
        process.stdin.flush()  # all but what the pipe holds has been read
        memory = Path(f"/proc/{process.pid}/status").read_text()
        logged = process.communicate()[1].decode()
    assert "bytes of headers and notes" in logged
    assert station.attributes()["vital"] == "none"
    assert station.core() == core
    assert int(memory.partition("VmHWM:")[2].split()[0]) < 40 << 10


@pytest.mark.parametrize(("share", "allowed"), [(18 << 20, True), (6 << 20, False)])
def test_headers_and_notes_take_no_more_memory_than_is_available(monkeypatch, share, allowed):
    monkeypatch.setattr(vitalpart, "open_memory", lambda crash, vector: Held(SPANS))
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010) + note(99, bytes(2 << 20)))
    head = bytearray(core[: vitalpart.CHUNK])

    def read(count):
        head.extend(core[len(head) : len(head) + count])
        return True

    assert bool(vitalpart.prepare(head, read, CRASH, 4 << 20, keep(share))) == allowed


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600), st.integers(0, 2**64 - 1))
def test_prepare_never_raises_whatever_the_notes_say(content, address):
    core = kernel_core(
        SPANS, status(SPANS[0][0] + 0x100) + auxv(phdr=address, phnum=9, vdso=address) + content
    )
    pages = Held(SPANS, words={address // 8 * 8: address})
    with pytest.MonkeyPatch.context() as monkeypatch:
        vital = prepared(core, pages, monkeypatch)
    assert vital is not None
    assert vital.end + sum(length for length, kept in vital.runs[:-1] if kept) == vital.length
    assert read_front(core).length == len(core)

"""Real crashes, from the signal to the published file."""

import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernel.conftest import attributes, backtrace, core_of
from tests.support import kernel
from tests.support.collector import wait_until

SIGNALS = ("SEGV", "ABRT", "QUIT", "BUS", "TRAP", "ILL", "FPE", "SYS", "XCPU", "XFSZ")
NAMES = {
    b"": b"_", b".": b"_", b"..": b"_.", b"a b": b"a_b", b"a  b ": b"a__b_", b"a/b": b"a_b", b"a\nb": b"a_b",
    b"-rf": b"_rf", b"$(touch zq)": b"__touch_zq_", b";id": b"_id", b"`id`": b"_id_", b"%s%n": b"_s_n", b"*": b"_",
    b"'\"": b"__", b"\xff\xfe": b"__", b"exactly15bytes!": b"exactly15bytes_", b"a-1-2-3": b"a-1-2-3",
}  # fmt: skip
"""What the process is called, and what stands in the file name."""


@pytest.mark.parametrize("python", kernel.pythons(), ids=lambda path: path.split("/")[-3])
def test_crash_becomes_one_whole_dump_with_every_python(node, python):
    with node.installed(python, COMPRESSOR="gzip"):
        pid = node.crash(megabytes=4)
    found = attributes(node.dump())
    core = core_of(node.dump())
    assert found["bytes"] == found["expected_bytes"] == str(len(core)).encode()
    assert "truncated" not in found
    assert found["pid"] == str(pid).encode()
    assert found["comm"] == b"crash"
    assert found["exe"] == os.fsencode(node.program)
    assert found["dumpable"] == b"1"
    assert "sensitive" not in found
    assert node.dump().name.endswith(f"-{pid}-11.gz")
    assert node.dump().stat().st_mode & 0o777 == 0o600
    assert node.dump().stat().st_nlink == 1


def test_every_signal_that_dumps_is_taken_once(node):
    with node.installed():
        for name in SIGNALS:
            number = int(signal.Signals[f"SIG{name}"])
            node.crash(number, name=name.encode())
            assert attributes(node.dump())["signal"] == str(number).encode()
            assert "truncated" not in attributes(node.dump())
            node.dump().unlink()


def test_hostile_names_neither_run_nor_escape_nor_lose_the_dump(node):
    before = set(os.listdir("/"))
    with node.installed(COMPRESSOR="gzip"):
        for name, safe in NAMES.items():
            pid = node.crash(name=name)
            assert node.dump().name.startswith(f"core-{safe.decode()}-")
            assert node.dump().name.endswith(f"-{pid}-11.gz")
            told = {b"": b"!", b".": b"!", b"..": b"!.", b"a/b": b"a!b"}.get(name, name)  # the kernel's own
            assert attributes(node.dump())["thread"] == told
            assert core_of(node.dump()).startswith(b"\x7fELF")
            node.dump().unlink()
    assert set(os.listdir("/")) == before


def test_core_is_byte_for_byte_what_the_kernel_wrote_and_gdb_reads_it(node):
    with node.installed(VITAL_BYTES=0):
        node.keep_copy()
        pid = node.crash_only(megabytes=20, threads=3, name=b"the culprit")
        wait_until(lambda: node.names() and node.names()[0].endswith(".gz"))
        node.settle()
    core = core_of(node.dump())
    assert core == (node.directory / "copy").read_bytes()
    (node.directory / "core").write_bytes(core)
    trace = backtrace(node.program, node.directory / "core")
    assert "die_here" in trace
    assert trace.count("wait_for_ever") >= 3
    found = attributes(node.dump())
    assert found["pid"] == str(pid).encode()
    assert found["tid"] != found["pid"]
    assert found["threads"] == b"4"
    assert found["thread"] == b"the culprit"
    assert found["comm"] == b"crash"


@pytest.mark.parametrize("compressor", ["auto", "pigz", "isal", "gzip", "none"])
def test_each_compressor_writes_the_same_core(node, compressor):
    pytest.importorskip("isal")
    path = Path(sys.modules["isal"].__file__).parents[1]
    with node.installed(COMPRESSOR=compressor, PYTHON_PATH=path):
        node.crash(megabytes=30)
    found, content = attributes(node.dump()), node.dump().read_bytes()
    core = content if compressor == "none" else gzip.decompress(content)
    assert found["compressor"].decode() == {"auto": "pigz"}.get(compressor, compressor)
    assert len(core) == int(found["expected_bytes"]) > 30 << 20


def test_container_is_seen_from_outside(node):
    script = 'printf "a b" >/proc/sys/kernel/hostname; "$@"; :'
    inside = ("unshare", "--pid", "--mount", "--uts", "--fork", "sh", "-c", script, "sh")
    with node.installed():
        pid = node.crash(before=inside)
    found = attributes(node.dump())
    assert found["ns_pid"].decode() == node.dump().name.split("-")[-2] == str(pid)
    assert int(found["pid"]) > pid
    assert found["hostname"] == b"a b"
    assert found["exe"] == os.fsencode(node.program)


def test_namespace_of_the_attacker_gives_the_helper_neither_programs_nor_places(node):
    evil, ran = node.directory / "evil", node.directory / "ran"
    evil.mkdir()
    program = evil / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    (evil / "w").mkdir(mode=0o700)
    places = ["/usr/bin/pigz", str(Path(sys.executable).resolve()), str(node.directory / "core-dump-helper")]
    binds = [f"mount --bind {program} {place}" for place in places]
    binds.append(f"mount --bind {evil / 'w'} {node.watch_dir}")
    inside = (*("unshare", "--mount", "sh", "-c"), " && ".join([*binds, 'exec "$@"']), "sh")
    with node.installed(COMPRESSOR="pigz"):
        node.crash(before=inside)
    assert core_of(node.dump()).startswith(b"\x7fELF")
    assert attributes(node.dump())["compressor"] == b"pigz"
    assert not ran.exists()
    assert list((evil / "w").iterdir()) == []


def test_user_namespace_does_not_change_who_crashed(node):
    os.chmod(node.directory, 0o755)
    user = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "unshare",
        "--user",
        "--map-root-user",
    )
    with node.installed():
        node.crash(before=user)
    found = attributes(node.dump())
    assert [found["uid"], found["gid"], found["comm"]] == [b"65534", b"65534", b"crash"]


def test_dump_of_a_setuid_program_is_flagged_sensitive(node):
    os.chmod(node.directory, 0o755)
    node.program.chmod(0o4755)
    setting = Path("/proc/sys/fs/suid_dumpable")
    with node.installed():
        old = setting.read_text()
        try:
            setting.write_text("2")
            node.crash(before=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
        finally:
            setting.write_text(old)
    found = attributes(node.dump())
    assert [found["uid"], found["dumpable"], found["sensitive"]] == [b"65534", b"2", b"dumpable=2"]
    assert node.dump().stat().st_uid == 0


def test_dump_cut_short_by_sigkill_is_flagged_killed(node):
    with node.installed(COMPRESSOR="gzip", LEVEL=9, BUFFER_BYTES=0):
        command = [node.program, "11", b"cut".hex(), "200", "random", "0"]
        process = node.start(*command, name=b"cut", stdout=subprocess.PIPE)
        wait_until(lambda: any((node.watch_dir / n).stat().st_size > 1 << 16 for n in node.names()))
        process.kill()
        process.communicate()
        node.settle()
    found = attributes(node.dump())
    core = core_of(node.dump())
    assert found["truncated"] == b"killed"
    assert len(core) == int(found["bytes"]) < int(found["expected_bytes"])


def test_rlimit_core_zero_is_dumped_unless_it_is_respected(node):
    none = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))}
    with node.installed():
        node.crash(**none)
        assert attributes(node.dump())["rlimit"] == b"0"
        node.dump().unlink()
    with node.installed(RESPECT_RLIMIT="yes"):
        node.crash(**none)
        assert node.names() == []


def test_fifty_crashes_at_once_are_fifty_dumps(node):
    with node.installed(COMPRESSOR="gzip"):
        command = [node.program, "6", b"storm".hex(), "1", "mixed", "0"]
        crashing = [node.start(*command, name=b"storm", stdout=subprocess.DEVNULL) for _ in range(50)]
        assert {process.wait(timeout=60) for process in crashing} == {-6}
        node.settle()
    assert len(node.names()) == 50
    for name in node.names():
        assert len(core_of(node.watch_dir / name)) == int(attributes(node.watch_dir / name)["expected_bytes"])


def test_crash_loop_leaves_room_for_others(node):
    with node.installed(RATE_LIMIT="2/600"):
        for _ in range(4):
            node.crash(name=b"loop")
        other = node.directory / "other"
        other.write_bytes(node.program.read_bytes())
        other.chmod(0o755)
        node.crash(program=other, name=b"quiet")
    assert [name.split("-")[1] for name in node.names()] == ["loop", "loop", "quiet"]


def test_crash_of_a_stranger_is_not_taken_for_ours(node):
    with node.installed(COMPRESSOR="gzip"):
        pid = node.crash()
        for name in (b"crash", b"stranger"):
            kernel.crash(node.program, 11, name=name)
        node.settle()
    assert len(list(node.watch_dir.glob("core*"))) == 3
    assert attributes(node.dump())["pid"] == str(pid).encode()


def test_own_configuration_is_named_by_an_option(node):
    with node.installed(transport="pipe"), Path("/var/tmp/cdh.conf").open("x"):
        try:
            settings = {"WATCH_DIR": node.watch_dir, "COMPRESSOR": "none", "KEEP_FREE_PERCENT": 1}
            kernel.write_config(Path("/var/tmp/cdh.conf"), settings)
            program = kernel.PATTERN.read_text().split()[0]
            pattern = f"{program} -C/var/tmp/cdh.conf {kernel.ARGUMENTS}"
            assert len(pattern) <= kernel.PATTERN_LIMIT
            kernel.PATTERN.write_text(pattern + "\n")
            node.crash()
        finally:
            os.unlink("/var/tmp/cdh.conf")
    assert not node.dump().name.endswith(".gz")

import ast
import contextlib
import fcntl
import gzip
import importlib.metadata
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.support import kernel, memorycgroup
from tests.support.collector import wait_until
from tests.support.cores import simple as elf

MIB = 1 << 20
NOISE = random.Random(1).randbytes(8 * MIB)
ISAL = Path(pytest.importorskip("isal").__file__).parents[1]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts or changes owners, needs root: sudo make test"
)


@pytest.fixture
def small_disk(station):
    """Put the watch directory on a file system of 4 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "none", station.watch_dir], check=True)
    yield station
    subprocess.run(["umount", "-l", station.watch_dir], check=True)


COMPRESS = (
    "import zlib\nz = zlib.compressobj(1, 8, 31)\n"
    "while data := os.read(0, 1 << 20): os.write(1, z.compress(data))\nos.write(1, z.flush())"
)
"""What pigz does."""


def script(path, text):
    """Write an executable that stands in for pigz."""
    path.write_text(f"#!{sys.executable} -IS\nimport os, sys, time\n{text}\n")
    path.chmod(0o755)
    return (str(path),)


def test_whole_core_is_published_with_its_attributes(station):
    core = elf(NOISE)
    station.run(core, name="my app")
    assert station.names() == ["core-my_app-1700000000-7-11.gz"]
    assert station.core() == core
    found = station.attributes()
    assert found.pop("duration_ms").isdigit()
    assert found["bytes"] == found["expected_bytes"] == str(len(core))
    assert found["pid"] == str(os.getpid())
    assert found["comm"] == Path("/proc/self/comm").read_text().rstrip("\n")
    assert found["exe"] == str(Path("/proc/self/exe").readlink())
    assert found["thread"] == "my app"
    assert found["signal"] == "11"
    assert found["helper_version"] == importlib.metadata.version("core-dump-handler")
    assert "truncated" not in found
    assert "sensitive" not in found
    assert station.dump().stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("python", kernel.pythons(), ids=lambda path: path.split("/")[-3])
@pytest.mark.parametrize("compressor", ["pigz", "isal", "gzip", "none"])
def test_every_python_and_compressor_keeps_every_byte(station, python, compressor):
    core = elf(NOISE[:MIB] + bytes(3 * MIB) + NOISE[: MIB + 5])
    station.python = python
    station.settings = {"COMPRESSOR": compressor, "PYTHON_PATH": ISAL}
    logged = station.run(core)
    content = station.dump().read_bytes()
    assert (content if compressor == "none" else gzip.decompress(content)) == core
    used = station.attributes()["compressor"]
    assert used == compressor or (compressor == "isal" and "isal does not work" in logged)
    if compressor == "none":
        assert station.dump().stat().st_blocks * 512 < 4 * MIB
        assert station.names() == ["core-app-1700000000-7-11"]


def test_log_names_the_process_its_user_its_signal_and_its_dump(station):
    first, last = station.run(elf(b"core"), name="my\napp").splitlines()
    me = rf"core-dump-helper\[\d+\]: Process {os.getpid()} \(my\\napp\)"
    assert re.fullmatch(rf"{me} of user {os.getuid()} terminated by signal 11 \(SIGSEGV\); dumping", first)
    result = rf"core-my_app-1700000000-7-11\.gz is complete: {len(elf(b'core'))} bytes by gzip in \d+ ms"
    assert re.fullmatch(rf"{me}: {result}", last)
    _, last = station.run(b"x" * 10).splitlines()
    assert "core-app-1700000000-7-11.gz is truncated (killed): 10 bytes by gzip" in last


def test_name_that_is_taken_is_never_replaced(station):
    for number in range(3):
        station.run(elf(bytes([number])))
    assert station.names() == [f"core-app-1700000000-7-11{copy}.gz" for copy in ("-1", "-2", "")]
    contents = {gzip.decompress((station.watch_dir / name).read_bytes())[-1] for name in station.names()}
    assert contents == {0, 1, 2}


@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hardlink", "fifo", "directory", "file"])
def test_what_was_planted_is_neither_followed_nor_touched(station, tmp_path, kind, suffix):
    planted = station.watch_dir / f"core-app-1700000000-7-11.gz{suffix}"
    target = tmp_path / "target"
    target.write_text("precious")
    plant = {
        "symlink": lambda: planted.symlink_to(target),
        "dangling": lambda: planted.symlink_to(tmp_path / "nowhere"),
        "hardlink": lambda: planted.hardlink_to(target),
        "fifo": lambda: os.mkfifo(planted),
        "directory": planted.mkdir,
        "file": lambda: planted.write_text("mine"),
    }
    plant[kind]()
    before = os.lstat(planted)
    station.run(elf(b"core"))
    assert os.lstat(planted)[:7] == before[:7]
    assert target.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert gzip.decompress((station.watch_dir / "core-app-1700000000-7-11-1.gz").read_bytes()) == elf(b"core")


@pytest.mark.parametrize("kind", ["symlink", "file", "open", "fifo"])
def test_planted_state_directory_costs_limits_but_no_dump(station, tmp_path, kind):
    planted = station.watch_dir / ".helper"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    plant = {
        "symlink": lambda: planted.symlink_to(elsewhere),
        "file": lambda: planted.write_text(""),
        "open": lambda: (planted.mkdir(), planted.chmod(0o777)),
        "fifo": lambda: os.mkfifo(planted),
    }
    plant[kind]()
    station.settings = {"RATE_LIMIT": "1/600"}
    logged = station.run(elf(b"core")) + station.run(elf(b"core"))
    assert len(station.names()) == 2
    assert logged.count("RATE_LIMIT and MAX_CONCURRENT are off for this dump") == 2
    assert list(elsewhere.iterdir()) == []


def test_directory_that_others_may_write_to_is_used_and_reported(station):
    station.watch_dir.chmod(0o1777)
    assert "can be changed by others" in station.run(elf(b"core"))
    assert station.core() == elf(b"core")


def test_core_shorter_than_its_headers_promise_is_flagged_killed(station):
    core = elf(NOISE, promised=10 * MIB)
    station.run(core)
    assert station.core() == core
    found = station.attributes()
    assert [found["truncated"], found["expected_bytes"]] == ["killed", str(10 * MIB)]


def test_core_cut_within_its_headers_is_flagged_killed(station):
    station.run(elf(segments=60000)[: 3 * MIB])
    assert station.attributes()["truncated"] == "killed"


@pytest.mark.parametrize("core", [b"x", b"#!/bin/sh\n" * 100])
def test_what_is_no_core_is_kept_and_flagged(station, core):
    station.run(core)
    assert station.core() == core
    assert station.attributes()["truncated"] in ("killed", "not_elf")


def test_nothing_at_all_leaves_nothing(station):
    assert "nothing was written: killed" in station.run(b"")
    assert station.names() == []


def test_dump_is_cut_at_max_dump_bytes_and_stays_valid(station):
    core = elf(NOISE)
    station.settings = {"MAX_DUMP_BYTES": 3 * MIB + 17}
    station.run(core)
    assert station.core() == core[: 3 * MIB + 17]
    assert station.attributes()["truncated"] == "max_dump_bytes"


def test_dump_of_exactly_max_dump_bytes_is_whole(station):
    core = elf(NOISE)
    station.settings = {"MAX_DUMP_BYTES": len(core)}
    station.run(core)
    assert station.core() == core
    assert "truncated" not in station.attributes()


def test_stalled_kernel_is_let_go_at_the_deadline(station):
    station.settings = {"DEADLINE_SECONDS": 1}
    with station.start() as process:
        process.stdin.write(elf(NOISE, promised=MIB * 100))
        process.stdin.flush()
        started = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 5
    assert station.attributes()["truncated"] == "deadline"
    assert station.core() == elf(NOISE, promised=MIB * 100)


@needs_root
@pytest.mark.parametrize("compressor", ["isal", "gzip"])
def test_full_disk_leaves_a_shorter_valid_dump(small_disk, compressor):
    core = elf(NOISE)
    small_disk.settings = {"COMPRESSOR": compressor, "PYTHON_PATH": ISAL}
    small_disk.run(core)
    kept = small_disk.core()
    assert core.startswith(kept)
    assert len(kept) >= 2 * MIB
    found = small_disk.attributes()
    assert found["truncated"] == "disk_full"
    assert found["bytes"] == str(len(kept))


@needs_root
def test_full_disk_under_pigz_leaves_a_flagged_partial_for_the_collector(small_disk):
    small_disk.settings = {"COMPRESSOR": "pigz"}
    core = elf(NOISE)
    small_disk.run(core)
    (name,) = small_disk.names()
    assert name.endswith(".gz.partial")
    assert small_disk.attributes()["truncated"] == "compressor_failed"
    assert core.startswith(zlib.decompressobj(31).decompress(small_disk.dump().read_bytes()))


def test_file_size_limit_leaves_a_shorter_valid_dump(station):
    core = elf(NOISE)
    station.run(core, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB)))
    assert core.startswith(station.core())
    assert station.attributes()["truncated"] == "disk_full"


QUOTA = r"""
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
ssize_t write(int fd, const void *data, size_t size) {
    struct stat status;
    if (!fstat(fd, &status) && S_ISREG(status.st_mode)) {
        off_t left = (2 << 20) - lseek(fd, 0, SEEK_CUR);
        if (left <= 0) { errno = EDQUOT; return -1; }
        size = size > left ? left : size;
    }
    return syscall(SYS_write, fd, data, size);
}
"""
"""A quota of 2 MiB: local file systems spare root, those of a network do not."""


def test_quota_that_is_met_leaves_a_shorter_valid_dump(station, tmp_path):
    (tmp_path / "quota.c").write_text(QUOTA)
    library = kernel.build(tmp_path / "quota.c", tmp_path / "quota.so", "-shared", "-fPIC")
    core = elf(NOISE)
    assert "Disk quota exceeded" in station.run(core, env={"LD_PRELOAD": str(library)})
    assert core.startswith(station.core())
    assert len(station.core()) >= MIB
    assert station.attributes()["truncated"] == "disk_full"


@needs_root
def test_dump_that_would_leave_too_little_room_is_cut_or_refused(small_disk):
    small_disk.settings = {"KEEP_FREE_PERCENT": 50, "MAX_TOTAL_BYTES": 0, "COMPRESSOR": "none"}
    zeros = elf(bytes(40 * MIB) + NOISE[: MIB + 99] + bytes(40 * MIB))
    small_disk.run(zeros)
    assert small_disk.attributes()["truncated"] == "keep_free"
    assert "keep_free" in small_disk.run(zeros)
    assert len(small_disk.names()) == 1
    (record,) = small_disk.records()
    assert [record["reason"], record["kept"], record["suppressed"]] == ["keep_free", "0", "1"]


def test_dump_is_refused_when_too_much_waits(station):
    station.settings = {"MAX_TOTAL_BYTES": 4 * MIB}
    (station.watch_dir / "core-other").write_bytes(NOISE)
    assert "max_total_bytes" in station.run(elf(b"core"))
    assert station.names() == ["core-other"]
    assert [record["reason"] for record in station.records()] == ["max_total_bytes"]


def test_dump_that_makes_too_much_wait_is_cut_while_it_is_written(station):
    station.settings = {"MAX_TOTAL_BYTES": 8 * MIB, "COMPRESSOR": "none", "BUFFER_BYTES": 0}
    core = elf(NOISE * (80 * MIB // len(NOISE)))
    station.run(core)
    kept = station.dump().read_bytes()
    assert core.startswith(kept)
    assert 8 * MIB < len(kept) < 48 * MIB
    assert station.attributes()["truncated"] == "max_total_bytes"


def test_first_dumps_of_a_crash_loop_are_kept_and_the_rest_counted(station):
    station.settings = {"RATE_LIMIT": "2/600", "VITAL_LIMIT": 0}
    for _ in range(5):
        station.run(elf(b"core"), name="looping;\nx=1")
    assert len(station.names()) == 2
    (record,) = station.records()
    assert [record["reason"], record["kept"], record["suppressed"]] == ["rate_limit", "2", "3"]
    assert unquote(record["exe"]) == str(Path("/proc/self/exe").readlink())
    assert record["signal"] == "11"
    assert int(record["last"]) >= int(record["first"]) > 1_700_000_000


def test_rate_limit_counts_signals_apart_and_ends_with_its_window(station):
    station.settings = {"RATE_LIMIT": "1/600", "VITAL_LIMIT": 0}
    me = f"-P{os.getpid()}"
    for number in (6, 11, 6):
        station.run(elf(b"core"), me, "-p1", "-t17", "-d1", f"-s{number}")
    assert len(station.names()) == 2
    for record in (station.watch_dir / ".helper").glob("?" * 24):
        text = record.read_text()
        first = int(text.partition("first=")[2].partition("\n")[0])
        record.write_text(text.replace(f"first={first}", f"first={first - 601}"))
    station.run(elf(b"core"), me, "-p1", "-t17", "-d1", "-s6")
    assert len(station.names()) == 3


def test_records_are_bounded(station):
    station.run(elf(b"core"))
    state = station.watch_dir / ".helper"
    for number in range(1000):
        (state / f"{number:024x}").write_text("")
    station.settings = {"RATE_LIMIT": "1/600"}
    station.run(elf(b"core"))
    assert len(list(state.glob("?" * 24))) == 1001
    (record,) = [path for path in state.glob("?" * 24) if path.stat().st_size]
    assert "exe=%2A\n" in record.read_text()
    assert len(station.names()) == 2


def test_dump_waits_for_a_slot_and_is_refused_only_at_the_deadline(station):
    station.settings = {"MAX_CONCURRENT": 1, "DEADLINE_SECONDS": 1, "VITAL_LIMIT": 0}
    station.run(elf(b"first"))
    with (station.watch_dir / ".helper/slot-0").open() as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        assert "no_slot" in station.run(elf(b"second"))
        assert [record["reason"] for record in station.records()] == ["no_slot"]
        station.settings["DEADLINE_SECONDS"] = 30
        process = station.start()
        process.stdin.write(elf(b"third"))
        process.stdin.close()
        waiting = f"/proc/{process.pid}/fd"
        wait_until(
            lambda: any(os.path.realpath(f"{waiting}/{fd}") == slot.name for fd in os.listdir(waiting))
        )
        assert process.poll() is None
        fcntl.flock(slot, fcntl.LOCK_UN)
        assert process.wait(timeout=20) == 0
        process.stderr.close()
    assert len(station.names()) == 2


def test_dump_that_got_no_slot_uses_up_no_rate_limit(station):
    station.settings = {"MAX_CONCURRENT": 1, "DEADLINE_SECONDS": 1, "RATE_LIMIT": "1/600", "VITAL_LIMIT": 0}
    (station.watch_dir / ".helper").mkdir(0o700)
    with (station.watch_dir / ".helper/slot-0").open("w") as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        assert "no_slot" in station.run(elf(b"first"))
    assert [record["kept"] for record in station.records() if record["reason"] == "rate_limit"] == ["0"]
    station.run(elf(b"second"))
    assert "rate_limit" in station.run(elf(b"third"))
    assert len(station.names()) == 1


def test_signals_and_rlimit_can_be_left_out(station):
    station.settings = {"IGNORE_SIGNALS": "3, 11"}
    assert ["IGNORE_SIGNALS" in station.run(elf(b"core")) for _ in range(3)] == [True, False, False]
    station.settings = {"RESPECT_RLIMIT": "yes"}
    assert "rlimit" in station.run(elf(b"core"))
    assert station.names() == []
    found = {record["reason"]: record["suppressed"] for record in station.records()}
    assert found == {"ignored_signal": "3", "rlimit": "1"}


def test_missing_directory_is_logged_and_holds_nobody(station):
    station.watch_dir.rmdir()
    assert "No such file or directory" in station.run(elf(NOISE))
    assert not station.watch_dir.exists()


def test_watch_directory_that_is_a_symlink_is_not_followed(station, tmp_path):
    station.watch_dir.rmdir()
    (tmp_path / "elsewhere").mkdir()
    station.watch_dir.symlink_to(tmp_path / "elsewhere")
    assert "no dump" in station.run(elf(b"core"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "line", ["COMPRESSOR=lz4", "NO_SUCH_KEY=1", "LEVEL=99", "just words", "RATE_LIMIT=often", "\xff\x00=\x01"]
)
def test_wrong_configuration_is_logged_and_the_dump_taken(station, line):
    key, _, value = line.partition("=")
    station.settings = {key: value}
    logged = station.run(elf(NOISE))
    assert "it must be" in logged
    assert station.core() == elf(NOISE)


def test_configuration_that_others_can_change_is_not_trusted(station, tmp_path):
    command = station.command()
    default = tmp_path / "default"
    default.mkdir(mode=0o700)
    module = tmp_path / "core_dump_helper/settings.py"
    kernel.replace(module, 'WATCH_DIR = "/core_dumps"', f"WATCH_DIR = {str(default)!r}")
    kernel.replace(module, "KEEP_FREE_PERCENT = 25", "KEEP_FREE_PERCENT = 1")  # however full the disk is
    (tmp_path / "helper.conf").chmod(0o666)
    done = subprocess.run(command, input=elf(b"x"), capture_output=True, env={}, check=False)
    assert b"others than root can change it" in done.stderr
    assert station.names() == []
    assert len(list(default.glob("core-app-*"))) == 1


def test_pigz_that_is_missing_is_replaced(station):
    station.settings = {"COMPRESSOR": "pigz"}
    station.pigz = ()
    assert "pigz does not work" in station.run(elf(NOISE))
    assert station.core() == elf(NOISE)
    assert station.attributes()["compressor"] in ("isal", "gzip")


def test_pigz_that_cannot_be_executed_is_replaced(station, tmp_path):
    broken = tmp_path / "pigz"
    broken.write_bytes(b"\x7fELF but not really")
    broken.chmod(0o755)
    station.settings = {"COMPRESSOR": "pigz"}
    station.pigz = (str(broken),)
    assert "pigz does not work" in station.run(elf(NOISE))
    assert station.core() == elf(NOISE)


@pytest.mark.parametrize(
    "fault",
    [
        "sys.exit(1)",
        "os.write(1, b'\\x1f\\x8b'); os.kill(os.getpid(), 9)",
        "os.read(0, 1 << 20); os.kill(os.getpid(), 9)",
        "time.sleep(600)",
        "\nwhile os.read(0, 1 << 20): pass\ntime.sleep(600)",
    ],
    ids=["fails", "killed", "killed later", "hangs", "hangs at the end"],
)
def test_pigz_that_dies_or_hangs_leaves_a_flagged_partial_in_bounded_time(station, tmp_path, fault):
    station.settings = {"COMPRESSOR": "pigz", "DEADLINE_SECONDS": 1, "BUFFER_BYTES": 4 * MIB}
    station.pigz = script(tmp_path / "pigz", fault)
    started = time.monotonic()
    logged = station.run(elf(NOISE))
    assert time.monotonic() - started < 8
    assert "pigz failed" in logged
    assert station.names() == ["core-app-1700000000-7-11.gz.partial"]
    assert station.attributes()["truncated"] == "compressor_failed"


def test_partial_is_locked_while_it_is_written(station):
    with station.start() as process:
        process.stdin.write(elf(NOISE))
        process.stdin.flush()
        wait_until(station.names)
        assert station.names() == ["core-app-1700000000-7-11.gz.partial"]
        wait_until(lambda: station.attributes().get("pid"))
        with station.dump().open() as partial, pytest.raises(BlockingIOError):
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.communicate()
    assert station.names() == ["core-app-1700000000-7-11.gz"]


def test_killed_helper_leaves_a_partial_that_decompresses_and_says_who_crashed(station):
    station.settings = {"BUFFER_BYTES": 0}
    core = elf(NOISE * 4)
    with station.start() as process:
        process.stdin.write(core[: 20 * MIB])
        process.stdin.flush()
        process.send_signal(signal.SIGKILL)
        process.wait()
    content = station.dump().read_bytes()
    kept = zlib.decompressobj(31).decompress(content)
    assert core.startswith(kept)
    assert len(kept) >= MIB
    assert station.attributes()["pid"] == str(os.getpid())
    with station.dump().open() as partial:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("arguments", "logs"),
    [
        (["-u12345"], "belongs to another"),
        (["-g12345"], "belongs to another"),
        (["-P4194305"], "no metadata"),
        (["-P"], "no metadata"),
        (["-i1"], "no metadata"),
        (["-P999999999999999999999"], "no metadata"),
    ],
)
def test_metadata_of_another_process_is_dropped_but_not_the_dump(station, arguments, logs):
    usual = [f"-P{os.getpid()}", "-p7", f"-u{os.getuid()}", "-s11", "-t17", "-d1"]
    usual = [argument for argument in usual if argument[:2] != arguments[0][:2]]
    logged = station.run(elf(b"core"), *arguments, *usual)
    assert logs in logged
    assert station.core() == elf(b"core")
    found = station.attributes()
    assert "exe" not in found
    assert found.get("sensitive") == ("identity" if logs == "belongs to another" else None)


LATE = """
import os, subprocess, sys
def started(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])
while True:  # until a child starts at least one tick after this process
    child = subprocess.Popen(["sleep", "60"], stdin=-3, stdout=-3, stderr=-3)
    if started(child.pid) > started("self"):
        break
    child.kill()
    child.wait()
print(child.pid, flush=True)
command = [word.replace("-P@", f"-P{child.pid}") for word in sys.argv[1:]]
os.execve(command[0], command, {})
"""


def test_process_that_started_after_the_helper_is_another_one(station):
    command = [sys.executable, "-IS", "-c", LATE, *station.command("-P@", "-p1", "-t17", "-s11", "-d1")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        sleeper = int(process.stdout.readline())
        _, logged = process.communicate(elf(b"core"))
    os.kill(sleeper, signal.SIGKILL)
    assert b"belongs to another process" in logged
    assert station.attributes()["sensitive"] == "identity"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no pidfd")
def test_pidfd_of_a_reaped_process_drops_the_metadata(station):
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    child.wait()
    usual = [f"-P{os.getpid()}", "-p7", "-s11", "-t17", "-d1"]
    station.run(elf(b"core"), *usual, f"-F{pidfd}", pass_fds=[pidfd])
    os.close(pidfd)
    assert station.attributes()["sensitive"] == "identity"
    station.dump().unlink()
    own = os.pidfd_open(os.getpid())
    station.run(elf(b"core"), *usual, f"-F{own}", pass_fds=[own])
    os.close(own)
    assert "sensitive" not in station.attributes()


@pytest.mark.parametrize("dumpable", ["-d0", "-d2", "-d", ""])
def test_dump_that_is_not_plainly_dumpable_is_flagged(station, dumpable):
    station.run(elf(b"core"), f"-P{os.getpid()}", "-p7", "-s11", "-t17", dumpable)
    assert station.attributes()["sensitive"] == f"dumpable={dumpable[2:] or 2}"


def test_name_split_by_an_old_kernel_is_joined(station):
    station.run(
        elf(b"core"), f"-P{os.getpid()}", "-p7", "-s11", "-t17", "-d1", "-F", "-hmy", "host", name="a\0b"
    )
    found = station.attributes()
    assert [found["thread"], found["hostname"]] == ["a b", "my host"]


def test_nothing_on_the_command_line_still_saves_the_dump(station):
    station.run(elf(b"core"), "-x", name="")
    (name,) = station.names()
    assert name.startswith("core-_-1")
    assert name.endswith("-0-0.gz")


def test_closed_descriptors_do_not_let_text_into_the_dump(station, tmp_path):
    station.settings = {"COMPRESSOR": "pigz"}
    station.pigz = script(
        tmp_path / "pigz",
        "print('stray', file=sys.stderr)\n"
        "sys.stderr and sys.stderr.flush()\n"
        "fds = sorted(os.listdir('/proc/self/fd'))\n"
        f"open({str(tmp_path / 'fds')!r}, 'w').write(' '.join(fds))\n"
        f"{COMPRESS}",
    )

    def as_the_kernel_does():
        os.close(1)
        os.close(2)

    station.run(elf(NOISE), preexec_fn=as_the_kernel_does)
    assert station.core() == elf(NOISE)
    assert (tmp_path / "fds").read_text().split() == ["0", "1", "2", "3"]  # 3 is the listing itself


def test_compressor_has_a_fixed_environment_whatever_ours_is(station, tmp_path):
    station.settings = {"COMPRESSOR": "pigz"}
    dumped = tmp_path / "environ"
    station.pigz = script(
        tmp_path / "pigz", f"open({str(dumped)!r}, 'w').write(repr(dict(os.environ)))\n{COMPRESS}"
    )
    station.run(elf(NOISE), env={"PIGZ": "--bogus", "PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)})
    assert station.core() == elf(NOISE)
    environ = ast.literal_eval(dumped.read_text())
    environ.pop("LC_CTYPE", None)  # Python's own
    assert environ == {"PATH": "/usr/bin:/bin"}


def test_attributes_fit_into_one_block_whatever_the_process_is_called(station):
    long = "x" * 3000
    with subprocess.Popen(["/bin/sh", "-c", "read x", long], stdin=subprocess.PIPE) as victim:
        station.run(elf(b"core"), f"-P{victim.pid}", "-p7", "-s11", "-t17", "-d1", "-h" + "h" * 64)
    found = station.attributes()
    assert len(found["cmdline"]) <= 1024
    assert "truncated" not in found
    assert sum(40 + len(name) + len(value) for name, value in found.items()) <= 3200
    assert {"bytes", "expected_bytes", "compressor", "duration_ms", "exe", "pid"} <= found.keys()


def test_buffer_lets_the_kernel_go_before_a_slow_compressor_is_done(station, tmp_path):
    release = tmp_path / "release"
    os.mkfifo(release)
    station.settings = {"COMPRESSOR": "pigz"}
    station.pigz = script(
        tmp_path / "pigz",
        f"open({str(release)!r}).read()\nimport zlib\nz = zlib.compressobj(1, 8, 31)\n"
        "while data := os.read(0, 1 << 20): os.write(1, z.compress(data))\nos.write(1, z.flush())",
    )
    core = elf(NOISE * 4)
    with station.start() as process:
        process.stdin.write(
            core
        )  # returns when all but the last MiB has been read, before pigz has taken any
        process.stdin.close()
        with release.open("w"):
            assert process.poll() is None
        assert process.wait(timeout=30) == 0
    assert station.core() == core


def nice(task):
    """Return the nice value in a `stat` file of /proc."""
    return int(task.read_text().rpartition(")")[2].split()[16])


@pytest.mark.parametrize("compressor", ["gzip", "pigz"])
def test_compressor_gives_way_to_others_only_once_the_process_is_released(station, compressor):
    if compressor == "pigz" and not shutil.which("pigz"):
        pytest.skip("pigz is not installed")
    station.settings = {"COMPRESSOR": compressor, "BUFFER_BYTES": 512 * MIB}
    with station.start() as process:
        tasks = Path(f"/proc/{process.pid}/task")
        process.stdin.write(elf(NOISE, promised=150 * MIB))
        process.stdin.flush()
        wait_until(station.names)
        assert {nice(task / "stat") for task in tasks.iterdir()} == {os.nice(0)}
        for _ in range(120):
            process.stdin.write(os.urandom(MIB))
        process.stdin.close()
        if compressor == "gzip":
            wait_until(lambda: nice(tasks / str(process.pid) / "stat") == 9)
        else:
            (child,) = (tasks / str(process.pid) / "children").read_text().split()
            threads = Path(f"/proc/{child}/task")
            wait_until(lambda: {nice(task / "stat") for task in threads.iterdir()} == {9})
        process.wait(60)


def test_buffer_stays_within_its_limit(station, tmp_path):
    release = tmp_path / "release"
    os.mkfifo(release)
    station.settings = {"COMPRESSOR": "pigz", "BUFFER_BYTES": 16 * MIB}
    station.pigz = script(tmp_path / "pigz", f"open({str(release)!r}).read()\nos.execv('/bin/cat', ['cat'])")
    with station.start() as process:
        os.set_blocking(process.stdin.fileno(), False)
        core, sent = elf(NOISE * 8), 0
        room = select.poll()
        room.register(process.stdin, select.POLLOUT)
        while room.poll(60_000 if sent < 8 * MIB else 1000):  # full once nothing is read for a second
            sent += os.write(process.stdin.fileno(), core[sent : sent + MIB])
            assert sent < 24 * MIB
        assert sent > 8 * MIB
        with release.open("w"):
            os.set_blocking(process.stdin.fileno(), True)
        process.communicate(core[sent:])
    assert station.dump().read_bytes() == core


def test_calibration_remembers_the_fastest_and_auto_uses_it(station, tmp_path):
    slow = "import zlib\nz = zlib.compressobj(1, 8, 31)\n"
    slow += "while data := os.read(0, 1 << 16): time.sleep(0.01); os.write(1, z.compress(data))\nos.write(1, z.flush())"
    station.pigz = script(tmp_path / "pigz", slow)
    station.settings = {"COMPRESSOR": "auto", "PYTHON_PATH": ISAL}
    program = station.command()[0]
    kernel.replace(tmp_path / "core_dump_helper/settings.py", 'CALIBRATION = "', f'CALIBRATION = "{tmp_path}')
    started = time.monotonic()
    done = subprocess.run([program, "--calibrate"], capture_output=True, text=True, check=True, env={})
    assert time.monotonic() - started < 10
    assert "isal is the fastest" in done.stdout
    assert (tmp_path / "var/lib/core-dump-handler/compressor").read_text() == "isal\n"
    with subprocess.Popen(
        [program, "-p1", "-s6", "-t17", "--", "x"], stdin=subprocess.PIPE, env={}
    ) as process:
        process.communicate(elf(NOISE))
    assert station.attributes()["compressor"] == "isal"


def test_help_and_version_speak_and_touch_nothing(station):
    program = station.command()[0]
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert "BUFFER_BYTES=1073741824" in told
    assert "--calibrate" in told
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.split()[0] == "core-dump-helper"
    assert subprocess.run([program], capture_output=True, check=False).returncode == 2
    assert station.names() == []


@pytest.fixture
def cgroup():
    """A cgroup of our own, version 2."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if root is None or os.geteuid() != 0:
        pytest.skip("needs cgroup 2 and root: sudo make test")
    path = root / f"core-dump-test-{os.getpid()}"
    path.mkdir()
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


def members(cgroup):
    return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()]


def test_helper_that_needs_memory_moves_into_the_prepared_cgroup(station, tmp_path, cgroup):
    station.settings = {"COMPRESSOR": "pigz", "CGROUP": cgroup}
    station.pigz = script(tmp_path / "pigz", SLOW)
    core = elf(bytes(32 * MIB))
    with station.start(stderr=subprocess.DEVNULL) as process:
        feeder = threading.Thread(target=feed, args=(process.stdin, core))
        feeder.start()
        wait_until(lambda: members(cgroup) == [process.pid])
        feeder.join()
    assert station.core() == core


def test_helper_that_waits_for_a_slot_moves_into_the_prepared_cgroup(station, cgroup):
    station.settings = {"CGROUP": cgroup, "MAX_CONCURRENT": 1, "RATE_LIMIT": 0}
    with station.start() as first:
        first.stdin.write(elf(NOISE[:MIB]))
        first.stdin.flush()
        wait_until(station.names)
        with station.start() as second:
            wait_until(lambda: members(cgroup) == [second.pid])
            first.communicate()
            second.communicate(elf(b"core"))
    assert len(station.names()) == 2


def test_small_dump_pays_no_move_into_a_cgroup(station, cgroup):
    station.settings = {"CGROUP": cgroup}
    core = elf(NOISE[:MIB])
    with station.start() as process:
        process.stdin.write(core[:-1])
        process.stdin.flush()
        wait_until(station.names)
        assert members(cgroup) == []
        process.communicate(core[-1:])
    assert station.core() == core


def test_missing_cgroup_is_logged_and_the_dump_taken(station, tmp_path):
    station.settings = {"COMPRESSOR": "pigz", "CGROUP": "/sys/fs/cgroup/no-such"}
    station.pigz = script(tmp_path / "pigz", SLOW)
    assert "CGROUP" in station.run(elf(bytes(16 * MIB)))
    assert station.core() == elf(bytes(16 * MIB))


@pytest.fixture
def memory_cgroup():
    """A cgroup of 64 MiB, of either version, that tells how often its limit has killed."""
    if os.geteuid() != 0:
        pytest.skip("makes a cgroup, needs root: sudo make test")
    with contextlib.ExitStack() as stack:
        try:
            limited = stack.enter_context(memorycgroup.memory_cgroup("core-dump-test", 64 * MIB))
        except LookupError as error:
            pytest.skip(str(error))
        yield limited


SLOW = (
    "import zlib\nz = zlib.compressobj(1, 8, 31)\nwhile data := os.read(0, 1 << 20):\n"
    "    time.sleep(0.01)\n    os.write(1, z.compress(data) + z.flush(2))\nos.write(1, z.flush())"
)
"""A compressor that is slower than any kernel writes."""


def test_buffer_never_gets_the_helper_killed_by_the_limit_of_its_cgroup(station, tmp_path, memory_cgroup):
    path, events = memory_cgroup
    station.settings = {"COMPRESSOR": "pigz", "CGROUP": path, "BUFFER_BYTES": 1 << 30}
    station.pigz = script(tmp_path / "pigz", SLOW)
    core = elf(bytes(128 * MIB))
    with station.start(stderr=subprocess.DEVNULL) as process:
        process.communicate(core, timeout=60)
        assert process.returncode == 0
    assert "truncated" not in station.attributes()
    assert station.core() == core
    assert "oom_kill 0" in events.read_text()


def test_helper_killed_for_memory_keeps_as_much_with_a_buffer_as_without(station, tmp_path):
    station.pigz = script(tmp_path / "pigz", SLOW)
    core = elf(NOISE * 8)
    kept = {}
    for buffer_bytes in (0, 1 << 30):
        station.settings = {"COMPRESSOR": "pigz", "BUFFER_BYTES": buffer_bytes}
        with station.start(stderr=subprocess.DEVNULL) as process:
            feeder = threading.Thread(target=feed, args=(process.stdin, core))
            feeder.start()
            wait_until(lambda: station.names() and station.dump().stat().st_size > 4 * MIB, 60)
            process.kill()
            feeder.join()
        partial = station.dump()
        wait_until(lambda path=partial: unlocked(path), 10, "the compressor to end")
        kept[buffer_bytes] = len(zlib.decompressobj(31).decompress(partial.read_bytes()))
        partial.unlink()
    assert min(kept.values()) > 4 * MIB, "what the compressor had written; noise takes as much compressed"


def feed(pipe, data):
    """Write all of it, or as much as somebody reads."""
    with contextlib.suppress(BrokenPipeError), pipe:
        pipe.write(data)


def unlocked(path):
    """Say whether nobody writes to a partial any more."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("compressor", ["isal", "gzip", "none"])
@pytest.mark.parametrize("buffer_mib", [0, 16])
def test_memory_is_flat_whatever_the_size(station, compressor, buffer_mib):
    station.settings = {"COMPRESSOR": compressor, "PYTHON_PATH": ISAL, "BUFFER_BYTES": buffer_mib * MIB}
    with station.start(stderr=subprocess.DEVNULL) as process:
        process.stdin.write(elf(NOISE))
        for _ in range(16):
            process.stdin.write(NOISE)
        process.stdin.flush()  # all but what the pipe holds has been read
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.communicate()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert station.attributes()["bytes"] == str(len(elf(NOISE)) + 16 * len(NOISE))
    assert peak_kib < (32 + buffer_mib) * 1024


def test_too_few_descriptors_are_logged_and_hold_nobody(station):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))}
    assert "no dump" in station.run(elf(NOISE), **limit)
    assert station.names() == []

"""How long a crashed process is held, above all when the helper cannot do its work: real crashes, real faults."""

import contextlib
import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.kernel.conftest import attributes
from tests.support import kernel
from tests.support.collector import wait_until

MEGABYTES = 48
DEADLINE_SECONDS = 2
"""Of the helper; what hangs holds the process no longer than this, and what fails holds it not at all."""
SPARE_SECONDS = 4.0
"""For a busy machine."""


def messages():
    """Return the lines of the kernel log, each with its time."""
    return subprocess.check_output(["dmesg"], text=True, errors="replace").splitlines()


@pytest.fixture
def kernel_log():
    """Return what the kernel log has said since the test began."""
    before = set(messages())
    return lambda: "\n".join(line for line in messages() if line not in before)


@contextlib.contextmanager
def mounted(node, *options):
    """Mount a file system over the watch directory for a while."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", node.watch_dir], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", node.watch_dir], check=True)


@contextlib.contextmanager
def full_disk(node):
    with mounted(node, "size=4m", "mode=0700"):
        yield "holds what it wrote"


@contextlib.contextmanager
def read_only_file_system(node):
    with mounted(node, "ro", "mode=0700"):
        yield "Read-only file system"


@contextlib.contextmanager
def directory_gone(node):
    shutil.rmtree(node.watch_dir)
    yield "No such file or directory"
    node.watch_dir.mkdir(mode=0o700)


def skip_where_it_is_loaded(node):
    """Skip a test that changes the helper's code, which a listener has loaded."""
    if node.listener:
        pytest.skip("needs the pipe")


@contextlib.contextmanager
def pigz_that(node, does):
    skip_where_it_is_loaded(node)
    program = node.directory / "pigz"
    program.write_text(f"#!{sys.executable} -IS\nimport os, time\n{does}\n")
    program.chmod(0o755)
    module = node.directory / "core_dump_helper/compress.py"
    kernel.replace(module, "\nPIGZ = ", f"\nPIGZ = ({str(program)!r},)\nOLD_PIGZ = ")
    yield "holds what it wrote"


def pigz_dies(node):
    return pigz_that(node, "os.read(0, 1 << 20); os.kill(os.getpid(), 9)")


def pigz_hangs(node):
    return pigz_that(node, "time.sleep(600)")


@contextlib.contextmanager
def pigz_missing(node):
    skip_where_it_is_loaded(node)
    kernel.replace(node.directory / "core_dump_helper/compress.py", "\nPIGZ = ", "\nPIGZ = ()\nOLD_PIGZ = ")
    yield "pigz does not work"


def held_seconds(node):
    """Crash a process; return how long it took from the signal, and its start, to its end."""
    started = time.monotonic()
    node.crash_only(megabytes=MEGABYTES, kind="random")
    return time.monotonic() - started


@pytest.mark.parametrize(
    "fault", [full_disk, read_only_file_system, directory_gone, pigz_missing, pigz_dies, pigz_hangs]
)
def test_failing_helper_holds_the_process_no_longer_than_its_deadline(
    node, fault, kernel_log, record_property
):
    settings = {"COMPRESSOR": "pigz", "BUFFER_BYTES": 0, "DEADLINE_SECONDS": DEADLINE_SECONDS}
    with node.installed(**settings), fault(node) as line:
        held = held_seconds(node)
        node.settle()
        assert line in kernel_log(), "a line without its end is shown only when the next one comes"
    record_property("held_seconds", round(held, 2))
    assert held < DEADLINE_SECONDS + SPARE_SECONDS


@pytest.fixture
def slot(node):
    """The only slot of a helper with MAX_CONCURRENT=1, which somebody else holds."""
    state = node.watch_dir / ".helper"
    state.mkdir(mode=0o700)
    with (state / "slot-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_small_process_is_released_while_its_dump_waits_for_a_slot(node, slot):
    (node.watch_dir / ".modules").mkdir(mode=0o700)
    (node.watch_dir / ".modules/collector").touch()
    with node.installed(MAX_CONCURRENT=1, DEADLINE_SECONDS=60):
        node.crash_only()  # returns when the process has ended
        assert (node.names(), len(node.helpers())) == ([], 1)
        fcntl.flock(slot, fcntl.LOCK_UN)
        node.settle()
    found = attributes(node.dump())
    assert {"frames", "exe", "threads"} < found.keys()
    assert "truncated" not in found
    (listed,) = (node.watch_dir / ".modules").glob("core-*.json")
    assert str(node.program) in listed.read_text()


def test_files_of_a_process_that_is_gone_are_closed_when_its_dump_waits_long(node, slot, kernel_log):
    (node.watch_dir / ".modules").mkdir(mode=0o700)
    (node.watch_dir / ".modules/collector").touch()
    with node.installed(MAX_CONCURRENT=1, DEADLINE_SECONDS=60):
        kernel.replace(
            node.directory / "core_dump_helper/limits.py", "OPEN_SECONDS = 10", "OPEN_SECONDS = 0.1"
        )
        node.crash_only()
        (helper,) = node.helpers()
        opened = Path(f"/proc/{helper}/fd")
        wait_until(lambda: not any(path.resolve() == node.program for path in opened.iterdir()))
        fcntl.flock(slot, fcntl.LOCK_UN)
        node.settle()
        assert "its files are not kept" in kernel_log()
    assert "frames" not in attributes(node.dump())
    assert not list((node.watch_dir / ".modules").glob("core-*"))

"""The core pattern belongs to the whole machine: every user of it waits, says so, and leaves it as it was."""

import contextlib
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import MACHINE
from tests.support import cleanup, kernel
from tests.support.collector import wait_until

ROOT = Path(__file__).parents[2]


def owner(code):
    """Start a program that runs `code` and then sleeps; return it once it has printed a line."""
    command = [sys.executable, "-c", f"import time, tests.support.kernel as kernel\n{code}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    with kernel.untimed():  # it may wait for others
        assert process.stdout.readline() == b"set\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_pattern_and_limit_are_restored_when_their_owner_is_killed(number):
    paths = [kernel.PATTERN, kernel.KERNEL / "core_pipe_limit"]
    with kernel.locked():
        before = [path.read_text() for path in paths]
    process = owner(
        "with kernel.core_pattern('|/bin/false x', 7):\n print('set', flush=True); time.sleep(60)"
    )
    process.send_signal(number)
    process.communicate()
    wait_until(lambda: [path.read_text() for path in paths] == before, 10)
    with kernel.locked():
        assert [path.read_text() for path in paths] == before


def test_pattern_that_the_kernel_would_cut_is_refused_and_changes_nothing():
    before = kernel.PATTERN.read_text()
    with pytest.raises(ValueError, match="the kernel takes 127"), kernel.core_pattern("|/" + "x" * 200):
        pass
    assert kernel.PATTERN.read_text() == before


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of our own, so that nobody else on this machine waits."""
    monkeypatch.setattr(kernel, "LOCK", tmp_path / "lock")
    return tmp_path / "lock"


@contextlib.contextmanager
def held_elsewhere(lock):
    """Hold the lock in another process for half a second."""
    with subprocess.Popen(
        ["flock", lock, "sh", "-c", "echo set; sleep 0.5"], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"set\n"
        yield other


def test_wait_for_the_lock_names_its_holder_and_does_not_count_into_the_time_limit(lock):
    alarms, said = [], []
    old = signal.signal(signal.SIGALRM, lambda *_: alarms.append(time.monotonic()))
    limit = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with held_elsewhere(lock) as other, kernel.locked(said.append):
            assert alarms == []
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3, "it goes on when the lock is ours"
    finally:
        signal.setitimer(signal.ITIMER_REAL, *limit)
        signal.signal(signal.SIGALRM, old)
    assert said == [f"process {other.pid} (flock) uses kernel.core_pattern; waiting until it is free"]


def test_wait_for_the_lock_has_an_end(lock, monkeypatch):
    monkeypatch.setattr(kernel, "LOCK_SECONDS", 0)
    with (
        held_elsewhere(lock),
        pytest.raises(TimeoutError, match="was in use for 0 s"),
        kernel.locked(lambda _: None),
    ):
        pass


def test_process_started_under_the_lock_does_not_hold_it(lock):
    with contextlib.ExitStack() as stack:
        with kernel.locked():
            child = stack.enter_context(subprocess.Popen(["sleep", "60"], close_fds=False))
            stack.callback(child.kill)
        with lock.open() as mine:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_temporary_directory_is_removed_when_its_owner_is_killed(number, tmp_path):
    code = (
        "from tests.support.cleanup import temporary_directory\n"
        f"with temporary_directory('x-', {str(tmp_path)!r}) as path:\n"
        " (path / 'file').write_text('content'); print('set', flush=True); time.sleep(60)"
    )
    process = owner(code)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    process.communicate()
    wait_until(lambda: list(tmp_path.iterdir()) == [], 10)


def test_failed_restoring_is_an_error():
    with pytest.raises(RuntimeError, match="exited with 3"), cleanup.guardian("sys.exit(3)"):
        pass


def test_all_files_that_set_the_pattern_are_run_by_one_process():
    users = [
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if "core_pattern(" in path.read_text() or "kernel.locked(" in path.read_text()
    ]
    assert len(users) > 5
    assert [path for path in users if not path.startswith(MACHINE)] == []

"""The socket way on a host: a real systemd keeps the socket, and the pipe takes over whenever nobody listens."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
from tests.deploy.test_sysctl_host import OURS, PROGRAM, SETUP, WATCH_DIR, host, pattern  # noqa: F401
from tests.support import deploy, kernel, manager
from tests.support.collector import wait_until

from core_dump_setup import kernel as host_kernel
from core_dump_setup import listener
from core_dump_setup import systemd as host_systemd

MOST_WAITING = 8
SOCKET = f"@@{host_kernel.SOCKET}"
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/core_modes"), reason="needs Linux 6.16")


@pytest.fixture
def systemd(host, tmp_path):  # noqa: F811
    """A host with a systemd."""
    with manager.systemd(tmp_path) as found:
        yield found
        deploy.run(*found.command(SETUP, "uninstall", "--purge"))
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(host_kernel.SOCKET))


@pytest.fixture
def install(host, systemd):  # noqa: F811
    """The program that installs from a checkout, where the systemd runs."""
    from tests.deploy import test_sysctl_host

    return lambda *options: deploy.run(*systemd.command(test_sysctl_host.INSTALL, *options))


def main_pid(systemd):
    """Return the pid of the listener."""
    shown = deploy.succeed(*systemd.command("systemctl", "show", "-P", "MainPID", listener.UNIT_NAMES[1]))
    return int(shown)


def test_socket_is_proved_with_a_crash_survives_upgrades_and_goes_with_its_pattern(systemd, install):
    done = install("--socket")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a test process crashed and its dump arrived" in done.stdout
    assert pattern() == SOCKET
    directory = Path(host_kernel.SOCKET).parent
    assert (directory.stat().st_uid, directory.stat().st_mode & 0o777) == (0, 0o700)
    first = main_pid(systemd)
    assert install("--no-test").returncode == 0, "an upgrade keeps the socket"
    assert pattern() == SOCKET
    assert main_pid(systemd) != first, "and runs the new release"
    deploy.succeed(*systemd.command(SETUP, "deactivate"))
    assert pattern() == "core"
    assert not listener.is_open()
    assert not os.path.exists(host_kernel.SOCKET)


def test_pipe_takes_over_while_the_listener_is_down(systemd, install):
    assert install("--socket", "--no-test").returncode == 0
    deploy.succeed(*systemd.command("systemctl", "stop", listener.UNIT_NAMES[1]))
    assert pattern() == OURS
    assert "its dump arrived" in deploy.succeed(*systemd.command(SETUP, "test"))
    deploy.succeed(*systemd.command("systemctl", "start", listener.UNIT_NAMES[1]))
    assert pattern() == SOCKET
    before = main_pid(systemd)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: main_pid(systemd) not in (0, before) and pattern() == SOCKET, 20, "another listener")
    assert "its dump arrived" in deploy.succeed(*systemd.command(SETUP, "test"))


def test_restarts_under_constant_crashing_lose_nothing(systemd, install, tmp_path):
    conf = Path("/etc/core-dump-handler/helper.conf")
    conf.parent.mkdir()
    conf.write_text("RATE_LIMIT=0\nKEEP_FREE_PERCENT=1\nCOMPRESSOR=gzip\nCGROUP=\n")
    assert install("--socket", "--no-test").returncode == 0
    program = kernel.build(kernel.CRASHER, tmp_path / "crash", "-pthread")
    stop, crashed = threading.Event(), []

    def waiting():
        return len(crashed) - len(list(WATCH_DIR.glob("core-storm-*.gz")))

    def crash():
        while not stop.is_set():
            crashed.append(kernel.crash(program, 6, name=b"storm"))
            wait_until(
                lambda: waiting() < MOST_WAITING, 60, "the helpers: the kernel starts as many as it is given"
            )

    threads = [threading.Thread(target=crash) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        deploy.succeed(*systemd.command("systemctl", "restart", listener.UNIT_NAMES[1]))
    stop.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(list(WATCH_DIR.glob("core-storm-*.gz"))) >= len(crashed), 30, "every dump")
    assert len(crashed) > 20


def test_older_kernel_or_a_host_without_systemd_is_one_clear_line(host, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(host_kernel, "SYSCTL", str(tmp_path))
    with pytest.raises(
        listener.SetupError, match=r"this kernel \(.*\) sends cores to no socket: that needs Linux 6.16"
    ):
        listener.check(live=True)
    (tmp_path / "core_modes").write_text("file\npipe\nsocket\n")
    monkeypatch.setattr(host_systemd, "RUNNING", str(tmp_path / "none"))
    with pytest.raises(listener.SetupError, match="systemd does not run here"):
        listener.check(live=True)
    from tests.deploy import test_sysctl_host

    if not os.path.isdir("/run/systemd/system"):
        done = deploy.run(test_sysctl_host.INSTALL, "--socket")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert not PROGRAM.exists()


def test_directory_that_others_can_change_gets_no_core(systemd, install):
    directory = Path(host_kernel.SOCKET).parent
    directory.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o777)
    try:
        done = install("--socket", "--no-test")
        assert done.returncode == 1
        assert pattern() == "core"
    finally:
        directory.chmod(0o700)

"""Owns a real systemd next to the machine's own init: a user manager of root, in a mount namespace of its own.

Of the system's units it knows those that the test installs, and empty targets. `systemctl` talks to it. It has a cgroup
of its own in each hierarchy, because a manager moves every process of its cgroup.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.support.cleanup import guarded
from tests.support.collector import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CGROUPS = Path("/sys/fs/cgroup")
TARGETS = ("basic", "sysinit", "shutdown", "sockets", "timers", "multi-user", "default", "exit")
SCRIPT = """
set -e
mount -t tmpfs none /run/systemd
mkdir /run/systemd/system
mount -t tmpfs none /usr/lib/systemd/system
mount -t tmpfs none /etc/systemd/system
cp "$1"/*.target /usr/lib/systemd/system
mount --bind "$1/systemctl" "$(readlink -f /bin/systemctl)"
export XDG_RUNTIME_DIR="$1/run" SYSTEMD_UNIT_PATH=/etc/systemd/system:/usr/lib/systemd/system
for group in $2; do mkdir "$group"; echo $$ >"$group/cgroup.procs" || :; done  # a new cpuset takes nobody
touch "$1/ready"
exec systemd --user --unit=basic.target --log-target=console >"$1/log" 2>&1
"""


class Manager:
    """A running manager."""

    def __init__(self, process: subprocess.Popen[bytes], scratch: Path) -> None:
        """Store the process that holds the namespace."""
        self._process, self.log = process, scratch / "log"

    def command(self, *words: object) -> list[str]:
        """Return a command that runs where the manager is."""
        return ["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", *map(str, words)]


@contextlib.contextmanager
def systemd(scratch: Path) -> Iterator[Manager]:
    """Run a manager."""
    program, control = shutil.which("systemd"), shutil.which("systemctl")
    if not program or not control:
        pytest.skip("systemd is not installed")
    (scratch / "run").mkdir(mode=0o700)
    for name in TARGETS:
        (scratch / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    shutil.copy(control, scratch / "systemctl.real")
    wrapper = f'#!/bin/sh\nexport XDG_RUNTIME_DIR={scratch}/run\nexec {scratch}/systemctl.real --user "$@"\n'
    (scratch / "systemctl").write_text(wrapper)
    (scratch / "systemctl").chmod(0o755)
    groups = [
        place.parent / f"cdh-manager-{os.getpid()}"
        for place in [*CGROUPS.glob("cgroup.procs"), *CGROUPS.glob("*/cgroup.procs")]
        if is_root(place)
    ]
    command = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", str(scratch), " ".join(map(str, groups))]
    process = subprocess.Popen(guarded(command))
    try:
        wait_until(lambda: (scratch / "ready").exists() or process.poll() is not None, 10, "the manager")
        manager = Manager(process, scratch)
        running = manager.command("systemctl", "list-units", "basic.target")
        wait_until(
            lambda: subprocess.run(running, capture_output=True, check=False).returncode == 0,
            20,
            "the manager to answer",
        )
        yield manager
    finally:
        process.kill()
        process.wait()
        for group in groups:
            remove_cgroup(group)


def is_root(procs: Path) -> bool:
    """Say whether this is the root of a hierarchy."""
    return procs.parent == CGROUPS or (procs.parent.parent == CGROUPS and procs.parent.is_mount())


def remove_cgroup(top: Path) -> None:
    """Kill the processes of a cgroup, and remove it with everything below it."""
    for folder in sorted(top.glob("**/"), reverse=True):
        for word in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(word), signal.SIGKILL)
        procs = folder / "cgroup.procs"
        wait_until(lambda procs=procs: not procs.read_text(), 30, "an empty cgroup")  # type: ignore[misc]
        folder.rmdir()

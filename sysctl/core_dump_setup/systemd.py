"""Owns the way to systemd: whether it runs here, and commands of systemctl."""

from __future__ import annotations

import os
import subprocess

from core_dump_setup.errors import SetupError

SYSTEMCTL = "/bin/systemctl"
RUNNING = "/run/systemd/system"
"""Exists where systemd is the init: sd_booted(3)."""


def is_running() -> bool:
    """Return whether systemd runs here."""
    return os.path.isdir(RUNNING)


def control(
    command: str, *units: str, seconds: int, stdout: int | None = None, stderr: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of systemctl; raises SetupError if it cannot run or takes too long."""
    try:
        return subprocess.run(
            [SYSTEMCTL, command, *units], check=False, timeout=seconds, stdout=stdout, stderr=stderr, env={}
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError("cannot %s %s: %s" % (command, " and ".join(units), error)) from error

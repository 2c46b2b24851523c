"""Owns REASSERT: giving the core pattern back to the helper after something else has taken it.

core-dump-reassert.timer asks every minute while REASSERT=yes. A program that takes the pattern again and again keeps
it: three times an hour are enough for an upgrade of the node.
"""

from __future__ import annotations

import re
import subprocess
import time

from core_dump_setup import kernel, systemd
from core_dump_setup.errors import SetupError, say, warn
from core_dump_setup.files import STATE, Tree

UNIT_NAMES = ("core-dump-reassert.service", "core-dump-reassert.timer")
UNITS = tuple("/usr/lib/systemd/system/" + name for name in UNIT_NAMES)
WANTED = "/etc/systemd/system/timers.target.wants/" + UNIT_NAMES[1]
"""Exists while the helper is activated and REASSERT=yes."""
TIMES = STATE + "/reasserted"
"""Unix times at which the pattern was given back, one a line."""
MOST = 3
WITHIN_SECONDS = 3600


def reassert(tree: Tree, pattern: str, limit: str) -> None:
    """Set the pattern if something else has taken it, at most MOST times in WITHIN_SECONDS and never while stopping.

    Raises:
        SetupError: the kernel refused it.
    """
    now = kernel.current("core_pattern")
    if kernel.is_ours(now):
        return
    if not tree.exists(WANTED):
        say("REASSERT is off, or the helper is not activated: the core pattern is left alone")
        return
    if _is_stopping():
        say("the system is stopping: the core pattern is left alone")
        return
    times = recent(tree.read(TIMES) or b"", time.time())
    if len(times) >= MOST:
        warn("given back %d times within an hour, and left alone now: %s" % (MOST, kernel.describe(now)))
        return
    # Noted before the pattern is set: a run that is killed in between counts.
    tree.place(TIMES, b"".join(b"%d\n" % moment for moment in [*times, int(time.time())]), 0o600)
    kernel.use(tree, pattern, limit)
    tree.keep()
    warn("something else took kernel.core_pattern, which is given back: " + kernel.describe(now))


def recent(data: bytes, now: float) -> list[int]:
    """Return the times within the last hour; a time from the future counts, until the clock is an hour behind it."""
    times = [int(line) for line in data.split(b"\n") if re.fullmatch(rb"[0-9]{1,12}", line)]
    return [moment for moment in times if abs(now - moment) < WITHIN_SECONDS][-MOST:]


def _is_stopping() -> bool:
    """Say whether systemd is shutting this host down."""
    try:
        done = systemd.control("is-system-running", seconds=10, stdout=subprocess.PIPE)
    except SetupError:
        return False
    return done.stdout.strip() == b"stopping"


def switch(tree: Tree, *, on: bool) -> None:
    """Let the timer run at every boot, or not."""
    if on and not tree.exists(WANTED):
        tree.link(WANTED, UNITS[1])
    elif not on:
        tree.remove(WANTED)


def apply_now(*, on: bool) -> None:
    """Start or stop the timer of this host, where systemd runs."""
    if systemd.is_running():
        systemd.control("start" if on else "stop", UNIT_NAMES[1], seconds=30)

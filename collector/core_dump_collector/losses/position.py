"""Owns the position in the kernel log, which is saved in an extended attribute of the watch directory.

A thread of its own saves it, so that a file system that hangs does not stop the loop.

An attribute is replaced atomically, needs no file among the dumps, and moves with the directory. On a file system
without attributes, a restarted collector begins at the end of the log.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from core_dump_collector.node.ownership import is_trusted
from core_dump_collector.observation import Look

if TYPE_CHECKING:
    from core_dump_collector.observation import Observer

ATTRIBUTE = "user.coredump.kernel_log"
_END_SECONDS = 2.0
_FORM = re.compile(rb"1 ([0-9a-f-]{1,64}) (-1|\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19})")


@dataclass(frozen=True, slots=True)
class Position:
    """Times are microseconds of the kernel's clock, which starts with the system that `boot_id` names."""

    boot_id: str
    sequence: int = -1
    """Number of the last record that was read; -1 if unknown."""
    needed: int = 0
    """Records up to here are not needed again: their losses are counted, and stored where losses are stored."""
    read: int = 0
    """Losses up to here are counted."""
    judged: int = 0
    """Faults up to here are counted or explained."""

    def is_possible(self, now: int) -> bool:
        """Tell whether a collector can have saved this position before `now`, a time of the same boot."""
        return self.needed <= self.read <= now and self.judged <= now


def load(directory: str) -> Position | None:
    """Return the position that was saved. Return None if none was, or if another user could have written it."""
    try:
        if not _is_ours(os.stat(directory)):
            return None
        value = os.getxattr(directory, ATTRIBUTE)
    except OSError:
        return None
    match = _FORM.fullmatch(value)
    return (
        None
        if match is None
        else Position(match[1].decode(), *(int(number) for number in match.groups()[1:]))
    )


def _is_ours(status: os.stat_result) -> bool:
    """Tell whether only root and this user can set attributes; of a sticky directory only its owner can (xattr(7))."""
    return is_trusted(status) or (status.st_uid in {0, os.geteuid()} and bool(status.st_mode & stat.S_ISVTX))


def save(directory: str, position: Position) -> bool:
    """Save a position; return False if the file system has no such attributes.

    Raises:
        OSError: it cannot be saved for another reason.
    """
    numbers = (position.sequence, position.needed, position.read, position.judged)
    value = " ".join(map(str, ("1", position.boot_id, *numbers)))
    try:
        os.setxattr(directory, ATTRIBUTE, value.encode())
    except OSError as error:
        if error.errno in {errno.ENOTSUP, errno.ENOSYS}:
            return False
        raise
    return True


class Saver:
    """Saves the newest position in a thread, so that a slow file system delays nobody."""

    def __init__(self, directory: str, observer: Observer) -> None:
        """Prepare; the first position starts the thread."""
        self._directory, self._observer = directory, observer
        self._newest: Position | None = None
        self._changed = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None

    def save(self, place: Position) -> None:
        """Hand a position to the thread."""
        with self._changed:
            self._newest = place
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="log-position")
            self._thread.start()

    def end(self) -> None:
        """Let the thread save its last position and end; wait only briefly, because a file system may hang."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ending)
                place, self._newest = self._newest, None
            if place is None:
                return
            self._observer.look(Look.KERNEL_LOG_POSITION, partial(save, self._directory, place))

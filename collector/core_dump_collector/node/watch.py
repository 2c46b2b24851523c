"""Owns inotify: tells which names are complete, and when events were lost.

The only importer of inotify_simple. Two events matter: `IN_MOVED_TO` (the helper renames a finished dump
into place) and `IN_CLOSE_WRITE` (a writer of a raw core is done). See inotify(7).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from inotify_simple import INotify, flags

if TYPE_CHECKING:
    from types import TracebackType

_EVENTS = flags.CLOSE_WRITE | flags.MOVED_TO | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
_LOST = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT | flags.IGNORED


@dataclass(slots=True)
class Changes:
    """What one read of the inotify descriptor said."""

    names: list[str] = field(default_factory=list)
    overflow: bool = False
    """The kernel dropped events: only a scan tells what is there."""
    lost: bool = False
    """The directory was deleted, moved or unmounted: watch it again."""


class Watch:
    """One watched directory; follows the path, not the inode: `rearm` after it was replaced."""

    def __init__(self, directory: str) -> None:
        """Start to watch.

        Raises:
            OSError: the directory is missing, is none, or the user's inotify limits are used up.
        """
        self._directory = directory
        self._identity = (0, 0)
        self._inotify = INotify()
        try:
            self._arm()
        except BaseException:
            self._inotify.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return int(self._inotify.fileno())

    def read(self) -> Changes:
        """Return what changed, without waiting."""
        changes = Changes()
        for event in self._inotify.read(timeout=0):
            mask = flags(event.mask)
            changes.overflow |= bool(mask & flags.Q_OVERFLOW)
            changes.lost |= bool(mask & _LOST)
            if event.name and mask & (flags.CLOSE_WRITE | flags.MOVED_TO) and not mask & flags.ISDIR:
                changes.names.append(event.name)
        if changes.lost:
            self._identity = (0, 0)
        return changes

    def is_current(self) -> bool:
        """Tell whether the path still leads to the directory that is watched (a mount may cover it)."""
        try:
            status = os.stat(self._directory)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def rearm(self) -> None:
        """Watch what the path leads to now.

        Raises:
            OSError: as at the start; the old watch is gone then.
        """
        self._inotify.close()
        self._identity = (0, 0)
        self._inotify = INotify()
        self._arm()

    def _arm(self) -> None:
        self._inotify.add_watch(self._directory, _EVENTS)
        status = os.stat(self._directory)
        self._identity = (status.st_dev, status.st_ino)

    def close(self) -> None:
        """Stop watching."""
        self._inotify.close()

    def __enter__(self) -> Self:
        """Watch within a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()

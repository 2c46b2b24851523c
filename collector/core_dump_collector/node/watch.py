"""Owns inotify: tells which names are complete, and when events were lost.

The only importer of inotify_simple. Two events matter: `IN_MOVED_TO` (the helper renames a finished dump
into place) and `IN_CLOSE_WRITE` (a writer of a raw core is done). See inotify(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from inotify_simple import INotify, flags

if TYPE_CHECKING:
    from types import TracebackType

_COMPLETE = int(flags.CLOSE_WRITE | flags.MOVED_TO)
_LOST = int(flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT | flags.IGNORED)
_EVENTS = int(_COMPLETE | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR)
_OVERFLOW = int(flags.Q_OVERFLOW)
_DIRECTORY = int(flags.ISDIR)
_NOBODY = (0, 0)


@dataclass(slots=True)
class Changes:
    """The result of one read of the inotify descriptor."""

    names: list[str] = field(default_factory=list)
    overflow: bool = False
    """The kernel dropped events: only a scan tells what is there."""
    lost: bool = False
    """The directory was deleted, moved or unmounted, or inotify failed: arm again."""


class Watch:
    """An inotify watch on the directory that a path leads to; it follows the path, not the inode."""

    def __init__(self, directory: str) -> None:
        """Prepare; `arm` starts to watch."""
        self._directory = directory
        self._identity = _NOBODY
        self._inotify: INotify | None = None

    @property
    def is_armed(self) -> bool:
        """Tell whether inotify is in use."""
        return self._inotify is not None

    def arm(self) -> None:
        """Watch the directory that the path leads to now.

        Raises:
            OSError: the path leads to no directory, or inotify cannot be had (see `advice`).
        """
        self.close()
        status = os.stat(self._directory)  # before the watch: a directory that replaces this one is noticed
        inotify = INotify()
        try:
            inotify.add_watch(self._directory, _EVENTS)
        except BaseException:
            inotify.close()
            raise
        self._inotify = inotify
        self._identity = (status.st_dev, status.st_ino)

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 while inotify is not in use."""
        return int(self._inotify.fileno()) if self._inotify is not None else -1

    def read(self) -> Changes:
        """Return what changed, without waiting. Whatever the kernel sends or refuses is a result."""
        changes = Changes()
        try:
            events = list(self._inotify.read(timeout=0)) if self._inotify is not None else []
        except (OSError, ValueError):  # ValueError: somebody closed the descriptor
            events = []
            changes.lost = True
        for event in events:
            changes.overflow |= bool(event.mask & _OVERFLOW)
            changes.lost |= bool(event.mask & _LOST)
            if event.name and event.mask & _COMPLETE and not event.mask & _DIRECTORY:
                changes.names.append(event.name)
        if changes.lost:
            self._identity = _NOBODY
        return changes

    def is_current(self) -> bool:
        """Tell whether the path still leads to the directory that is watched; a mount may cover it."""
        try:
            status = os.stat(self._directory)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def close(self) -> None:
        """Stop watching."""
        self._identity = _NOBODY
        if self._inotify is not None:
            with contextlib.suppress(OSError):
                self._inotify.close()
            self._inotify = None

    def __enter__(self) -> Self:
        """Watch within a block."""
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self.close()


def advice(error: OSError) -> str:
    """Return what makes inotify available again, for each limit of inotify(7), "/proc interfaces"."""
    match error.errno:
        case errno.EMFILE:
            return "raise fs.inotify.max_user_instances (sysctl), or this process's limit of open files"
        case errno.ENOSPC:
            return "raise fs.inotify.max_user_watches (sysctl)"
        case errno.ENFILE:
            return "raise fs.file-max (sysctl)"
        case errno.ENOMEM:
            return "the kernel has no memory for it"
    return "inotify is not available to this process"

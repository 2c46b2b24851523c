"""Owns reading the watch directory: at start, after lost events, and every SCAN_SECONDS.

Events are hints; the disk is the queue, so only a scan is complete.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from core_dump_collector.node.ownership import is_roots_alone, is_trusted
from core_dump_format.attributes import ATTRIBUTE_PREFIX
from core_dump_format.names import QUARANTINE, is_candidate, is_partial, unpartial

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_QUARANTINED = 10_000
_ORIGIN = ATTRIBUTE_PREFIX + "origin"


@dataclass(frozen=True, slots=True)
class WatchedFile:
    """One file of the directory that the collector may have to upload or salvage."""

    name: str
    size_bytes: int
    modified_ns: int
    """Modification time, Unix nanoseconds."""
    partial: bool
    """A `.partial`: the helper's, or one that it left behind."""
    owner: int
    """User id."""
    trusted: bool
    """Only root, or this user, can have made or changed it."""
    origin: bytes = b""
    """Origin of the crash, from the helper's attribute; empty if another user may have written that."""


def look(directory: str, name: str, *, patterns: tuple[str, ...]) -> WatchedFile | None:
    """Return the properties of a file without opening it; None if it is gone or not to be collected."""
    partial = is_partial(name)
    if not is_candidate(unpartial(name) if partial else name, patterns):
        return None
    try:
        status = os.lstat(os.path.join(directory, name))
    except OSError:
        return None
    trusted = is_trusted(status)
    origin = _origin(directory, name) if trusted and not partial else b""
    return WatchedFile(name, status.st_size, status.st_mtime_ns, partial, status.st_uid, trusted, origin)


def _origin(directory: str, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return os.getxattr(os.path.join(directory, name), _ORIGIN, follow_symlinks=False)
    return b""


def scan(directory: str, patterns: tuple[str, ...]) -> Iterator[WatchedFile]:
    """Yield every file that is to be collected, in the order of the directory.

    Raises:
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found = look(directory, entry.name, patterns=patterns)
                if found is not None:
                    yield found


def measure_quarantined(directory: str) -> tuple[int, int]:
    """Return the number of files in quarantine/, at most MOST_QUARANTINED, and their total size."""
    try:
        fd = os.open(
            os.path.join(directory, QUARANTINE),
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
        )
    except OSError:
        return 0, 0
    try:
        with os.scandir(fd) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in islice(entries, MOST_QUARANTINED)]
        return len(sizes), sum(sizes)
    except OSError:
        return 0, 0
    finally:
        os.close(fd)


def is_insecure(directory: str) -> bool:
    """Tell whether users other than root may put files into the directory."""
    return not is_roots_alone(os.stat(directory))

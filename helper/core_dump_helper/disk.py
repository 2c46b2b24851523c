"""Owns the limits of the watch directory's file system, before a dump and while it is written."""

from __future__ import annotations

import os

from core_dump_helper.settings import HALF
from core_dump_helper.system import Refused, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.records import Records
    from core_dump_helper.settings import Settings
    from core_dump_helper.usage import Usage

CHECK_BYTES = 32 << 20
MIN_INODES = 100
FULL_PERCENT = 5
"""Of the file system, beyond KEEP_FREE_PERCENT, are never filled with modules; below it, modules are removed."""
DISK_SHARE = 3
VITAL_SHARE = 1
"""Eighths of MAX_TOTAL_BYTES that vital parts may take in addition to it."""
REFUSAL_PATIENCE = 5
"""Before a dump is refused, the files are counted again if the last count is older than so many times what it took."""
IDLE_SECONDS, IDLE_PATIENCE = 10, 20
"""When nobody waits, a count is repeated after so long, and after so many times what it takes."""
HELD_COUNT_SECONDS, IDLE_COUNT_SECONDS = 1, 20
"""A count ends after so long while a crashed process waits, and while none does."""


class DiskLimits:
    """The limits of the watch directory's file system.

    An origin's dumps may hold DISK_SHARE times as much as is left for others: of an empty disk, the first may fill
    three quarters.
    """

    def __init__(
        self, directory: int, settings: Settings, origin: bytes = b"", records: Records | None = None
    ) -> None:
        """Store the watch directory, the limits, whose dump it is, and the state where the use of the disk is kept."""
        self._directory, self._settings, self._origin, self._records = directory, settings, origin, records
        self._keep_free_percent = settings.KEEP_FREE_PERCENT
        self._extra_share = 0
        self._usage: Usage | None = None
        self._own, self._added = 0, 0
        """Bytes of this dump, and how many of them are part of `_usage`."""

    def lower(self) -> None:
        """Apply the limits of vital parts: less has to stay free, and the dumps may take a little more."""
        settings = self._settings
        self._keep_free_percent = min(settings.VITAL_KEEP_FREE_PERCENT, settings.KEEP_FREE_PERCENT)
        self._extra_share = VITAL_SHARE

    def exceeded(self) -> str:
        """Return the reason that forbids more bytes, or an empty string; modules go before a dump does."""
        space = os.fstatvfs(self._directory)
        reason = self._exceeded(space)
        is_full = reason == "keep_free" or space.f_bavail * 100 < FULL_PERCENT * space.f_blocks
        if is_full and self._remove_modules():
            reason = self._exceeded(os.fstatvfs(self._directory))
        return reason

    def _remove_modules(self) -> bool:
        """Remove the files behind earlier crashes; return whether there were any."""
        try:
            from core_dump_helper.modules import remove_all

            return remove_all(self._directory)
        except (OSError, ImportError) as error:
            log("cannot remove modules: %s" % error)
            return False

    def _exceeded(self, space: os.statvfs_result) -> str:
        room = (space.f_bavail - self._keep_free_percent * space.f_blocks / 100) * space.f_frsize
        if room < 0:
            return "keep_free"
        used = (space.f_blocks - space.f_bfree) * space.f_frsize
        limit = self._max_total(space.f_blocks * space.f_frsize)
        if used <= DISK_SHARE * min(room, limit - used if limit else room):
            return ""  # even if everything on the disk were this origin's dumps
        usage = self._load_usage()
        reason = self._judge(usage, room, limit)
        if reason and usage.refresh(0, REFUSAL_PATIENCE, HELD_COUNT_SECONDS):
            self._added = self._own
            reason = self._judge(usage, room, limit)
        return reason

    def check(self) -> None:
        """Raise Refused if the disk has no room for another dump."""
        reason = self.exceeded()
        if not reason and self._lacks_inodes():
            self._remove_modules()
            reason = "inodes" if self._lacks_inodes() else ""
        if reason:
            raise Refused(reason, "the disk has no room for another dump of this origin")

    def _lacks_inodes(self) -> bool:
        space = os.fstatvfs(self._directory)
        return bool(space.f_files and space.f_favail < MIN_INODES)

    def has_room(self, size: int) -> bool:
        """Return whether there is room for so many bytes of something that matters less than dumps."""
        space = os.fstatvfs(self._directory)
        kept = (self._settings.KEEP_FREE_PERCENT + FULL_PERCENT) * space.f_blocks / 100
        return not self._lacks_inodes() and (space.f_bavail - kept) * space.f_frsize > size

    def grow(self, held: int) -> None:
        """Note that this dump holds so many bytes now."""
        self._own = held
        if self._usage and held != self._added:
            self._usage.add(self._origin, held - self._added)
            self._added = held

    def finish(self) -> None:
        """Prepare the use of the disk for the next crash, now that nobody waits."""
        if self._usage:
            self._usage.refresh(IDLE_SECONDS, IDLE_PATIENCE, IDLE_COUNT_SECONDS)

    def _load_usage(self) -> Usage:
        """Return the use of the disk; count it only if nothing is known."""
        if not self._usage:
            from core_dump_helper.usage import Usage

            self._usage = Usage(self._directory, self._records)
            if not self._usage.load():
                self._usage.count(HELD_COUNT_SECONDS, partial=True)
                self._added = self._own
            self.grow(self._own)
        return self._usage

    def _max_total(self, size: int) -> int:
        """Return MAX_TOTAL_BYTES of a file system of `size` bytes; 0 means no limit."""
        limit = self._settings.MAX_TOTAL_BYTES
        total = size // 2 if limit == HALF else int(limit)
        return total + total * self._extra_share // 8

    def _judge(self, usage: Usage, room: float, limit: int) -> str:
        left = limit - usage.total if limit else room
        if left < 0:
            return "max_total_bytes"
        if usage.origins.get(self._origin, 0) <= DISK_SHARE * min(room, left):
            return ""
        return "max_total_bytes" if left < room else "keep_free"


class DiskWatch:
    """Looks at the disk, and empties the page cache, each time that CHECK_BYTES of a dump were read."""

    def __init__(self, dump: int, limits: DiskLimits) -> None:
        """Store the dump's descriptor and the limits."""
        self._dump, self._limits, self._checked = dump, limits, 0

    def check(self, size: int) -> str:
        """Return the reason that forbids more bytes, or an empty string; `size` bytes were read so far."""
        if size - self._checked < CHECK_BYTES:
            return ""
        self._checked = size
        os.posix_fadvise(self._dump, 0, 0, os.POSIX_FADV_DONTNEED)
        self._limits.grow(os.fstat(self._dump).st_blocks * 512)
        return self._limits.exceeded()

    def finish(self) -> None:
        """Note the size of the dump."""
        self._limits.grow(os.fstat(self._dump).st_blocks * 512)
        self._limits.finish()

"""Owns the limits that are checked before a dump and while it is written: rate, disk, inodes, concurrency."""

from __future__ import annotations

import os
import time

from core_dump_helper.core import Memory
from core_dump_helper.records import Record, Records, open_state, workload_of
from core_dump_helper.system import Refused, lock, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.crash import Crash
    from core_dump_helper.settings import Settings

CHECK_BYTES = 32 << 20
MIN_INODES = 100
REFUSAL_SECONDS = 600
"""Window of the records of refusals other than `rate_limit`."""


class RateLimiter:
    """Keeps the first dumps of each workload in a window; the records only count what it decides."""

    def __init__(self, records: Records, rate: str) -> None:
        """Store `rate`, the setting RATE_LIMIT: dumps/seconds."""
        self._records = records
        dumps, _, seconds = rate.partition("/")
        self._dumps, self._seconds = int(dumps), int(seconds or "0")

    def allows(self, metadata: dict[str, bytes]) -> bool:
        """Count the dump and decide whether it is kept."""
        if not self._seconds:
            return True
        return update(self._records, Record(workload_of(metadata), "rate_limit", self._seconds), self._dumps)


class Slots:
    """Lets MAX_CONCURRENT helpers dump at one time."""

    def __init__(self, records: Records, count: int, memory: Memory) -> None:
        """Store how many slots there are (0 means no limit), and the memory that those who wait belong to."""
        self._records, self._count, self._memory = records, count, memory

    def acquire(self, deadline: float) -> bool:
        """Wait for a slot until `deadline` (monotonic); hold it until this process ends."""
        if not self._count:
            return True
        slots: list[int] = []
        try:
            slots.extend(self._records.open_file("slot-%d" % number) for number in range(self._count))
        except OSError as error:
            for descriptor in slots:
                os.close(descriptor)
            log("cannot use the slots in .helper: %s; MAX_CONCURRENT is off for this dump" % error.strerror)
            return True
        joined = False
        while time.monotonic() < deadline:
            if any(lock(descriptor, 0) for descriptor in slots):
                return True
            if not joined:  # hundreds may wait
                joined = True
                self._memory.join()
            time.sleep(0.01)
        return False


class DiskLimits:
    """The limits of the watch directory's file system."""

    def __init__(self, directory: int, settings: Settings) -> None:
        """Store the watch directory and the limits."""
        self._directory, self._settings = directory, settings

    def exceeded(self) -> str:
        """Return the reason that forbids more bytes, or an empty string."""
        space = os.fstatvfs(self._directory)
        if space.f_bavail * 100 < self._settings.KEEP_FREE_PERCENT * space.f_blocks:
            return "keep_free"
        limit = self._settings.MAX_TOTAL_BYTES
        return "max_total_bytes" if limit and self._held_bytes() > limit else ""

    def check(self) -> None:
        """Raise Refused if the disk has no room for another dump."""
        space = os.fstatvfs(self._directory)
        reason = self.exceeded()
        if not reason and space.f_files and space.f_favail < MIN_INODES:
            reason = "inodes"
        if reason:
            raise Refused(reason, "the disk has no room for another dump")

    def _held_bytes(self) -> int:
        held = 0
        for name in os.listdir(self._directory):
            try:
                held += os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:  # the collector has removed it
                pass
        return held


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
        return self._limits.exceeded()


def check_limits(
    crash: Crash, metadata: dict[str, bytes], directory: int, settings: Settings, deadline: float
) -> None:
    """Raise Refused if a limit forbids the dump, and count the refusal; wait for a slot until `deadline`."""
    try:
        records: Records | None = Records(open_state(directory))
    except OSError as error:
        log("cannot use .helper: %s; RATE_LIMIT and MAX_CONCURRENT are off for this dump" % error.strerror)
        records = None
    try:
        if settings.RESPECT_RLIMIT == "yes" and crash.rlimit == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        DiskLimits(directory, settings).check()
        if records and not RateLimiter(records, settings.RATE_LIMIT).allows(metadata):
            raise Refused("rate_limit", "RATE_LIMIT is reached for this executable, container and signal")
        if records and not Slots(records, settings.MAX_CONCURRENT, Memory(settings.CGROUP)).acquire(deadline):
            raise Refused("no_slot", "MAX_CONCURRENT other dumps were written all the time")
    except Refused as refused:
        if records and refused.reason != "rate_limit":
            update(records, Record(workload_of(metadata), refused.reason, REFUSAL_SECONDS), 0)
        raise


def update(records: Records, record: Record, max_kept: int) -> bool:
    """Count a dump; return whether it is kept. Without a usable record, every dump is kept that may be."""
    try:
        return records.update(record, max_kept)
    except (OSError, ValueError) as error:
        log("cannot count %s in .helper: %s" % (record.reason, error))
        return max_kept > 0

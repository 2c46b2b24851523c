"""Owns the limits that are checked before a dump and while it is written: rate, disk, inodes, concurrency.

Every limit is shared out among the origins of crashes (cgroup.origin_of): none of them can use up what others need.
"""

from __future__ import annotations

import fcntl
import os
import time

from core_dump_helper.core import Memory
from core_dump_helper.records import Record, Records, open_state
from core_dump_helper.settings import HALF
from core_dump_helper.system import Refused, lock, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.crash import Crash
    from core_dump_helper.settings import Settings
    from core_dump_helper.usage import Usage

CHECK_BYTES = 32 << 20
MIN_INODES = 100
FULL_PERCENT = 5
"""Of the file system, beyond KEEP_FREE_PERCENT, are never filled with modules; below it, modules are removed."""
DISK_SHARE = 3
REFUSAL_PATIENCE = 5
"""Before a dump is refused, the files are counted again if the last count is older than so many times what it took."""
IDLE_SECONDS, IDLE_PATIENCE = 10, 20
HELD_COUNT_SECONDS, IDLE_COUNT_SECONDS = 1, 20
"""A count ends after so long while a crashed process waits, and while none does."""
"""When nobody waits, a count is repeated after so long, and after so many times what it takes."""
REFUSAL_SECONDS = 600
"""Window of the records of refusals other than `rate_limit`."""
ORIGIN_BYTES = 256
POLL_SECONDS, LATER_POLL_SECONDS = 0.02, 0.1
"""Between two looks at the slots, in the first second and after it: hundreds may wait."""


class RateLimiter:
    """Keeps the first dumps of each workload in a window; the records only count what it decides."""

    def __init__(self, records: Records, rate: str) -> None:
        """Store `rate`, the setting RATE_LIMIT: dumps/seconds."""
        self._records = records
        dumps, _, seconds = rate.partition("/")
        self._dumps, self._seconds = int(dumps), int(seconds or "0")
        self._record: Record | None = None

    def check(self, metadata: dict[str, bytes]) -> None:
        """Count the dump; raise Refused if the window has had all its dumps. Without a record, keep it."""
        if not self._seconds:
            return
        record = self._record = Record(metadata, "rate_limit", self._seconds)
        try:
            kept = self._records.update(record, self._dumps)
        except (OSError, ValueError) as error:
            log("cannot count rate_limit in .helper: %s; RATE_LIMIT is off for this dump" % error)
            return
        if not kept:
            repeated = record.suppressed > 1
            raise Refused(
                "rate_limit", "RATE_LIMIT is reached for this executable, container and signal", repeated
            )

    def take_back(self) -> None:
        """Uncount the dump, because it cannot be taken."""
        try:
            if self._record:
                self._records.take_back(self._record)
        except (OSError, ValueError) as error:
            log("cannot count rate_limit in .helper: %s" % error)


class Slots:
    """Lets MAX_CONCURRENT helpers dump at one time, in files whose locks end with the process.

    An origin may hold as many slots as it leaves free: of 8, the first may hold 4, the next 2. Its further dumps wait
    for its own, while another origin's first dump finds a free slot.
    """

    def __init__(
        self, records: Records, count: int, origin: bytes, memory: Memory, name: str = "slot"
    ) -> None:
        """Store how many slots there are (0 means no limit), who asks, and the memory that those who wait belong to."""
        self._name = name
        self._records, self._count, self._memory = records, count, memory
        self._origin = origin[:ORIGIN_BYTES].ljust(ORIGIN_BYTES)
        self._slots: list[int] = []

    def acquire(self, deadline: float) -> bool:
        """Wait for a slot until `deadline` (monotonic); hold it until this process ends."""
        if not self._count:
            return True
        try:
            guard = self._records.open_file(self._name + "s")
            self._slots.append(guard)
            self._slots.extend(
                self._records.open_file("%s-%d" % (self._name, number)) for number in range(self._count)
            )
        except OSError as error:
            for descriptor in self._slots:
                os.close(descriptor)
            log("cannot use the slots in .helper: %s; MAX_CONCURRENT is off for this dump" % error.strerror)
            return True
        if self._try(guard):
            return True
        self._memory.join()  # hundreds may wait
        later = time.monotonic() + 1
        while time.monotonic() < deadline:
            if self._try(guard):
                return True
            time.sleep(POLL_SECONDS if time.monotonic() < later else LATER_POLL_SECONDS)
        return False

    def _try(self, guard: int) -> bool:
        """Take a slot if the origin holds fewer than are free."""
        if not lock(guard, POLL_SECONDS):
            return False
        try:
            free = [slot for slot in self._slots[1:] if lock(slot, 0)]
            held = [slot for slot in self._slots[1:] if slot not in free]
            own = sum(os.pread(slot, ORIGIN_BYTES, 0) == self._origin for slot in held)
            kept = free[:1] if own < len(free) else []
            for slot in free[len(kept) :]:
                fcntl.flock(slot, fcntl.LOCK_UN)
            for slot in kept:
                self._sign(slot)
            return bool(kept)
        finally:
            fcntl.flock(guard, fcntl.LOCK_UN)

    def _sign(self, slot: int) -> None:
        try:
            os.pwrite(slot, self._origin, 0)
        except OSError:  # a full disk: the dump matters more than the share
            pass


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
        self._usage: Usage | None = None
        self._own, self._added = 0, 0
        """Bytes of this dump, and how many of them are part of `_usage`."""

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
        room = (space.f_bavail - self._settings.KEEP_FREE_PERCENT * space.f_blocks / 100) * space.f_frsize
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
        return size // 2 if limit == HALF else int(limit)

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


class Limits:
    """The limits for one crash, and the record of what they refuse."""

    def __init__(self, crash: Crash, metadata: dict[str, bytes], directory: int, settings: Settings) -> None:
        """Store the crash, the watch directory and the settings."""
        self._crash, self._metadata, self._settings = crash, metadata, settings
        self._directory = directory
        self._origin = metadata.get("origin", b"")
        self._records: Records | None = None
        self.disk = DiskLimits(directory, settings, self._origin)

    def open(self) -> None:
        """Open the state, without which there is neither rate limit nor slot."""
        try:
            self._records = Records(open_state(self._directory))
            self.disk = DiskLimits(self._directory, self._settings, self._origin, self._records)
        except OSError as error:
            log(
                "cannot use .helper: %s; RATE_LIMIT and MAX_CONCURRENT are off for this dump" % error.strerror
            )

    def close(self) -> None:
        """Prepare the state for the next crash."""
        if not self._records:
            return
        try:
            self._records.prepare()
        except OSError as error:
            log("cannot prepare .helper for a full disk: %s" % error)

    def check(self, deadline: float) -> None:
        """Raise Refused if a limit forbids the dump; wait for a slot until `deadline` (monotonic)."""
        if self._crash.signal in self._settings.IGNORE_SIGNALS.replace(",", " ").split():
            raise Refused("ignored_signal", "IGNORE_SIGNALS names its signal")
        if self._settings.RESPECT_RLIMIT == "yes" and self._crash.rlimit == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        self.disk.check()
        if not self._records:
            return
        rate = RateLimiter(self._records, self._settings.RATE_LIMIT)
        rate.check(self._metadata)
        slots = Slots(
            self._records, self._settings.MAX_CONCURRENT, self._origin, Memory(self._settings.CGROUP)
        )
        if not slots.acquire(deadline):
            rate.take_back()
            raise Refused("no_slot", "other dumps used the share of MAX_CONCURRENT all the time")

    def count(self, refused: Refused) -> None:
        """Record a refusal, so that the collector reports it; mark one that only repeats others of its window."""
        if not refused.reason or refused.reason == "rate_limit" or not self._records:
            return
        record = Record(self._metadata, refused.reason, REFUSAL_SECONDS)
        try:
            self._records.update(record, 0)
            refused.repeated = record.suppressed > 1
        except (OSError, ValueError) as error:
            log("cannot count %s in .helper: %s" % (refused.reason, error))

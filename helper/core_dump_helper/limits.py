"""Owns the limits that are checked before a dump and while it is written: rate, disk, inodes, concurrency.

Every limit is shared out among the origins of crashes (cgroup.origin_of): none of them can use up what others need.
"""

from __future__ import annotations

import time

from core_dump_helper.core import Memory
from core_dump_helper.disk import DiskLimits
from core_dump_helper.records import Record, Records, open_state
from core_dump_helper.settings import parse_rate
from core_dump_helper.slots import Slots
from core_dump_helper.system import Refused, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_helper.crash import Crash
    from core_dump_helper.settings import Settings

VITAL_REASONS = ("rate_limit", "keep_free", "max_total_bytes", "no_slot")
"""Limits that leave a crash its vital part."""
VITAL_SLOTS, VITAL_SLOT = 4, "vital-slot"
SLOT_SECONDS = 0.5
"""A crash that gets no slot in this time keeps its vital part, if that is allowed; small dumps need less."""
LEAST_SLOT_SECONDS = 0.1
"""It tries for so long even if it was slow to come here: other helpers hold the guard of free slots for moments."""
OPEN_SECONDS = 10
"""For which a crash that waits for a slot keeps its files open."""
RESERVED_SECONDS = 10
"""A crash that a limit refuses waits no longer for a reserved slot; each is held for a fraction of a second."""
REFUSAL_SECONDS = 600
"""Window of the records of refusals other than `rate_limit`."""


class RateLimiter:
    """Keeps the first dumps of each workload in a window; the records only count what it decides."""

    def __init__(self, records: Records, rate: str) -> None:
        """Store `rate`, the setting RATE_LIMIT: dumps/seconds."""
        self._records = records
        self._dumps, self._seconds = parse_rate(rate)
        self.record: Record | None = None

    def check(self, metadata: dict[str, bytes]) -> None:
        """Count the dump; raise Refused if the window has had all its dumps. Without a record, keep it."""
        if not self._seconds:
            return
        record = self.record = Record(metadata, "rate_limit", self._seconds)
        try:
            kept = self._records.update(record, self._dumps)
        except (OSError, ValueError) as error:
            log("cannot count rate_limit in .helper: %s; RATE_LIMIT is off for this dump" % error)
            return
        if not kept:
            repeated = record.is_repeated()
            raise Refused(
                "rate_limit", "RATE_LIMIT is reached for this executable, container and signal", repeated
            )

    def add_vital(self, count: int) -> None:
        """Count that the vital part of the refused dump is kept (1), or is not after all (-1)."""
        try:
            if self.record:
                self._records.add_vital(self.record, count)
        except (OSError, ValueError) as error:
            log("cannot count rate_limit in .helper: %s" % error)

    def take_back(self) -> None:
        """Uncount the dump, because it cannot be taken."""
        try:
            if self.record:
                self._records.take_back(self.record)
        except (OSError, ValueError) as error:
            log("cannot count rate_limit in .helper: %s" % error)


class Limits:
    """The limits for one crash, and the record of what they refuse."""

    def __init__(
        self,
        crash: Crash,
        metadata: dict[str, bytes],
        directory: int,
        settings: Settings,
        may_read_memory: bool = False,
    ) -> None:
        """Store the crash, the watch directory, the settings, and whether a vital part can be read."""
        self._crash, self._metadata, self._settings = crash, metadata, settings
        self._directory, self._may_read_memory = directory, may_read_memory
        self._memory = Memory(settings)
        self._vital = ""
        """The limit that leaves only the vital part."""
        self._rate: RateLimiter | None = None
        """It has counted the dump as refused, and as one whose vital part is kept."""
        self._origin = metadata.get("origin", b"")
        self._records: Records | None = None
        self._slots: list[Slots] = []
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

    def check(self, deadline: float, close_files: Callable[[], None]) -> str:
        """Return the limit that leaves only the vital part of the dump, or an empty string; wait for a slot.

        Args:
            deadline: when to stop waiting, monotonic.
            close_files: called when the wait gets long.

        Raises:
            Refused: a limit forbids the dump.
        """
        if self._crash.signal in self._settings.IGNORE_SIGNALS.replace(",", " ").split():
            raise Refused("ignored_signal", "IGNORE_SIGNALS names its signal")
        if self._settings.RESPECT_RLIMIT == "yes" and self._crash.rlimit == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        records = self._records
        rate = RateLimiter(records, self._settings.RATE_LIMIT) if records else None
        try:
            self.disk.check()
            if rate:
                rate.check(self._metadata)
        except Refused as refused:
            disk = self._vital_disk(refused.reason, records) if records else None
            patient = min(deadline, time.monotonic() + RESERVED_SECONDS)
            if not records or not disk:
                raise
            if not self._reserved(records).acquire(patient):
                self._give_back(records)
                raise
            self._vital, self.disk = refused.reason, disk
            if rate and rate.record:
                rate.add_vital(1)
                self._rate = rate
            return refused.reason
        return self._wait(records, rate, deadline, close_files) if records and rate else ""

    def _wait(
        self, records: Records, rate: RateLimiter, deadline: float, close_files: Callable[[], None]
    ) -> str:
        """Wait for a slot; return `no_slot` if it is one that is reserved for vital parts, else an empty string."""
        slots = Slots(records, self._settings.MAX_CONCURRENT, self._origin, self._memory)
        self._slots = [slots]
        begun = deadline - self._settings.DEADLINE_SECONDS
        waited_until = max(begun + SLOT_SECONDS, time.monotonic() + LEAST_SLOT_SECONDS)
        if slots.acquire(min(deadline, waited_until)):
            return ""
        disk = self._vital_disk("no_slot", records)
        reserved = self._reserved(records) if disk else None
        has_slot = slots.acquire(min(deadline, time.monotonic() + OPEN_SECONDS), reserved)
        if not has_slot and not (reserved and reserved.is_held):
            close_files()
            has_slot = slots.acquire(deadline, reserved)
        if disk and reserved and reserved.is_held:
            rate.take_back()
            self._vital, self.disk = "no_slot", disk
            return "no_slot"
        if disk:
            self._give_back(records)
        if has_slot:
            return ""
        rate.take_back()
        raise Refused("no_slot", "other dumps used the share of MAX_CONCURRENT all the time")

    def _reserved(self, records: Records) -> Slots:
        self._slots.append(Slots(records, VITAL_SLOTS, self._origin, self._memory, VITAL_SLOT))
        return self._slots[-1]

    def release_slots(self) -> None:
        """Let another dump begin: this one only waits for the disk, which syncs several files at the price of one."""
        for slots in self._slots:
            slots.release()

    def _vital_disk(self, reason: str, records: Records) -> DiskLimits | None:
        """Return the limits of the disk for the vital part of a crash beyond this limit; None if it is not kept."""
        if reason not in VITAL_REASONS or self._settings.VITAL_LIMIT == "0" or not self._may_read_memory:
            return None
        disk = DiskLimits(self._directory, self._settings, self._origin, records)
        disk.lower()
        if disk.exceeded():
            return None
        from core_dump_helper.allowance import Allowance

        if not Allowance(records, self._settings.VITAL_LIMIT).take(self._origin):
            return None
        return disk

    def _give_back(self, records: Records) -> None:
        """Return the allowance that `_vital_disk` took: this crash leaves no vital part."""
        from core_dump_helper.allowance import Allowance

        Allowance(records, self._settings.VITAL_LIMIT).give_back(self._origin)

    def count_vital(self, is_trimmed: bool) -> None:
        """Record that the vital part of a crash was kept beyond a limit; of a core that is whole, nothing was lost."""
        if not self._vital or not self._records or self._rate or not is_trimmed:
            return
        try:
            self._records.update(Record(self._metadata, self._vital, REFUSAL_SECONDS), 0, vital=1)
        except (OSError, ValueError) as error:
            log("cannot count %s in .helper: %s" % (self._vital, error))

    def count(self, refused: Refused) -> None:
        """Record a refusal, so that the collector reports it; mark one that only repeats others of its window."""
        if self._rate:
            self._rate.add_vital(-1)
        if not refused.reason or refused.reason == "rate_limit" or not self._records:
            return
        record = Record(self._metadata, refused.reason, REFUSAL_SECONDS)
        try:
            self._records.update(record, 0)
            refused.repeated = record.is_repeated()
        except (OSError, ValueError) as error:
            log("cannot count %s in .helper: %s" % (refused.reason, error))

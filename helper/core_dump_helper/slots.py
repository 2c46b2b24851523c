"""Owns the slots: how many helpers dump at one time, shared out among the origins of crashes."""

from __future__ import annotations

import fcntl
import os
import time

from core_dump_helper.system import lock, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.core import Memory
    from core_dump_helper.records import Records

ORIGIN_BYTES = 256
POLL_SECONDS, LATER_POLL_SECONDS = 0.02, 0.1
"""Between two looks at the slots, in the first second and after it: hundreds may wait."""


class Slots:
    """Lets MAX_CONCURRENT helpers dump at one time, in files whose locks end with the process.

    An origin may hold as many slots as it leaves free: of 8, the first may hold 4, the next 2. Its further dumps wait
    for its own, while another origin's first dump finds a free slot.
    """

    def __init__(
        self, records: Records, count: int, origin: bytes, memory: Memory, name: str = "slot"
    ) -> None:
        """Store how many slots there are (0 means no limit), who asks, and the memory that those who wait belong to.

        Their files are `NAME-0`, `NAME-1` and so on.
        """
        self._records, self._count, self._memory = records, count, memory
        self._origin = origin[:ORIGIN_BYTES].ljust(ORIGIN_BYTES)
        self._name = name
        self._slots: list[int] = []
        self.is_held = False
        """Whether one of these slots was taken instead of another one."""

    def acquire(self, deadline: float, reserved: Slots | None = None) -> bool:
        """Wait for a slot until `deadline` (monotonic); hold it until this process ends.

        Args:
            deadline: when to give up.
            reserved: other slots, of which one may be taken instead.

        Returns:
            Whether a slot of its own was taken.
        """
        if self.take():
            return True
        if time.monotonic() >= deadline:
            return False
        self._memory.join()  # hundreds may wait
        later = time.monotonic() + 1
        while time.monotonic() < deadline:
            if self.take():
                return True
            if reserved and reserved.take():
                reserved.is_held = True
                return False
            time.sleep(POLL_SECONDS if time.monotonic() < later else LATER_POLL_SECONDS)
        return False

    def take(self) -> bool:
        """Take a slot; return True as well if there is no limit, or if it cannot be kept."""
        if self._count and not self._slots:
            try:
                self._slots.append(self._records.open_file(self._name + "s"))
                names = ("%s-%d" % (self._name, number) for number in range(self._count))
                self._slots.extend(self._records.open_file(name) for name in names)
            except OSError as error:
                self.release()
                self._count = 0
                log(
                    "cannot use the slots in .helper: %s; MAX_CONCURRENT is off for this dump"
                    % error.strerror
                )
        return not self._count or self._try(self._slots[0])

    def release(self) -> None:
        """Let go of the slot."""
        for descriptor in self._slots:
            os.close(descriptor)
        self._slots = []

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

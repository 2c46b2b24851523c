"""Owns how many refused dumps of each origin keep their vital part; imported only when a dump is refused.

The counts are in `.helper/vital-kept`: a line for each origin with a window that is not over.
"""

from __future__ import annotations

import os
import time

from core_dump_helper.settings import parse_rate
from core_dump_helper.system import lock, read_file, replace_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.records import Records

NAME = "vital-kept"
LOCK_SECONDS = 2
MAX_ORIGINS = 500
"""Further origins share one count."""
MAX_BYTES = 1 << 16
ORIGIN_BYTES = 10


class Allowance:
    """The counts of all origins."""

    def __init__(self, records: Records, rate: str) -> None:
        """Store the state and `rate`, the setting VITAL_LIMIT: dumps/seconds, or 0."""
        self._records = records
        self._dumps, self._seconds = parse_rate(rate)

    def take(self, origin: bytes) -> bool:
        """Count one for an origin; return False if its window is used up, or the count cannot be stored."""
        return self._change(origin, 1)

    def give_back(self, origin: bytes) -> None:
        """Uncount one that was not needed."""
        self._change(origin, -1)

    def _change(self, origin: bytes, count: int) -> bool:
        if not self._seconds or not self._dumps:
            return False
        try:
            guard = self._records.open_file(NAME + ".lock")
            try:
                return lock(guard, LOCK_SECONDS) and self._count(origin, count)
            finally:
                os.close(guard)
        except (OSError, ValueError):
            return False

    def _count(self, origin: bytes, count: int) -> bool:
        from _blake2 import blake2b

        now = int(time.time())
        counts = self._load(now)
        name = blake2b(origin, digest_size=ORIGIN_BYTES).hexdigest().encode()
        if name not in counts and len(counts) >= MAX_ORIGINS:
            name = b"*"
        first, taken = counts.get(name, (now, 0))
        if not 0 <= taken + count <= self._dumps:
            return False
        counts[name] = first, taken + count
        text = b"".join(b"%s %d %d\n" % (name, *count) for name, count in counts.items())
        replace_file(NAME, text, self._records.directory)
        return True

    def _load(self, now: int) -> dict[bytes, tuple[int, int]]:
        """Return first second and count of each window that is not over."""
        try:
            lines = read_file(NAME, MAX_BYTES, self._records.directory).splitlines()
        except FileNotFoundError:
            return {}
        rows = [line.split() for line in lines]
        counts = {name: (int(first), int(taken)) for name, first, taken in rows}
        return {name: count for name, count in counts.items() if 0 <= now - count[0] < self._seconds}

"""Owns the order of the uploads: waiting files, files in flight, pauses. A pure state machine, no clock, no I/O.

The disk is the queue; this is a bounded view of it. Small dumps go before large ones, new ones before old ones, files
not tried yet before files that failed. Each owner of files gets its turn, and every fourth turn of an owner goes to
the file that has waited longest, so that nothing starves. When the backlog is full, a file that failed gives way to
one that was not tried. A scan finds the files again that were turned away.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from core_dump_collector.jobs import Sighting, Undeleted
from core_dump_collector.lanes import OTHERS_TURN, TRIED, UNTRIED, Lane, SizeClass

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY = 20_000
FIRST_PAUSE_SECONDS = 1.0
OPERATOR_PAUSE_SECONDS = 30.0
BUSY_PAUSE_SECONDS = 61.0
"""Longest pause between two looks at a file that is being written: longer than dumpfile.QUIET_SECONDS."""
GIVE_WAY_PAUSE_SECONDS = 30.0
"""Between two scans for names in whose favour failed ones give way."""
LIGHT_BYTES = 4 * 1024 * 1024
"""A dump up to this size is small: it needs one request and little memory."""
_MOST_OWNERS = 1024
"""Owners beyond share turns; root never does."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may wait in the backlog."""

    name: str
    size_bytes: int = 0
    modified_ns: int = 0
    """Modification time, Unix nanoseconds."""
    owner: int = 0
    """User id."""
    new: bool = False
    """It was just written: it goes before others of its owner."""
    origin: bytes = b""
    """Origin of the crash, empty unless only root can have written it: origins are the owners of root's files."""


@dataclass(slots=True)
class _Entry:
    owner: int
    size_bytes: int
    modified_ns: int
    seen_at: float
    """Monotonic seconds, as `unchanged_since`; a file that replaced another under its name is seen when it came."""
    unchanged_since: float
    lane: Lane = Lane.OLD
    attempts: int = 0
    busy: int = 0
    """Consecutive looks that found a writer."""
    seen_again: bool = False
    undeleted: Undeleted | None = None
    ticket: int = 0
    """Number of its valid place in the heap of pauses; older places are skipped."""


@dataclass(slots=True)
class Backlog:
    """Files to upload, each at most once in flight.

    Args:
        longest_pause_seconds: cap of the exponential backoff.
        capacity: names held at most.
        jitter: returns a factor in [0.5, 1.0); replaced in tests.
    """

    longest_pause_seconds: float = 300.0
    capacity: int = CAPACITY
    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.5, 1.0))  # noqa: S311  spread, no secret
    turned_away: bool = False
    """Some name was turned away since this was last set to False."""
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _light: SizeClass = field(default_factory=SizeClass)
    _heavy: SizeClass = field(default_factory=SizeClass)
    _turns: int = 0
    _holdings: Counter[int] = field(default_factory=Counter)
    """How many names each owner has."""
    _pauses: list[tuple[float, int, str]] = field(default_factory=list)
    _tickets: count[int] = field(default_factory=count)
    _in_lane: list[int] = field(default_factory=lambda: [0] * len(Lane))
    _bytes: int = 0

    def add(self, file: Candidate, now: float) -> bool:
        """Note that a file is there; return False if it was turned away because the backlog is full.

        A file in flight is looked at again after its result, whatever that is. A file that failed keeps its pause;
        one that was busy is due if it is reported as new.
        """
        entry = self._entries.get(file.name)
        if entry is None:
            return self._add_unknown(file, now)
        if (entry.size_bytes, entry.modified_ns) != (file.size_bytes, file.modified_ns):
            self._resize(file, entry)
            entry.seen_at = entry.unchanged_since = now
        if entry.lane is Lane.IN_FLIGHT:
            entry.seen_again = True
        elif entry.lane is Lane.PAUSED and entry.busy and file.new:
            self._move(file.name, entry, Lane.NEW)
        return True

    def _resize(self, file: Candidate, entry: _Entry) -> None:
        self._bytes += file.size_bytes - entry.size_bytes
        self._drop(file.name, entry)
        entry.size_bytes, entry.modified_ns = file.size_bytes, file.modified_ns
        self._put(file.name, entry, entry.lane)

    def _add_unknown(self, file: Candidate, now: float) -> bool:
        owner = _bucket(file)
        if len(self._entries) >= self.capacity and not self._make_room(owner, new=file.new):
            self.turned_away = True
            return False
        entry = self._entries[file.name] = _Entry(owner, file.size_bytes, file.modified_ns, now, now)
        self._bytes += entry.size_bytes
        self._holdings[owner] += 1
        self._put(file.name, entry, Lane.NEW if file.new else Lane.OLD)
        return True

    def take(self, now: float, *, light: bool = True, heavy: bool = True) -> str | None:
        """Return the next name that is due and mark it in flight, or None.

        Args:
            now: monotonic seconds.
            light: a small file can be taken.
            heavy: a large one can.
        """
        self._end_pauses(now)
        ready = self._ready(light=light, heavy=heavy)
        if not ready:
            return None
        self._turns += 1
        name = ready[0 if self._turns % OTHERS_TURN else -1].take()
        self._move(name, self._entries[name], Lane.IN_FLIGHT)
        return name

    def finish(self, name: str, *, gone: bool = False) -> None:
        """Remove a finished name; requeue it if it was seen again in the meantime and still exists."""
        entry = self._end_flight(name)
        if entry.seen_again and not gone:
            entry.seen_again = False
            entry.attempts = entry.busy = 0
            self._move(name, entry, Lane.NEW)
        else:
            self._remove(name)

    def retry(
        self, name: str, now: float, *, needs_operator: bool = False, undeleted: Undeleted | None = None
    ) -> float:
        """Let a failed name wait for its next attempt; return the pause in seconds."""
        entry = self._end_flight(name)
        entry.undeleted = undeleted or entry.undeleted
        entry.seen_again = False
        first = OPERATOR_PAUSE_SECONDS if needs_operator else FIRST_PAUSE_SECONDS
        pause: float = min(first * 2.0 ** min(entry.attempts, 32), self.longest_pause_seconds) * self.jitter()
        entry.attempts += 1
        self._pause(name, entry, now + pause)
        return pause

    def postpone(self, name: str, now: float) -> None:
        """Look again later at a file that is being written; `add` with `new` ends the pause."""
        entry = self._end_flight(name)
        entry.busy += 1
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(entry.busy - 1, 32), BUSY_PAUSE_SECONDS)
        self._pause(name, entry, now if entry.seen_again else now + pause)
        entry.seen_again = False

    def next_due(self, *, light: bool = True, heavy: bool = True) -> float | None:
        """Return when the next waiting name is due, 0 for one that is due already, or None when nothing waits."""
        if self._ready(light=light, heavy=heavy):
            return 0.0
        self._skip_stale()
        return self._pauses[0][0] if self._pauses else None

    def sighting(self, name: str, now: float) -> Sighting:
        """Return the properties of a file as the loop has seen them."""
        entry = self._entries[name]
        unchanged_seconds = now - entry.unchanged_since
        return Sighting(entry.size_bytes, entry.modified_ns, unchanged_seconds, entry.undeleted)

    def take_expired(self, now: float, age_seconds: float, *, most: int, untried: bool) -> list[str]:
        """Mark in flight, and return, at most so many names that failed and have been known for so long.

        Args:
            now: monotonic seconds.
            age_seconds: of names to return.
            most: number of names to return.
            untried: return names that were not tried as well: nothing could be uploaded for as long.
        """
        expired = [
            name
            for name, entry in self._entries.items()
            if entry.lane is not Lane.IN_FLIGHT
            and now - entry.seen_at >= age_seconds
            and (untried or entry.attempts)
        ][:most]
        for name in expired:
            self._move(name, self._entries[name], Lane.IN_FLIGHT)
        return expired

    def oldest_seconds(self, wall_clock: float) -> float:
        """Return the age of the oldest file, in seconds, 0 when empty."""
        oldest = min((e.modified_ns / 1e9 for e in self._entries.values()), default=wall_clock)
        return max(0.0, wall_clock - oldest)

    def is_in_flight(self, name: str) -> bool:
        """Tell whether a name is with a worker."""
        entry = self._entries.get(name)
        return entry is not None and entry.lane is Lane.IN_FLIGHT

    def scan_pause(self) -> float | None:
        """Return how long after the last scan to look for names that were turned away, or None if none were.

        At once if there is room; rarely if failed names would have to give way: each scan brings some back.
        """
        if not self.turned_away:
            return None
        if len(self._entries) < self.capacity // 2:
            return 0.0
        untried = sum(self._in_lane[lane] for lane in UNTRIED)
        return GIVE_WAY_PAUSE_SECONDS if untried < self.capacity // 2 else None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._entries) - self.in_flight

    @property
    def in_flight(self) -> int:
        """How many are with a worker."""
        return self._in_lane[Lane.IN_FLIGHT]

    @property
    def size_bytes(self) -> int:
        """Size of all files in it, as they were when last seen."""
        return self._bytes

    def __len__(self) -> int:
        """Count waiting and in flight."""
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        """Tell whether a name waits or is in flight."""
        return name in self._entries

    def _make_room(self, owner: int, *, new: bool) -> bool:
        """Remove a name in favour of one of this owner, if that is fair: a failed one, or one of the largest owner."""
        largest = max(self._holdings, key=lambda key: self._holdings[key])
        smaller = self._holdings[owner] + 1 < self._holdings[largest]
        lanes = [*TRIED, *([Lane.OLD] if new or smaller else []), *([Lane.NEW] if smaller else [])]
        for lane in [lane for lane in lanes if self._in_lane[lane]]:
            candidates = [largest] if lane in UNTRIED else [largest, *self._holdings]
            for candidate in candidates:
                for size in (self._heavy, self._light):
                    if names := size.names(candidate, lane):
                        self._remove(next(iter(names) if lane in TRIED else reversed(names)))
                        return True
        return False

    def _move(self, name: str, entry: _Entry, lane: Lane) -> None:
        """Put an entry into another lane of its owner."""
        self._drop(name, entry)
        self._put(name, entry, lane)

    def _put(self, name: str, entry: _Entry, lane: Lane) -> None:
        entry.lane = lane
        self._size_class(entry).add(entry.owner, lane, name, next(self._tickets))
        self._in_lane[lane] += 1

    def _drop(self, name: str, entry: _Entry) -> None:
        self._size_class(entry).remove(entry.owner, entry.lane, name)
        self._in_lane[entry.lane] -= 1

    def _ready(self, *, light: bool, heavy: bool) -> list[SizeClass]:
        """Return the wanted size classes in which a name is due, small files first."""
        return [
            size for size, wanted in ((self._light, light), (self._heavy, heavy)) if wanted and size.ready
        ]

    def _size_class(self, entry: _Entry) -> SizeClass:
        return self._heavy if entry.size_bytes > LIGHT_BYTES else self._light

    def _remove(self, name: str) -> None:
        entry = self._entries.pop(name)
        self._drop(name, entry)
        self._bytes -= entry.size_bytes
        self._holdings[entry.owner] -= 1
        if not self._holdings[entry.owner]:
            del self._holdings[entry.owner]

    def _pause(self, name: str, entry: _Entry, until: float) -> None:
        entry.ticket = next(self._tickets)
        heapq.heappush(self._pauses, (until, entry.ticket, name))
        self._move(name, entry, Lane.PAUSED)

    def _end_pauses(self, now: float) -> None:
        self._skip_stale()
        while self._pauses and self._pauses[0][0] <= now:
            name = heapq.heappop(self._pauses)[2]
            self._move(name, self._entries[name], Lane.AGAIN)
            self._skip_stale()

    def _skip_stale(self) -> None:
        while self._pauses:
            _, ticket, name = self._pauses[0]
            entry = self._entries.get(name)
            if entry is not None and entry.ticket == ticket and entry.lane is Lane.PAUSED:
                return
            heapq.heappop(self._pauses)

    def _end_flight(self, name: str) -> _Entry:
        entry = self._entries[name]
        if entry.lane is not Lane.IN_FLIGHT:
            raise ValueError(f"{name!r} is not in flight")
        return entry


def _bucket(file: Candidate) -> int:
    """Return the number of an owner; root's files have as many owners as there are origins, within bounds."""
    if file.owner:
        return 1 + file.owner % (_MOST_OWNERS - 1)
    return _MOST_OWNERS + zlib.crc32(file.origin) % _MOST_OWNERS if file.origin else 0

"""Owns the order of the uploads: waiting files, files in flight, pauses. A pure state machine, no clock, no I/O.

The disk is the queue; this is a bounded view of it. New dumps go before old ones, files not tried yet before files
that failed, and each owner of files gets its turn. When the backlog is full, a file that failed gives way to one that
was not tried. A scan finds the files again that were turned away.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING

from core_dump_collector.jobs import Sighting, Undeleted

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY = 20_000
FIRST_PAUSE_SECONDS = 1.0
OPERATOR_PAUSE_SECONDS = 30.0
BUSY_PAUSE_SECONDS = 61.0
"""Longest pause between two looks at a file that is being written: longer than dumpfile.QUIET_SECONDS."""
GIVE_WAY_PAUSE_SECONDS = 30.0
"""Between two scans for names in whose favour failed ones give way."""
OTHERS_TURN = 4
"""Every so many turns of an owner, its oldest failure goes first, so that new dumps never stop the others."""
_MOST_OWNERS = 1024
"""Owners beyond share turns; root never does."""


class _Lane(IntEnum):
    """Where an entry waits, in the order in which the lanes of an owner are served."""

    NEW = 0
    OLD = 1
    AGAIN = 2
    """A failed file whose pause is over."""
    PAUSED = 3
    IN_FLIGHT = 4


_READY = (_Lane.NEW, _Lane.OLD, _Lane.AGAIN)
_UNTRIED = (_Lane.NEW, _Lane.OLD)
_TRIED = (_Lane.PAUSED, _Lane.AGAIN)


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


@dataclass(slots=True)
class _Entry:
    owner: int
    size_bytes: int
    modified_ns: int
    seen_at: float
    """Monotonic seconds, as `unchanged_since`; a file that replaced another under its name is seen when it came."""
    unchanged_since: float
    lane: _Lane = _Lane.OLD
    attempts: int = 0
    busy: int = 0
    """Consecutive looks that found a writer."""
    seen_again: bool = False
    undeleted: Undeleted | None = None
    ticket: int = 0
    """Number of its valid place in the heap of pauses; older places are skipped."""


@dataclass(slots=True)
class _Owner:
    """The waiting names of one owner, by lane, oldest first."""

    lanes: tuple[OrderedDict[str, None], ...] = field(
        default_factory=lambda: tuple(OrderedDict() for _ in _Lane)
    )
    turns: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.lanes))

    @property
    def is_ready(self) -> bool:
        return any(self.lanes[lane] for lane in _READY)

    def take(self) -> str:
        self.turns += 1
        order = _READY if self.turns % OTHERS_TURN else _READY[::-1]
        lane = next(self.lanes[lane] for lane in order if self.lanes[lane])
        return next(iter(lane))


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
    _owners: dict[int, _Owner] = field(default_factory=dict)
    _ready: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Owners with a name that is due, next turn first."""
    _pauses: list[tuple[float, int, str]] = field(default_factory=list)
    _tickets: count[int] = field(default_factory=count)
    _in_lane: list[int] = field(default_factory=lambda: [0] * len(_Lane))
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
            self._bytes += file.size_bytes - entry.size_bytes
            entry.size_bytes, entry.modified_ns = file.size_bytes, file.modified_ns
            entry.seen_at = entry.unchanged_since = now
        if entry.lane is _Lane.IN_FLIGHT:
            entry.seen_again = True
        elif entry.lane is _Lane.PAUSED and entry.busy and file.new:
            self._move(file.name, entry, _Lane.NEW)
        return True

    def _add_unknown(self, file: Candidate, now: float) -> bool:
        owner = _bucket(file.owner)
        if len(self._entries) >= self.capacity and not self._make_room(owner, new=file.new):
            self.turned_away = True
            return False
        entry = self._entries[file.name] = _Entry(owner, file.size_bytes, file.modified_ns, now, now)
        self._bytes += entry.size_bytes
        self._in_lane[entry.lane] += 1
        self._move(file.name, entry, _Lane.NEW if file.new else _Lane.OLD)
        return True

    def take(self, now: float) -> str | None:
        """Return the next name that is due and mark it in flight, or None."""
        self._end_pauses(now)
        if not self._ready:
            return None
        owner, _ = self._ready.popitem(last=False)
        name = self._owners[owner].take()
        self._move(name, self._entries[name], _Lane.IN_FLIGHT)
        return name

    def finish(self, name: str, *, gone: bool = False) -> None:
        """Remove a finished name; requeue it if it was seen again in the meantime and still exists."""
        entry = self._end_flight(name)
        if entry.seen_again and not gone:
            entry.seen_again = False
            entry.attempts = entry.busy = 0
            self._move(name, entry, _Lane.NEW)
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

    def next_due(self) -> float | None:
        """Return when the next waiting name is due, 0 for one that is due already, or None when nothing waits."""
        if self._ready:
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
            if entry.lane is not _Lane.IN_FLIGHT
            and now - entry.seen_at >= age_seconds
            and (untried or entry.attempts)
        ][:most]
        for name in expired:
            self._move(name, self._entries[name], _Lane.IN_FLIGHT)
        return expired

    def oldest_seconds(self, wall_clock: float) -> float:
        """Return the age of the oldest file, in seconds, 0 when empty."""
        oldest = min((e.modified_ns / 1e9 for e in self._entries.values()), default=wall_clock)
        return max(0.0, wall_clock - oldest)

    def is_in_flight(self, name: str) -> bool:
        """Tell whether a name is with a worker."""
        entry = self._entries.get(name)
        return entry is not None and entry.lane is _Lane.IN_FLIGHT

    def scan_pause(self) -> float | None:
        """Return how long after the last scan to look for names that were turned away, or None if none were.

        At once if there is room; rarely if failed names would have to give way: each scan brings some back.
        """
        if not self.turned_away:
            return None
        if len(self._entries) < self.capacity // 2:
            return 0.0
        untried = sum(self._in_lane[lane] for lane in _UNTRIED)
        return GIVE_WAY_PAUSE_SECONDS if untried < self.capacity // 2 else None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._entries) - self.in_flight

    @property
    def in_flight(self) -> int:
        """How many are with a worker."""
        return self._in_lane[_Lane.IN_FLIGHT]

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
        largest = max(self._owners, key=lambda key: len(self._owners[key]))
        holdings = len(self._owners[owner]) if owner in self._owners else 0
        smaller = holdings + 1 < len(self._owners[largest])
        lanes = [*_TRIED, *([_Lane.OLD] if new or smaller else []), *([_Lane.NEW] if smaller else [])]
        for lane in lanes:
            candidates = [largest] if lane in _UNTRIED else [largest, *self._owners]
            for candidate in candidates:
                if names := self._owners[candidate].lanes[lane]:
                    self._remove(next(iter(names) if lane in _TRIED else reversed(names)))
                    return True
        return False

    def _move(self, name: str, entry: _Entry, lane: _Lane) -> None:
        """Put an entry into a lane of its owner."""
        owner = self._owners.setdefault(entry.owner, _Owner())
        owner.lanes[entry.lane].pop(name, None)
        self._in_lane[entry.lane] -= 1
        entry.lane = lane
        owner.lanes[lane][name] = None
        self._in_lane[lane] += 1
        self._note_ready(entry.owner)

    def _note_ready(self, key: int) -> None:
        if self._owners[key].is_ready:
            self._ready.setdefault(key, None)
        else:
            self._ready.pop(key, None)

    def _remove(self, name: str) -> None:
        entry = self._entries.pop(name)
        owner = self._owners[entry.owner]
        del owner.lanes[entry.lane][name]
        self._in_lane[entry.lane] -= 1
        self._bytes -= entry.size_bytes
        self._note_ready(entry.owner)
        if not owner:
            del self._owners[entry.owner]

    def _pause(self, name: str, entry: _Entry, until: float) -> None:
        entry.ticket = next(self._tickets)
        heapq.heappush(self._pauses, (until, entry.ticket, name))
        self._move(name, entry, _Lane.PAUSED)

    def _end_pauses(self, now: float) -> None:
        self._skip_stale()
        while self._pauses and self._pauses[0][0] <= now:
            name = heapq.heappop(self._pauses)[2]
            self._move(name, self._entries[name], _Lane.AGAIN)
            self._skip_stale()

    def _skip_stale(self) -> None:
        while self._pauses:
            _, ticket, name = self._pauses[0]
            entry = self._entries.get(name)
            if entry is not None and entry.ticket == ticket and entry.lane is _Lane.PAUSED:
                return
            heapq.heappop(self._pauses)

    def _end_flight(self, name: str) -> _Entry:
        entry = self._entries[name]
        if entry.lane is not _Lane.IN_FLIGHT:
            raise ValueError(f"{name!r} is not in flight")
        return entry


def _bucket(owner: int) -> int:
    return owner if owner == 0 else 1 + owner % (_MOST_OWNERS - 1)

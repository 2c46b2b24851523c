"""Owns what waits, what is in flight and when to try again: a pure state machine, no clock, no I/O.

The disk is the queue; this is only a bounded view of it. When it is full, names are turned away and
`starved` asks for another scan once there is room.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY = 20_000
FIRST_PAUSE_SECONDS = 1.0
OPERATOR_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    written_at: float
    attempts: int = 0
    in_flight: bool = False
    seen_again: bool = False
    ticket: int = 0
    """Number of its valid place in the heap; older places are skipped."""


@dataclass(slots=True)
class Backlog:
    """Files to upload, oldest arrival first, each at most once in flight.

    Args:
        longest_pause_seconds: cap of the exponential backoff.
        capacity: names held at most.
        jitter: returns a factor in [0.5, 1.0); replaced in tests.
    """

    longest_pause_seconds: float = 300.0
    capacity: int = CAPACITY
    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.5, 1.0))  # noqa: S311  spread, no secret
    starved: bool = False
    """Some name was turned away since this was last set to False."""
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _heap: list[tuple[float, int, str]] = field(default_factory=list)
    _tickets: count[int] = field(default_factory=count)
    _in_flight: int = 0
    _bytes: int = 0

    def add(self, name: str, now: float, *, size_bytes: int = 0, written_at: float = 0.0) -> bool:
        """Note that a file is there; False when it was turned away because the backlog is full.

        A file in flight is looked at again once its result is in, whatever that is; a file that waits for
        its next attempt keeps waiting.
        """
        entry = self._entries.get(name)
        if entry is None:
            if len(self._entries) >= self.capacity:
                self.starved = True
                return False
            entry = self._entries[name] = _Entry(size_bytes, written_at)
            self._bytes += size_bytes
            self._queue(name, entry, now)
        elif entry.in_flight:
            entry.seen_again = True
        return True

    def take(self, now: float) -> str | None:
        """Return the next name that is due and mark it in flight, or None."""
        self._skip_stale()
        if not self._heap or self._heap[0][0] > now:
            return None
        name = heapq.heappop(self._heap)[2]
        entry = self._entries[name]
        entry.in_flight = True
        self._in_flight += 1
        return name

    def finish(self, name: str, now: float, *, gone: bool = False) -> None:
        """Take a name off: done with. When it was seen again meanwhile, and is not gone, it waits anew."""
        entry = self._land(name)
        if entry.seen_again and not gone:
            entry.seen_again = False
            entry.attempts = 0
            self._queue(name, entry, now)
        else:
            self._bytes -= entry.size_bytes
            del self._entries[name]

    def retry(self, name: str, now: float, *, needs_operator: bool = False) -> float:
        """Let a name wait for its next attempt; return the pause in seconds."""
        entry = self._land(name)
        entry.seen_again = False
        first = OPERATOR_PAUSE_SECONDS if needs_operator else FIRST_PAUSE_SECONDS
        pause: float = min(first * 2 ** min(entry.attempts, 32), self.longest_pause_seconds) * self.jitter()
        entry.attempts += 1
        self._queue(name, entry, now + pause)
        return pause

    def next_due(self) -> float | None:
        """Return when the next waiting name is due, or None when nothing waits."""
        self._skip_stale()
        return self._heap[0][0] if self._heap else None

    def oldest_seconds(self, wall_clock: float) -> float:
        """Return the age of the oldest file, in seconds, 0 when empty."""
        oldest = min((e.written_at for e in self._entries.values()), default=wall_clock)
        return max(0.0, wall_clock - oldest)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._entries) - self._in_flight

    @property
    def in_flight(self) -> int:
        """How many are with a worker."""
        return self._in_flight

    @property
    def size_bytes(self) -> int:
        """Size of all files in it, as they were when added."""
        return self._bytes

    def __len__(self) -> int:
        """Count waiting and in flight."""
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        """Tell whether a name waits or is in flight."""
        return name in self._entries

    def is_in_flight(self, name: str) -> bool:
        """Tell whether a name is with a worker."""
        entry = self._entries.get(name)
        return entry is not None and entry.in_flight

    def _queue(self, name: str, entry: _Entry, due: float) -> None:
        entry.ticket = next(self._tickets)
        heapq.heappush(self._heap, (due, entry.ticket, name))

    def _land(self, name: str) -> _Entry:
        entry = self._entries[name]
        if not entry.in_flight:
            raise ValueError(f"{name!r} is not in flight")
        entry.in_flight = False
        self._in_flight -= 1
        return entry

    def _skip_stale(self) -> None:
        while self._heap:
            _, ticket, name = self._heap[0]
            entry = self._entries.get(name)
            if entry is not None and entry.ticket == ticket and not entry.in_flight:
                return
            heapq.heappop(self._heap)

"""Owns the allowance of each worker: its share of the connections and of the rate, and its buffers.

Workers get as many connections as they can use, in turns where there are too few for all: a worker without one waits
for its turn, so others never stop an upload of many parts for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core_dump_collector.governor import REQUEST_BYTES, Governor, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core_dump_collector.budget import Budget
    from core_dump_collector.node.memory import MemoryLimit
    from core_dump_collector.options import UploadOptions
    from core_dump_collector.workers import WorkerProcess

TICK_SECONDS = 0.1
MEMORY_SECONDS = 1.0
"""Between two looks at the memory in use."""
TURN_SECONDS = 15.0
"""A worker has its connection for so long where there are fewer connections than workers."""
THIN_BYTES_PER_SECOND = 1_000_000
"""On such a link parts are small, so that little is sent again after an interruption."""
LEAST_JOBS = 2


@dataclass(frozen=True, slots=True)
class _Total:
    """Work of workers."""

    moved_bytes: int = 0
    requests: int = 0
    setbacks: int = 0

    def __add__(self, other: _Total) -> _Total:
        return _Total(
            self.moved_bytes + other.moved_bytes,
            self.requests + other.requests,
            self.setbacks + other.setbacks,
        )


class Allowance:
    """The shares of all workers."""

    def __init__(self, options: UploadOptions, budget: Budget, limit: MemoryLimit | None) -> None:
        """Start carefully."""
        self._options = options
        self._budget = budget
        self._limit = limit
        self._governor = Governor()
        self._allowed = self._governor.connections
        self._memory_due = 0.0
        self._memory_share = 0.0
        self._past = _Total()
        """The work of workers that have ended."""
        self._seen: dict[int, _Total] = {}
        """The work of each seat at the last sample."""
        self.is_shared = False
        """Modules are sent as well, by a process that is not one of the workers."""
        self.due = 0.0
        """When to take the next samples."""

    @property
    def connections(self) -> int:
        """Return how many connections all workers together may use; 0 while nothing is sent."""
        return self._allowed

    @property
    def most_jobs(self) -> int:
        """Return how many jobs should be with workers: those that wait there can no longer be put in order."""
        return max(LEAST_JOBS, 2 * self._governor.connections)

    def take(self, workers: Iterable[WorkerProcess], now: float) -> None:
        """Sample the workers, set the number of connections, and share connections and rate out."""
        workers = list(workers)
        self.due = now + TICK_SECONDS
        if self._limit is not None and now >= self._memory_due:
            self._memory_due = now + MEMORY_SECONDS
            self._memory_share = self._limit.used_share() or 0.0
        total = self._total(workers)
        seats = [worker.seat for worker in workers]
        active, waiting = sum(seat.active for seat in seats), sum(seat.waiting for seat in seats)
        work = total.moved_bytes + REQUEST_BYTES * total.requests
        sample = Sample(work, active, waiting, total.setbacks, self._memory_share, total.requests)
        self._allowed = self._governor.take(sample, now)
        self.spread(workers, now)

    def _total(self, workers: list[WorkerProcess]) -> _Total:
        """Return the work of all workers so far, also of those that have ended."""
        for worker in workers:
            seat = worker.seat
            now = _Total(seat.moved_bytes, seat.requests, seat.setbacks)
            before = self._seen.get(worker.index, now)
            if (
                now.requests < before.requests or now.moved_bytes < before.moved_bytes
            ):  # another worker has the seat
                self._past += before
            self._seen[worker.index] = now
        return sum(self._seen.values(), self._past)

    def spread(self, workers: Iterable[WorkerProcess], now: float) -> None:
        """Share connections and rate among the workers that have jobs."""
        busy = [worker for worker in workers if worker.tasks]
        if not busy:
            return
        turn = int(now / TURN_SECONDS) % len(busy)
        seats = [worker.seat for worker in busy[turn:] + busy[:turn]]
        shares = share([max(1, seat.active + seat.waiting) for seat in seats], self.connections)
        # A worker without a share finishes its requests under way.
        using = max(1, sum(share > 0 or seat.active > 0 for share, seat in zip(shares, seats, strict=True)))
        sharers = max(self.connections, sum(seat.active for seat in seats))
        thin = 0 < self._governor.rate < THIN_BYTES_PER_SECOND
        options = self._options
        rate = options.shared_bytes_per_second if self.is_shared else options.max_upload_bytes_per_second
        for seat, connections in zip(seats, shares, strict=True):
            seat.connections = connections
            seat.buffers = self._budget.buffers
            seat.bytes_per_second = -(-rate // using)
            seat.sharers = sharers
            seat.small_parts = int(thin or self._budget.small_parts)


def share(wanted: list[int], most: int) -> list[int]:
    """Divide `most` in rounds of one, in this order, up to the wanted numbers; divide the rest evenly."""
    shares = [0] * len(wanted)
    left = most
    while left:
        open_places = [n for n, want in enumerate(wanted) if shares[n] < want][:left]
        if not open_places:
            break
        for place in open_places:
            shares[place] += 1
        left -= len(open_places)
    for place in range(len(shares)):
        shares[place] += left // len(shares) + (place < left % len(shares))
    return shares

"""Owns the deadlines of jobs: pure, no clock.

A job may wait for a few requests until their timeouts, and may move its bytes at the least rate at which a request
lives; a worker that needs longer hangs. Workers take jobs in the order of submission, so the oldest jobs in flight, as
many as there are workers, are the ones that run. A job's time counts from the moment at which it is one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

J = TypeVar("J")

REQUESTS = 10
"""Requests of one job that may each take all the time that they have."""
MOST_SECONDS = 24 * 3600.0
"""No job runs longer, whatever its size: killed there, a multipart upload goes on from the parts that are stored."""


def seconds_for(size_bytes: int, request_seconds: float, bytes_per_second: float) -> float:
    """Return the time for a job with a file of this size.

    Args:
        size_bytes: length of the file.
        request_seconds: for so long a request may hang.
        bytes_per_second: as slow as a request may be.
    """
    return min(MOST_SECONDS, REQUESTS * request_seconds + size_bytes / bytes_per_second)


@dataclass(slots=True)
class _Flight:
    seconds: float
    deadline: float | None = None
    """None until the job runs."""


class Deadlines(Generic[J]):
    """The jobs in flight, oldest first."""

    def __init__(self, workers: int) -> None:
        """Start without jobs."""
        self._workers = workers
        self._flights: dict[J, _Flight] = {}

    def __len__(self) -> int:
        """Return how many jobs are in flight."""
        return len(self._flights)

    def add(self, job: J, seconds: float, now: float) -> None:
        """Add a job that was submitted."""
        self._flights[job] = _Flight(seconds)
        self._start(now)

    def remove(self, job: J, now: float) -> None:
        """Remove a job whose result is in; another runs in its place."""
        del self._flights[job]
        self._start(now)

    def overdue(self, now: float) -> list[J]:
        """Return the jobs past their deadlines."""
        return [
            job for job, flight in self._running() if flight.deadline is not None and flight.deadline < now
        ]

    def _start(self, now: float) -> None:
        for _, flight in self._running():
            if flight.deadline is None:
                flight.deadline = now + flight.seconds

    def _running(self) -> Iterator[tuple[J, _Flight]]:
        return islice(self._flights.items(), self._workers)

"""Owns how many connections all workers together may use: pure, no clock.

It starts with few and doubles them while threads wait for one and each step brings more throughput. A step that brings
nothing is taken back, and tried again after a while. Throttling and timeouts halve the number, which then grows slowly;
so does memory that runs short. One connection of each node is still too many for a store that all nodes ask at once:
then nothing is sent for a moment, and for longer each time, with jitter, so that they do not come back together.

Where the link itself is the limit, the number falls until each connection gets a fair share of it, down to one:
requests on a thin link go one by one and are not given up for being slow.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST = 4
MOST = 64
HOLD_SECONDS = 0.25
"""A number of connections is kept for so long before its throughput is judged."""
GAIN = 1.15
"""A step has to bring so much more throughput."""
SETTLE_SECONDS = 1.0
"""Time that a step has for that: new connections need several round trips before they carry anything."""
FIRST_RETRY_SECONDS = 4.0
"""A step that brought nothing is tried again after this time; each further one after twice the time before."""
LAST_RETRY_SECONDS = 64.0
CALM_SECONDS = 1.0
"""The number does not change for this time after a setback."""
FEW = 2
"""With so few connections, a setback also means a rest."""
FIRST_REST_SECONDS = 0.25
LAST_REST_SECONDS = 16.0
TOLERATED_SHARE = 0.1
"""This share of the latest requests may fail without consequence: fewer connections would not help."""
HISTORY_SAMPLES = 20
GROWTH_SHARE = 0.7
"""The number does not grow once this share of the memory is in use."""
SHORT_SHARE = 0.9
"""Above this share it falls, but not below `FEW`: connections are not the largest users of memory."""
FAIR_BYTES_PER_SECOND = 40_000
"""Fair share of the link for one connection."""
FAIR_WINDOW_SECONDS = 5.0
REQUEST_BYTES = 32 * 1024
"""A request counts as so many bytes: for small bodies the number of requests is the throughput."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of all workers together."""

    work_bytes: int
    """Bytes moved, and `REQUEST_BYTES` for each request."""
    active: int
    """Connections in use."""
    waiting: int
    """Threads that wait for one."""
    setbacks: int
    """Requests that were throttled or timed out."""
    memory_share: float = 0.0
    """Used share of the memory limit."""
    requests: int = 0
    """Requests that have ended, setbacks included."""


@dataclass(slots=True)
class Governor:
    """The number of connections.

    Args:
        jitter: returns a factor in [0.5, 1.5); replaced in tests.
    """

    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.5, 1.5))  # noqa: S311  spread, no secret
    connections: int = FIRST
    rate: float = 0.0
    """Bytes a second that the link carried in the last window with a connection in use; 0 while unknown."""
    _history: deque[Sample] = field(
        default_factory=lambda: deque([Sample(0, 0, 0, 0)], maxlen=HISTORY_SAMPLES)
    )
    _calm_until: float = 0.0
    _is_careful: bool = False
    """There was a setback: growth is slow."""
    _step: Step | None = None
    _samples: int = 0
    """Taken during the step."""
    _busy: int = 0
    """Those of them that saw all connections in use and a thread waiting."""
    _before: Step | None = None
    """The number before, with its throughput."""
    _raised_at: float = 0.0
    _retry_at: float = 0.0
    _retry_seconds: float = FIRST_RETRY_SECONDS
    _window: Step | None = None
    _rest_until: float = 0.0
    _rest_seconds: float = FIRST_REST_SECONDS

    def take(self, sample: Sample, now: float) -> int:
        """Take a sample and return how many connections may be used now."""
        before = self._history[-1]
        self._history.append(sample)
        if sample.setbacks > before.setbacks and self._fails_too_often():
            self._fall_back(now)
        elif sample.memory_share > SHORT_SHARE and self.connections > FEW and now >= self._calm_until:
            self._lower(now)
        if now >= self._calm_until:
            self._climb(sample, now)
        self._share(sample, now)
        return 0 if now < self._rest_until else self.connections

    def _fails_too_often(self) -> bool:
        first, last = self._history[0], self._history[-1]
        failed = last.setbacks - first.setbacks
        return failed > TOLERATED_SHARE * max(failed, last.requests - first.requests)

    def _fall_back(self, now: float) -> None:
        if now < self._rest_until or (now < self._calm_until and self.connections > FEW):
            return
        if self.connections <= FEW:
            if now > self._rest_until + 2 * self._rest_seconds + CALM_SECONDS:
                self._rest_seconds = max(FIRST_REST_SECONDS, self._rest_seconds / 4)
            self._rest_until = now + self._rest_seconds * self.jitter()
            self._rest_seconds = min(2 * self._rest_seconds, LAST_REST_SECONDS)
        self._lower(now)

    def _lower(self, now: float) -> None:
        self._set(max(1, self.connections // 2))
        self._before = None
        self._is_careful = True
        self._calm_until = max(now, self._rest_until) + CALM_SECONDS * self.jitter()

    def _climb(self, sample: Sample, now: float) -> None:
        step = self._step
        self._samples += 1
        self._busy += sample.active >= self.connections and sample.waiting > 0
        if step is not None and now - step.began < HOLD_SECONDS:
            return
        is_wanted = 2 * self._busy >= self._samples
        self._step, self._samples, self._busy = Step(now, sample.work_bytes, self.connections), 0, 0
        if step is None or not is_wanted:
            return  # nothing can be judged while connections are free
        rate, before = step.rate(sample, now), self._before
        raised = before is not None and before.connections < self.connections
        if before is not None and raised and rate < GAIN * before.result:
            if now - self._raised_at < SETTLE_SECONDS:
                return
            self._set(before.connections)
            self._before = None
            self._retry_at = now + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
        elif now >= self._retry_at and sample.memory_share < GROWTH_SHARE:
            if raised:
                self._retry_seconds = FIRST_RETRY_SECONDS
            self._raised_at = now
            self._before = Step(now, 0, self.connections, rate)
            self._set(self.connections + (1 if self._is_careful else self.connections))

    def _share(self, sample: Sample, now: float) -> None:
        """Lower the number to that of the connections that get a fair share of the link."""
        window = self._window
        if sample.active == 0 or window is None:
            self._window = Step(now, sample.work_bytes, sample.active) if sample.active else None
            return
        if now - window.began < FAIR_WINDOW_SECONDS:
            return
        self.rate = window.rate(sample, now)
        self._window = Step(now, sample.work_bytes, sample.active)
        fair = max(1, int(self.rate / FAIR_BYTES_PER_SECOND))
        if sample.active > fair:
            self._set(min(self.connections, fair))

    def _set(self, connections: int) -> None:
        self.connections = max(1, min(connections, MOST))
        self._step = None


@dataclass(frozen=True, slots=True)
class Step:
    """Some time with one number of connections."""

    began: float
    work_bytes: int
    connections: int
    result: float = 0.0
    """Bytes a second."""

    def rate(self, sample: Sample, now: float) -> float:
        """Return the throughput since it began."""
        return (sample.work_bytes - self.work_bytes) / max(now - self.began, 1e-3)

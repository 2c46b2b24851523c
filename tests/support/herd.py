"""Many collectors at one store that throttles: a simulation in which their real backlogs and governors decide.

A store takes so many requests a second and answers the others with 503. A dump is two requests, itself and its metadata
object; a retry begins with the first. Time is simulated, and every random number is seeded.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from core_dump_collector.allowance import LEAST_JOBS, TICK_SECONDS
from core_dump_collector.backlog import Backlog, Candidate
from core_dump_collector.board import LIGHT_JOBS
from core_dump_collector.governor import REQUEST_BYTES, Governor, Sample

if TYPE_CHECKING:
    from collections.abc import Callable

LATENCY_SECONDS = 0.03
WORKERS = 4


@dataclass
class Clock:
    """Simulated time and the events that lie ahead."""

    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def step(self) -> None:
        """Go to the next event and run it."""
        self.now, _, action = heapq.heappop(self._events)
        action()


@dataclass
class Throttle:
    """The store: a bucket of tokens that holds those of one second."""

    clock: Clock
    per_second: float
    taken: Counter[int] = field(default_factory=Counter)
    """Requests that were taken, by second."""
    refused: Counter[int] = field(default_factory=Counter)
    """Requests that were answered with 503, by second."""
    _tokens: float = 0.0
    _at: float = 0.0

    def ask(self, then: Callable[[bool], None]) -> None:
        """Take or refuse a request; the answer comes after the latency."""
        now = self.clock.now
        self._tokens = min(self.per_second, self._tokens + (now - self._at) * self.per_second)
        self._at = now
        taken = self._tokens >= 1
        self._tokens -= taken
        (self.taken if taken else self.refused)[int(now)] += 1
        self.clock.after(LATENCY_SECONDS, partial(then, taken))


class Node:
    """One collector."""

    def __init__(self, clock: Clock, store: Throttle, dumps: int, seed: int) -> None:
        """Start with so many small dumps."""
        self._clock, self._store = clock, store
        chance = random.Random(seed)
        self.backlog = Backlog(jitter=lambda: chance.uniform(0.5, 1.0))
        for number in range(dumps):
            self.backlog.add(Candidate(f"core-{number}", new=True), 0.0)
        self.governor = Governor(jitter=lambda: chance.uniform(0.5, 1.5))
        self._allowed = self.governor.connections
        self._waiting: list[Callable[[], None]] = []
        self._active = self._requests = self._setbacks = 0
        clock.after(chance.uniform(0, TICK_SECONDS), self._tick)

    def _tick(self) -> None:
        work = self._requests * REQUEST_BYTES
        sample = Sample(work, self._active, len(self._waiting), self._setbacks, requests=self._requests)
        self._allowed = self.governor.take(sample, self._clock.now)
        self._go_on()
        if len(self.backlog):
            self._clock.after(TICK_SECONDS, self._tick)

    def _go_on(self) -> None:
        most = min(WORKERS * LIGHT_JOBS, max(LEAST_JOBS, 2 * self.governor.connections))
        while self.backlog.in_flight < most and (name := self.backlog.take(self._clock.now)) is not None:
            self._ask(partial(self._on_dump, name))
        while self._waiting and self._active < self._allowed:
            self._active += 1
            self._waiting.pop(0)()

    def _ask(self, then: Callable[[bool], None]) -> None:
        self._waiting.append(partial(self._store.ask, partial(self._on_answer, then)))

    def _on_answer(self, then: Callable[[bool], None], taken: bool) -> None:
        self._active -= 1
        self._requests += 1
        self._setbacks += not taken
        then(taken)
        self._go_on()

    def _on_dump(self, name: str, taken: bool) -> None:
        if taken:
            self._ask(partial(self._on_document, name))
        else:
            self.backlog.retry(name, self._clock.now)

    def _on_document(self, name: str, taken: bool) -> None:
        if taken:
            self.backlog.finish(name)
        else:
            self.backlog.retry(name, self._clock.now)


@dataclass(frozen=True)
class Run:
    """The course of a simulation."""

    seconds: float
    taken: list[int]
    """By second."""
    refused: list[int]


def simulate(collectors: int, dumps: int, per_second: float, most_seconds: float = 3600) -> Run:
    """Let collectors start at the same moment, each with so many dumps, until all have drained.

    Raises:
        TimeoutError: they have not.
    """
    clock = Clock()
    store = Throttle(clock, per_second)
    nodes = [Node(clock, store, dumps, seed) for seed in range(collectors)]
    while any(len(node.backlog) for node in nodes):
        clock.step()
        if clock.now > most_seconds:
            raise TimeoutError(f"{sum(len(node.backlog) for node in nodes)} dumps are left")
    seconds = range(int(clock.now) + 1)
    return Run(clock.now, [store.taken[n] for n in seconds], [store.refused[n] for n in seconds])

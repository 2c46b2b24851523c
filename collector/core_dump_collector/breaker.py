"""Owns the circuit breaker: the pause that all dumps share while the store cannot be reached. Pure, no clock.

Each dump has its own pauses (`backlog`), but thousands of dumps would still send many requests a second to a store
that is down. After a few consecutive failures that are not caused by the dump, the circuit opens: one attempt at a
time tests the store, and the first success closes the circuit.
"""

from __future__ import annotations

from dataclasses import dataclass

from core_dump_collector.jobs import RetryReason

STORE_WIDE = frozenset({RetryReason.NETWORK, RetryReason.CREDENTIALS, RetryReason.NO_SUCH_BUCKET})
FAILURES_TO_OPEN = 5
"""Consecutive failures after which the circuit opens."""
FIRST_OPEN_SECONDS = 0.5
"""The first pause of an open circuit; each further failure doubles it."""
LONGEST_OPEN_SECONDS = 30.0


@dataclass(slots=True)
class CircuitBreaker:
    """Says whether another attempt may start now."""

    _failures: int = 0
    _until: float = 0.0

    @property
    def is_open(self) -> bool:
        """Tell whether attempts are made one at a time."""
        return self._failures >= FAILURES_TO_OPEN

    @property
    def until(self) -> float:
        """Return when the next attempt may start, on the clock of `fail`."""
        return self._until

    def allows(self, now: float, in_flight: int) -> bool:
        """Tell whether an attempt may start while `in_flight` others are under way."""
        return not self.is_open or (in_flight == 0 and now >= self._until)

    def fail(self, reason: RetryReason, now: float) -> None:
        """Count a failed attempt; one that ends during a pause started before it and is not counted."""
        if reason not in STORE_WIDE or now < self._until:
            return
        self._failures += 1
        if self.is_open:
            pause = FIRST_OPEN_SECONDS * 2.0 ** min(self._failures - FAILURES_TO_OPEN, 16)
            self._until = now + min(pause, LONGEST_OPEN_SECONDS)

    def succeed(self) -> None:
        """Close the circuit: the store has accepted a dump."""
        self._failures = 0
        self._until = 0.0

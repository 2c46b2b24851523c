"""Owns the pause that all dumps share while the store itself cannot be reached: pure, no clock.

Each dump has its own pauses (`backlog`); thousands of them would still knock on a closed door many times a
second. After a few failures in a row that say nothing of the dump, one attempt at a time finds out whether the
door is open again, and the first success lets everything go.
"""

from __future__ import annotations

from dataclasses import dataclass

from core_dump_collector.jobs import RetryReason

STORE_WIDE = frozenset({RetryReason.NETWORK, RetryReason.CREDENTIALS, RetryReason.NO_SUCH_BUCKET})
PATIENCE = 5
"""Failures in a row before the brake is on."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class Brake:
    """Says whether another attempt may start now."""

    _failures: int = 0
    _until: float = 0.0

    @property
    def is_on(self) -> bool:
        """Tell whether attempts are made one at a time."""
        return self._failures >= PATIENCE

    @property
    def until(self) -> float:
        """Return when the next attempt may start, on the clock of `fail`."""
        return self._until

    def allows(self, now: float, in_flight: int) -> bool:
        """Tell whether an attempt may start, with so many under way."""
        return not self.is_on or (in_flight == 0 and now >= self._until)

    def fail(self, reason: RetryReason, now: float) -> None:
        """Note a failed attempt; one that ends during a pause began before it and lengthens nothing."""
        if reason not in STORE_WIDE or now < self._until:
            return
        self._failures += 1
        if self.is_on:
            pause = FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures - PATIENCE, 16)
            self._until = now + min(pause, LONGEST_PAUSE_SECONDS)

    def succeed(self) -> None:
        """Note that the store has answered an attempt as it should."""
        self._failures = 0
        self._until = 0.0

"""Owns whether the store takes dumps, as far as the last responses tell, and when to ask it. Pure, no clock.

A probe asks at start, after a long time without a response, and while the store is not reachable. It cannot see
whether writing is allowed, so a refused upload counts until uploads succeed or nothing is refused for a while.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core_dump_collector.breaker import STORE_WIDE
from core_dump_collector.jobs import RetryReason

SILENCE_SECONDS = 900.0
"""Without a response for so long the store is asked."""
PROBE_PAUSE_SECONDS = 30.0
"""Between two probes of a store that is not reachable."""
REFUSED_SECONDS = 900.0
"""A refused upload counts for so long."""
_REFUSALS = frozenset({RetryReason.FORBIDDEN, RetryReason.UNPROVEN})


@dataclass(slots=True)
class Reachability:
    """What is known of the store."""

    is_known: bool = False
    reason: RetryReason | None = None
    """Why the store does not take dumps; None if it does, as far as known."""
    is_probing: bool = False
    _down_since: float = math.inf
    """When the store was first seen not to take dumps, since it last took them."""
    _probe_due: float = -math.inf
    _refused_until: float = -math.inf

    @property
    def probe_due(self) -> float:
        """Return when a probe is due."""
        return math.inf if self.is_probing else self._probe_due

    def is_down_for(self, seconds: float, now: float) -> bool:
        """Tell whether the store has not been seen to take dumps for so long."""
        return now - self._down_since >= seconds

    def start_probe(self) -> None:
        """Note that a probe is with a worker."""
        self.is_probing = True

    def note_probe(self, reason: RetryReason | None, now: float) -> None:
        """Take the result of a probe."""
        self.is_probing = False
        if reason is not None or now >= self._refused_until:
            self._set(reason, now)
        self._probe_due = now + (SILENCE_SECONDS if self.reason is None else PROBE_PAUSE_SECONDS)

    def note_upload(self, reason: RetryReason | None, now: float) -> None:
        """Take the result of an upload; None if it succeeded."""
        if reason is None:
            self._set(None, now)
            self._refused_until = -math.inf
            self._probe_due = now + SILENCE_SECONDS
        elif reason in _REFUSALS:
            self._set(reason, now)
            self._refused_until = now + REFUSED_SECONDS
        elif reason in STORE_WIDE and self.reason is None:
            self._probe_due = min(self._probe_due, now)

    def _set(self, reason: RetryReason | None, now: float) -> None:
        self.is_known = True
        self.reason = reason
        self._down_since = math.inf if reason is None else min(self._down_since, now)

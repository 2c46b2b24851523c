"""Owns the short pauses between tries of one request. Longer waiting is the backlog's and holds up no other dump."""

from __future__ import annotations

import random
import time

from core_dump_collector.jobs import RetryReason

TRIES = 4
FIRST_PAUSE_SECONDS = 0.2
TRANSIENT = frozenset({RetryReason.NETWORK, RetryReason.SERVER, RetryReason.THROTTLED})


def pause(number: int) -> None:
    """Wait before the try that follows try `number`, counted from 0."""
    time.sleep(FIRST_PAUSE_SECONDS * 2**number * random.uniform(0.5, 1.5))  # noqa: S311  jitter

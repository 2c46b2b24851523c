"""Owns the question whether requests carry `If-None-Match: *`, by which a store refuses to overwrite an object.

A store that does not know the header may refuse it with 400, 409, 412 or 501, and so may a proxy for a moment. So the
condition counts as unknown only after the same request has succeeded without it, and is tried again after a time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Mode = Literal["auto", "true", "false"]
UNKNOWN_SECONDS = 600.0
"""How long the condition counts as unknown."""
CONFLICTS = 3
"""Consecutive 409s after which they are taken for a refusal of the header; S3 sends one for a concurrent request."""


class Condition:
    """What is known of the store's conditions."""

    def __init__(self, mode: Mode, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with what the setting CONDITIONAL says."""
        self.mode = mode
        self._clock = clock
        self._unknown_until = 0.0
        self._conflicts = 0

    @property
    def is_used(self) -> bool:
        """Tell whether the next request carries the condition."""
        return self.mode == "true" or (self.mode == "auto" and self._clock() >= self._unknown_until)

    def succeed(self) -> None:
        """Note that the store has accepted or answered a condition."""
        self._conflicts = 0

    def conflict(self) -> bool:
        """Count a 409; return whether there were so many that the store seems not to know the header."""
        self._conflicts += 1
        return self.mode == "auto" and self._conflicts >= CONFLICTS

    def forget(self) -> None:
        """Note that a request has succeeded only without the condition."""
        self._conflicts = 0
        self._unknown_until = self._clock() + UNKNOWN_SECONDS

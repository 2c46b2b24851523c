"""Owns how much of a core is kept: whole, trimmed, or headers and notes alone."""

from __future__ import annotations

from core_dump_helper.core import Memory
from core_dump_helper.length import LARGE_BYTES

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.settings import Settings

WHOLE, TRIM, METADATA, NOTHING = "whole", "trim", "metadata", "nothing"
"""The actions of a rule (`rules`)."""


class Trim:
    """How a core is trimmed."""

    def __init__(self, reason: str, budget_bytes: int, limit_bytes: int) -> None:
        """Store the decision.

        Args:
            reason: the attribute `trimmed`.
            budget_bytes: memory that the dump may hold; the vital part may be longer.
            limit_bytes: length of the whole dump; 0 means no limit.
        """
        self.reason, self.budget_bytes, self.limit_bytes = reason, budget_bytes, limit_bytes

    @property
    def has_memory(self) -> bool:
        """Return whether the dump holds memory at all."""
        return self.reason != METADATA


class Keep:
    """Decides how much of one core is kept, once its length is known."""

    def __init__(self, settings: Settings, action: str = "", limit: str = "") -> None:
        """Store the action of a rule, and the limit that leaves only the vital part; both may be empty."""
        self._settings, self._action, self._limit = settings, action, limit
        self.memory_bytes = 0
        """Memory that this process may use."""

    def join_cgroup(self) -> None:
        """Move this process to CGROUP, because it needs memory; that takes 5 ms and more."""
        Memory(self._settings).join()

    @property
    def from_bytes(self) -> int:
        """Return the length from which on a core is reordered or trimmed."""
        return 0 if self._action == METADATA else LARGE_BYTES

    @property
    def required(self) -> str:
        """Return why a core from `from_bytes` on may not be kept whole, or an empty string."""
        return METADATA if self._action == METADATA else self._limit

    @property
    def refusal(self) -> str:
        """Return the reason that is counted if such a core cannot be trimmed."""
        return self._limit or "rule"

    def choose(self, length: int) -> Trim | None:
        """Return how a core of `length` bytes is trimmed, or None for a whole one."""
        settings, memory = self._settings, self.memory_bytes // 2  # it is copied once more, into chunks
        most = settings.MAX_DUMP_BYTES
        if self.required:
            return Trim(self.required, 0, most)
        if 0 < most < length and most <= memory:
            return Trim("max_dump_bytes", most, most)
        budget = min(settings.TRIM_BUDGET_BYTES, memory)
        if length <= max(budget, LARGE_BYTES) or self._action == WHOLE:
            return None
        if self._action == TRIM:
            return Trim("rule", budget, most)
        if 0 < settings.TRIM_ABOVE_BYTES < length:
            return Trim("trim_above_bytes", budget, most)
        return None

"""Owns which partial dumps may be abandoned: a pure state machine, no clock, no I/O.

A partial is due for salvage once it was unchanged for ABANDONED_SECONDS on the monotonic clock: its helper may not
have locked it yet. File times are compared with each other only, so no wall clock that jumps delays or hurries it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ABANDONED_SECONDS = 10.0
LONGEST_LOCKED_SECONDS = 60.0
"""Between two attempts at a partial whose helper still holds its lock."""
MOST_PARTIALS = 1000
"""The helper writes at most 256 at a time; the next scan finds any others."""


@dataclass(slots=True)
class _Partial:
    version: tuple[int, int]
    """Size and modification time."""
    due: float
    attempts: int = 0
    in_flight: bool = False


@dataclass(slots=True)
class Partials:
    """The partials that were seen, and when each is due for an attempt to salvage it."""

    _known: dict[str, _Partial] = field(default_factory=dict)

    def note(self, name: str, version: tuple[int, int], now: float) -> None:
        """Remember a partial; one that has changed starts to wait again."""
        partial = self._known.get(name)
        if partial is None:
            if len(self._known) < MOST_PARTIALS:
                self._known[name] = _Partial(version, now + ABANDONED_SECONDS)
        elif partial.version != version:
            partial.version = version
            partial.attempts = 0
            partial.due = now + ABANDONED_SECONDS

    def due(self, now: float) -> str | None:
        """Return a partial that has waited long enough, or None."""
        return next((n for n, p in self._known.items() if p.due <= now and not p.in_flight), None)

    def is_due(self, name: str, now: float) -> bool:
        """Tell whether a partial has waited long enough."""
        partial = self._known.get(name)
        return partial is not None and partial.due <= now and not partial.in_flight

    def start(self, name: str) -> None:
        """Mark a partial as with a worker."""
        self._known[name].in_flight = True

    def finish(self, name: str, now: float, *, left: bool) -> None:
        """Forget a partial, or let one that was left alone wait for its next attempt."""
        partial = self._known.get(name)
        if partial is None:
            return
        if not left:
            del self._known[name]
            return
        partial.in_flight = False
        partial.attempts += 1
        partial.due = now + min(ABANDONED_SECONDS * 2.0 ** min(partial.attempts, 8), LONGEST_LOCKED_SECONDS)

    def next_due(self) -> float | None:
        """Return when the next attempt is due, or None when none waits."""
        return min((p.due for p in self._known.values() if not p.in_flight), default=None)

    def __len__(self) -> int:
        """Count those that are known."""
        return len(self._known)

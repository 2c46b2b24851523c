"""Owns the messages from a pass over modules to the daemon."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Event that a pass reports; bounded, so it can be a metric label."""

    SENDING = "sending"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """Lists go first; modules wait for the next pass."""
    UPLOADED = "uploaded"
    PRESENT = "present"
    UNPROVEN = "unproven"
    WITHHELD = "withheld"
    DROPPED_AGE = "age"
    DROPPED_SPACE = "space"
    DROPPED_WRONG = "wrong"
    DROPPED_REFUSED = "refused"
    LIST_PUBLISHED = "list published"
    LIST_DROPPED = "list dropped"


STORED = (Kind.UPLOADED, Kind.PRESENT, Kind.UNPROVEN)
DROPPED = (Kind.DROPPED_AGE, Kind.DROPPED_SPACE, Kind.DROPPED_WRONG, Kind.DROPPED_REFUSED, Kind.WITHHELD)


@dataclass(frozen=True, slots=True)
class Event:
    """An action of a pass, finished or about to start."""

    kind: Kind
    name: str
    """The file; for a failure, the reason."""
    size_bytes: int = 0
    detail: str = ""

"""Owns the records of losses in the bucket; they resemble records of refused dumps and have the thread's name and pid.

The first loss of a name is stored at once; further ones of the same window become one record at its end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core_dump_collector.jobs import Document
from core_dump_format.text import printable

if TYPE_CHECKING:
    from core_dump_collector.losses.ledger import Loss

PREFIX = ".kernel-log/"
"""Distinguishes the names from those of files and of the helper's records."""
WINDOW_SECONDS = 600.0
MOST_WINDOWS = 200
"""Most windows at one time. Further names share one window for each reason, so random names cannot fill a bucket."""
MOST_WAITING = 1000
"""Most records that wait for the store."""
PAUSE_SECONDS = 60.0
"""Pause after a record that could not be stored."""
_MOST_TEXT = 100


@dataclass(slots=True)
class _Window:
    opened: float
    """Unix seconds of the loss that opened it."""
    loss: Loss | None = None
    """The first loss that is not stored yet."""
    microseconds: int = 0
    last: float = 0.0
    number: int = 0


class LossDocuments:
    """The records that wait for the store."""

    def __init__(self, boot_id: str) -> None:
        """Start without records."""
        self._boot_id = boot_id
        self._windows: dict[tuple[str, str, bytes, int], _Window] = {}
        self._ready: dict[str, tuple[Document, int]] = {}
        self._in_flight = ""
        self._due = 0.0

    def add(self, loss: Loss, microseconds: int) -> None:
        """Add a loss; `microseconds` is its time on the kernel's clock, from which the record's name is derived."""
        key = (loss.kind, loss.reason, loss.comm, loss.signal)
        if key not in self._windows and len(self._windows) >= MOST_WINDOWS:
            key = (loss.kind, loss.reason, b"*", 0)
            loss = replace(loss, comm=b"*", pid=0, signal=0)
        window = self._windows.get(key)
        if window is not None and loss.seconds - window.opened >= WINDOW_SECONDS:
            self._close(key)
            window = None
        if window is None:
            self._windows[key] = _Window(loss.seconds)
            self._store(loss, microseconds, loss.number, loss.seconds)
            return
        if window.loss is None:
            window.loss, window.microseconds = loss, microseconds
        window.number += loss.number
        window.last = max(window.last, loss.seconds)

    @property
    def oldest_microseconds(self) -> int | None:
        """Return the time of the oldest loss that is not stored."""
        waiting = [window.microseconds for window in self._windows.values() if window.loss is not None]
        waiting += [microseconds for _, microseconds in self._ready.values()]
        return min(waiting, default=None)

    def next_document(self, wall_clock: float, now: float) -> Document | None:
        """Return a record to store, or None. The next one follows once `finish` was called for it.

        Args:
            wall_clock: Unix seconds, to tell which windows are over.
            now: monotonic seconds, to pause after a failure.
        """
        if self._in_flight or now < self._due:
            return None
        for key in [key for key, one in self._windows.items() if wall_clock - one.opened >= WINDOW_SECONDS]:
            self._close(key)
        if not self._ready:
            return None
        self._in_flight = next(iter(self._ready))
        return self._ready[self._in_flight][0]

    def finish(self, name: str, now: float, *, stored: bool) -> bool:
        """Take the result of a record; return False if no such record is being stored."""
        if not name or name != self._in_flight:
            return False
        self._in_flight = ""
        if stored:
            del self._ready[name]
        else:
            self._due = now + PAUSE_SECONDS
        return True

    def _close(self, key: tuple[str, str, bytes, int]) -> None:
        window = self._windows.pop(key)
        if window.loss is not None:
            self._store(window.loss, window.microseconds, window.number, window.last)

    def _store(self, loss: Loss, microseconds: int, number: int, last: float) -> None:
        if len(self._ready) >= MOST_WAITING:
            return  # the store takes nothing; these losses are counted, and read again from the log at the next start
        seed = f"{self._boot_id} {loss.kind} {loss.reason} {loss.comm!r} {loss.pid} {microseconds}"
        name = hashlib.sha256(seed.encode()).hexdigest()[:24]
        first = max(0, int(loss.seconds))
        facts: dict[str, str | int] = {"reason": str(loss.reason), "source": str(loss.kind), "kept": 0}
        facts |= {"suppressed": number, "first": first, "last": max(first, int(last)), "timestamp": first}
        if loss.comm:
            facts["comm"] = printable(loss.comm.decode("utf-8", "backslashreplace"), _MOST_TEXT)
        facts |= {key: value for key, value in (("pid", loss.pid), ("signal", loss.signal)) if value}
        document = Document(f"{PREFIX}storm-{name}-{first}.json", tuple(facts.items()))
        self._ready[document.name] = (document, microseconds)

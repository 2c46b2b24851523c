"""Owns the suppressed-crash records of the helper in `.helper/` (docs/contracts.md, "Records of refused dumps").

Each record counts one window of one workload. New crashes in it are added to the metric. Once the window is over, the
record is stored as one document, named after the record, so that it is stored once however often the daemon starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from core_dump_collector.jobs import Document
from core_dump_collector.losses.messages import REFUSALS
from core_dump_collector.node.ownership import is_private
from core_dump_format.attributes import ATTRIBUTE_PREFIX, read_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE = ".helper"
MOST_RECORDS = 2000
"""The helper keeps about 1,000."""
MOST_BYTES = 16 * 1024
GRACE_SECONDS = 5
"""After the end of a window, for a helper that is still writing its record."""
RECORD_PAUSE_SECONDS = 60.0
"""After a record that could not be stored."""
_NAME = re.compile(r"[0-9a-f]{24}")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COUNTS = ("kept", "suppressed", "first", "last", "seconds")


@dataclass(frozen=True, slots=True)
class Record:
    """One window of one workload: how many dumps were kept, how many refused, and why."""

    name: str
    reason: str
    kept: int
    suppressed: int
    vital: int
    """Number of suppressed dumps with a vital part."""
    first: int
    """Unix seconds, as `last`."""
    last: int
    seconds: int
    """Length of the window."""
    workload: tuple[tuple[str, str | int], ...]
    """Executable, container, pod and signal, as far as known."""

    @property
    def lost(self) -> int:
        """Return the number of crashes without a dump; a vital part counts as a dump."""
        return self.suppressed - self.vital

    def as_document(self) -> Document:
        """Return the document that is stored. A slash in its name keeps it apart from every file's."""
        facts: dict[str, str | int] = {
            "reason": self.reason,
            "kept": self.kept,
            "suppressed": self.suppressed,
            "vital": self.vital,
        }
        facts |= {"first": self.first, "last": self.last, "timestamp": self.first}
        return Document(f"{STATE}/storm-{self.name}-{self.first}.json", (*self.workload, *facts.items()))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Dumps of one workload that the helper refused."""

    reason: str
    number: int
    signal: int
    """0 if unknown."""
    first: int
    """Unix seconds, as `last`: when they were refused."""
    last: int


class SuppressedCrashes:
    """Counts the dumps that the helper refused since this daemon started."""

    def __init__(self, directory: str) -> None:
        """Treat the present records as counted before."""
        self._directory = directory
        self._seen = {record.name: record for record in _read_records(directory)}
        self._over: dict[str, Document] = {}
        self._done: set[str] = set()
        self._since: dict[tuple[str, int], float] = {}
        self._in_flight = ""
        self._due = 0.0

    def known(self) -> list[Refusal]:
        """Return the refusals before the start of this daemon that are in records."""
        return [_refusal(record, record.lost, record.first) for record in self._seen.values()]

    def take_new(self) -> list[Refusal]:
        """Return the refusals since the last call."""
        new: list[Refusal] = []
        records = {record.name: record for record in _read_records(self._directory)}
        for name, record in records.items():
            before = self._seen.get(name)
            if before is not None and before.first != record.first:
                self._add(before)
                before = None
            more = record.lost - (before.lost if before is not None else 0)
            if more > 0:
                new.append(_refusal(record, more, before.last if before is not None else record.first))
        self._seen = records
        return new

    def next_document(self, wall_clock: float, now: float) -> Document | None:
        """Return a document to store, or None. The next one follows once `finish` was called for it.

        Args:
            wall_clock: Unix seconds, to tell which windows are over.
            now: monotonic seconds, for the same where the clock has jumped back, and to pause after a failure.
        """
        if self._in_flight or now < self._due:
            return None
        self._since = {
            (r.name, r.first): self._since.get((r.name, r.first), now) for r in self._seen.values()
        }
        for record in self._seen.values():
            known = now - self._since[record.name, record.first]
            if max(wall_clock - record.first, known) > record.seconds + GRACE_SECONDS:
                self._add(record)
        if not self._over:
            self._due = now + GRACE_SECONDS
            return None
        self._in_flight = next(iter(self._over))
        return self._over[self._in_flight]

    def finish(self, name: str, now: float, *, stored: bool) -> bool:
        """Take the result of a document; return False if no such document is being stored."""
        if not name or name != self._in_flight:
            return False
        self._in_flight = ""
        self._due = now if stored else now + RECORD_PAUSE_SECONDS
        if stored:
            del self._over[name]
            self._done.add(name)
            living = {record.as_document().name for record in self._seen.values()}
            self._done &= living
        return True

    def _add(self, record: Record) -> None:
        document = record.as_document()
        if record.suppressed and document.name not in self._done and len(self._over) < MOST_RECORDS:
            self._over[document.name] = document


def _refusal(record: Record, number: int, first: int) -> Refusal:
    signal = dict(record.workload).get("signal", 0)
    return Refusal(record.reason, number, signal if isinstance(signal, int) else 0, first, record.last)


def _read_records(directory: str) -> Iterator[Record]:
    """Yield the records that only root, or this user, can have written; skip everything else."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, parent)
        state = os.open(STATE, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
        stack.callback(os.close, state)
        if not is_private(os.fstat(state)):
            return
        entries = stack.enter_context(os.scandir(state))
        for entry in islice((entry for entry in entries if _NAME.fullmatch(entry.name)), MOST_RECORDS):
            record = _parse(entry.name, _read(state, entry.name))
            if record is not None:
                yield record


def _read(state: int, name: str) -> bytes:
    try:
        fd = os.open(name, _FLAGS, dir_fd=state)
    except OSError:
        return b""
    try:
        status = os.fstat(fd)
        fit = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= MOST_BYTES
        return os.read(fd, MOST_BYTES) if fit and is_private(status) else b""
    except OSError:
        return b""
    finally:
        os.close(fd)


def _parse(name: str, text: bytes) -> Record | None:
    """Return a record; None for one that is damaged or of a reason we do not know."""
    pairs = {key: unquote_to_bytes(value) for key, _, value in (x.partition(b"=") for x in text.split(b"\n"))}
    reason = pairs.get(b"reason", b"").decode("ascii", "replace")
    counts = [pairs.get(key.encode(), b"") for key in _COUNTS]
    if reason not in REFUSALS or not all(re.fullmatch(rb"[0-9]{1,15}", count) for count in counts):
        return None
    told = {
        key: pairs.get(key.encode(), b"") for key in ("exe", "container_id", "pod_uid", "origin", "signal")
    }
    workload = read_attributes({ATTRIBUTE_PREFIX + key: value for key, value in told.items() if value})
    kept, suppressed, first, last, seconds = map(int, counts)
    vital = pairs.get(b"vital", b"0")  # helpers of release 0.1.0 kept none
    kept_vital = min(suppressed, int(vital)) if re.fullmatch(rb"[0-9]{1,15}", vital) else 0
    return Record(name, reason, kept, suppressed, kept_vital, first, last, seconds, tuple(workload.items()))

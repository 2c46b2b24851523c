"""Owns the watch on the kernel log: reads new records, counts the losses among them, and saves the position."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import structlog

from core_dump_collector.losses import kernellog, position
from core_dump_collector.losses.documents import LossDocuments
from core_dump_collector.losses.ledger import GRACE_SECONDS, Kind, Ledger, Loss
from core_dump_collector.losses.messages import Drop, Dropped, OomKilled, Suppressed, parse
from core_dump_collector.losses.position import Position
from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from core_dump_collector.jobs import Document
    from core_dump_collector.losses.counters import LossMetrics
    from core_dump_collector.losses.kernellog import Line, Reader
    from core_dump_collector.losses.messages import Event
    from core_dump_collector.node.suppressed import Refusal
    from core_dump_collector.observation import Observer

log = structlog.get_logger()

REOPEN_SECONDS = 60.0
"""Pause between two attempts to open a log that this process may not read."""
SCRAPED_SECONDS = 65.0
"""Delay of the first reading after a restart: a scrape must see zeros before earlier losses are counted."""
SAVE_SECONDS = 60.0
"""Pause between two saved positions while the log reports no crash."""
_MOST_NAMES = 20_000
_NAME = re.compile(rb"core-(.{0,60}?)-(\d{9,12})-\d{1,10}-(\d{1,3})(?:[-.].*)?", re.DOTALL)
"""Matches the name of a dump. The kernel and `dd` do not escape the name of the thread."""
_MICRO = 1_000_000
_SLACK = 60 * _MICRO
"""The kernel's clock may be ahead of CLOCK_MONOTONIC by so much."""


class _Crash(NamedTuple):
    """A crash as the name of its dump describes it."""

    comm: bytes
    timestamp: int
    """Unix seconds."""
    signal: int


class KernelLog:
    """Counts the crashes without a dump that the kernel log reports.

    Args:
        directory: the watch directory.
        metrics: where losses are counted.
        observer: is told when the position cannot be saved.
        sees_node: whether the node's programs can be looked at.
        open_reader: opens the log; None if it is not wanted.
    """

    def __init__(
        self,
        directory: str,
        metrics: LossMetrics,
        observer: Observer,
        *,
        sees_node: bool,
        open_reader: Callable[[], Reader] | None = kernellog.open_reader,
    ) -> None:
        """Prepare; `follow` opens the log and reads it."""
        self._directory, self._metrics, self._sees_node = directory, metrics, sees_node
        self._open_reader = open_reader
        self._reader: Reader | None = None
        self.obstacle = "KERNEL_LOG=off" if open_reader is None else "it was not opened yet"
        """Why the log is not read; empty while it is read."""
        self._reopen_due = self._read_due = 0.0
        self._boot_id = kernellog.boot_id()
        self._ledger = Ledger(GRACE_SECONDS)
        self._documents = LossDocuments(self._boot_id)
        self._noted: OrderedDict[str, None] = OrderedDict()
        self._offset = time.time() - time.monotonic()
        self._started = int(time.monotonic() * _MICRO)
        self._last_read = time.time()
        self._before = Position(self._boot_id)
        self._position = self._before
        self._save_due = 0.0
        self._saved: Position | None = None
        self._saver = position.Saver(directory, observer)

    def follow(self, refusals: Iterable[Refusal] = ()) -> None:
        """Read new records and judge them; call this at every heartbeat.

        Raises:
            OSError: the log or the position cannot be read or written.
        """
        self._open()
        for refusal in refusals:
            self._metrics.see("refused", refusal.number)
            self.note_refusal(refusal)
        if self._reader is None or time.monotonic() < self._read_due:
            return
        now = time.time()
        try:
            batch = self._reader.read()
        except OSError:
            self._close_reader()
            self._tell_obstacle("it can no longer be read")
            raise
        if batch.lost:
            self._metrics.lines_lost.inc(batch.lost)
            log.warning("kernel log records were overwritten before they were read", records=batch.lost)
        told = sum(self._take(line, now) for line in batch.lines)
        self._last_read = now
        self._judge(now)
        self._save(at_once=told > 0)

    # Reading

    def _open(self) -> None:
        now = time.monotonic()
        if self._reader is not None or self._open_reader is None or now < self._reopen_due:
            return
        self._reopen_due = now + REOPEN_SECONDS
        try:
            reader = self._open_reader()
        except OSError as error:
            self._tell_obstacle(f"{error.strerror or error}; it takes CAP_SYSLOG")
            return
        self._reader = reader
        self._resume()
        self.obstacle = ""
        self._metrics.watch(on=True)
        log.info("the kernel log is watched", by=reader.name)

    def _resume(self) -> None:
        """Continue at the saved position; without one begin at the end of the log, after a reboot at its start."""
        before = position.load(self._directory)
        now = int(time.monotonic() * _MICRO)
        if before is not None and before.boot_id == self._boot_id and not before.is_possible(now + _SLACK):
            before = None  # users who can write to the directory must not hide losses
        self._read_due = time.monotonic() + (SCRAPED_SECONDS if before is not None else 0)
        if before is None:
            before = Position(self._boot_id, needed=now, read=now, judged=now)
        elif before.boot_id != self._boot_id:
            before = Position(self._boot_id)
        self._before = self._position = before

    def _tell_obstacle(self, why: str) -> None:
        self._metrics.watch(on=False)
        if why != self.obstacle:
            self.obstacle = why
            log.warning("the kernel log is not watched: losses in the kernel are not counted", why=why)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _take(self, line: Line, now: float) -> bool:
        """Process one record; tell whether it reports a crash."""
        before = self._before
        is_later = (
            0 <= before.sequence < line.sequence
        )  # records of two CPUs may have their times in another order
        if line.microseconds <= before.needed and not is_later:
            return False
        self._note_gap(line)
        event = parse(line.facility, line.text)
        if event is None:
            return False
        seconds = self._unix_time(line, now)
        for loss in self._ledger.add(self._refine(event), seconds):
            self._lose(loss, line.microseconds, counted=line.microseconds <= self._before.read)
        if line.microseconds > self._before.read:
            self._count_rest(event)
        return True

    def _note_gap(self, line: Line) -> None:
        """Advance the position; count the records that were overwritten while no collector ran."""
        place = self._position
        sequence = max(place.sequence, line.sequence)
        if 0 <= place.sequence == self._before.sequence and line.sequence > place.sequence + 1:
            self._metrics.lines_lost.inc(line.sequence - place.sequence - 1)
        read = max(place.read, line.microseconds)
        self._position = replace(place, sequence=sequence, read=read)

    def _unix_time(self, line: Line, now: float) -> float:
        """Return when a record was written. Clocks drift apart, but a new record is younger than the last reading."""
        seconds = line.microseconds / _MICRO
        if line.microseconds <= self._started:
            return min(seconds + self._offset, now)
        return min(max(seconds + self._offset, self._last_read), now)

    def _kernel_time(self, seconds: float) -> int:
        """Return a Unix time in microseconds of the kernel's clock."""
        return int((seconds - self._offset) * _MICRO)

    def _refine(self, event: Event) -> Event:
        """Distinguish a missing helper from one that cannot be executed, if the node's files are visible."""
        if isinstance(event, Dropped) and event.reason is Drop.HELPER_NOT_STARTED and event.program:
            program = event.program.decode("utf-8", "surrogateescape")
            if self._sees_node and program.startswith("/") and not _is_file(program):
                return Dropped(Drop.HELPER_MISSING, event.comm, event.pid)
        return event

    def _count_rest(self, event: Event) -> None:
        if isinstance(event, OomKilled):
            self._metrics.oom_kills.inc()
        elif isinstance(event, Suppressed) and event.faults:
            self._metrics.faults_suppressed.inc(event.number)

    # Judging

    def _judge(self, now: float) -> None:
        if self._ledger.must_look_for_dumps(now):
            for name in _names(self._directory):
                self._note_found(name)
        for loss in self._ledger.settle(now):
            microseconds = self._kernel_time(loss.seconds)
            counted = loss.kind is Kind.NO_TRACE and microseconds <= self._before.judged
            self._lose(loss, microseconds, counted=counted)
            if loss.kind is Kind.NO_TRACE:
                judged = max(self._position.judged, microseconds)
                self._position = replace(self._position, judged=judged)

    def _lose(self, loss: Loss, microseconds: int, *, counted: bool) -> None:
        self._documents.add(loss, microseconds)
        if counted:
            return
        self._metrics.lose(loss.kind, loss.reason, loss.number)
        log.warning(
            "a crash left no dump",
            by=loss.kind,
            reason=loss.reason,
            comm=printable(loss.comm.decode("utf-8", "backslashreplace"), 100),
            pid=loss.pid,
            number=loss.number,
        )

    def note_refusal(self, refusal: Refusal) -> None:
        """Note dumps that the helper refused and recorded."""
        self._ledger.explain_by_record(refusal.first, refusal.last, refusal.signal, refusal.number)

    def _note_found(self, name: str) -> None:
        """Note a dump in the directory; thousands of old ones must not displace explanations of new faults."""
        crash = _crash_of(name)
        if crash is not None and self._ledger.may_explain(crash.timestamp):
            self._note(name, crash)

    def note_dump(self, name: str) -> None:
        """Note a dump that exists or is stored: its crash is no loss."""
        crash = _crash_of(name)
        if crash is not None:
            self._note(name, crash)

    def _note(self, name: str, crash: _Crash) -> None:
        if name not in self._noted:
            self._noted[name] = None
            while len(self._noted) > _MOST_NAMES:
                self._noted.popitem(last=False)
            self._ledger.explain_by_dump(*crash)

    def lose_partial(self, name: str) -> None:
        """Count an empty partial dump: its helper was killed before it had written a byte."""
        crash = _crash_of(name)
        if crash is not None and self._metrics.is_watching:
            self._note(name, crash)
            loss = Loss(Kind.HELPER, "killed", float(crash.timestamp), crash.comm, signal=crash.signal)
            self._lose(loss, max(0, self._kernel_time(loss.seconds)), counted=False)

    # Records and the position

    def next_document(self, wall_clock: float, now: float) -> Document | None:
        """Return a record to store, or None (`LossDocuments.next_document`)."""
        return self._documents.next_document(wall_clock, now)

    def finish(self, name: str, now: float, *, stored: bool) -> bool:
        """Take the result of a record (`LossDocuments.finish`)."""
        return self._documents.finish(name, now, stored=stored)

    def _save(self, *, at_once: bool) -> None:
        now = time.monotonic()
        place = self._position
        if not (at_once or now >= self._save_due) or not self._boot_id:
            return
        oldest = [place.read]
        fault, record = self._ledger.oldest_fault, self._documents.oldest_microseconds
        oldest += [self._kernel_time(fault) - 1] if fault is not None else []
        oldest += [record - 1] if record is not None else []
        needed = max(0, min(oldest))
        saved = replace(place, needed=needed)
        if saved != self._saved:
            self._position = self._saved = saved
            self._saver.save(saved)
        self._save_due = now + SAVE_SECONDS

    def close(self) -> None:
        """Save the position, and close the log."""
        if self._reader is not None:
            self._save(at_once=True)
            self._close_reader()
        self._saver.end()


def _crash_of(name: str) -> _Crash | None:
    """Return the crash of a dump; None if the name is not that of a dump."""
    match = _NAME.fullmatch(os.fsencode(name))
    return None if match is None else _Crash(match[1], int(match[2]), int(match[3]))


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _names(directory: str) -> list[str]:
    """Return the names in the watch directory, at most _MOST_NAMES."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False)]
    except OSError:
        return []

"""Owns the watch on the kernel log: it reads, has losses judged and counts them, and remembers how far it came."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

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
"""Between two attempts to open a log that may not be read."""
SCRAPED_SECONDS = 65.0
"""From the start to the first reading after another collector: a scrape must see zeros before what is made up for."""
SAVE_SECONDS = 60.0
"""Between two saved positions while the log tells of no crash."""
_MOST_NAMES = 20_000
_NAME = re.compile(rb"core-(.{0,60}?)-(\d{9,12})-\d{1,10}-(\d{1,3})(?:[-.].*)?", re.DOTALL)
"""Of a dump, also as a `dd` or a kernel writes it, which leave the name of the thread as it is."""
_MICRO = 1_000_000
_SLACK = 60 * _MICRO
"""As far as the kernel's clock may be ahead of CLOCK_MONOTONIC."""


class KernelLog:
    """Counts what the kernel log tells of crashes without a dump.

    Args:
        directory: the watch directory.
        metrics: where losses are counted.
        observer: is told when the position cannot be saved.
        sees_node: whether the node's programs can be looked at.
        open_reader: opens the log; None if it is not to be read.
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
        """Begin where the last collector has ended; nothing is read yet."""
        self._directory, self._metrics, self._sees_node = directory, metrics, sees_node
        self._open_reader = open_reader
        self._reader: Reader | None = None
        self.obstacle = "KERNEL_LOG=off" if open_reader is None else "it was not opened yet"
        """Why the log is not read; empty if it is."""
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
        """Read what is new, and judge it; to be called with every heartbeat.

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
            self._close_reader("it can no longer be read")
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
        """Begin where the last collector has ended; at the end if there was none, at the start of a new boot."""
        before = position.load(self._directory)
        now = int(time.monotonic() * _MICRO)
        if before is not None and before.boot_id == self._boot_id and not before.is_possible(now + _SLACK):
            before = None  # whoever can write to the directory must not hide losses
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

    def _close_reader(self, why: str) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._tell_obstacle(why)

    def _take(self, line: Line, now: float) -> bool:
        """Take one record; tell whether it says anything of a crash."""
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
        """Advance the position; count the records between the last collector's and the first one that is left."""
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

    def _refine(self, event: Event) -> Event:
        """Tell a helper that is missing from one that cannot be executed, where the node's files are in sight."""
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
            microseconds = int((loss.seconds - self._offset) * _MICRO)
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
        """Note a dump in the directory; thousands of old ones must not push out what explains new faults."""
        named = _NAME.fullmatch(os.fsencode(name))
        if named is not None and self._ledger.may_explain(int(named[2])):
            self.note_dump(name)

    def note_dump(self, name: str) -> None:
        """Note a dump that exists, or is stored: its crash is no loss."""
        named = _NAME.fullmatch(os.fsencode(name))
        if named is not None and name not in self._noted:
            self._noted[name] = None
            while len(self._noted) > _MOST_NAMES:
                self._noted.popitem(last=False)
            self._ledger.explain_by_dump(named[1], int(named[2]), int(named[3]))

    def lose_partial(self, name: str) -> None:
        """Count a partial dump that held nothing: its helper was killed before the first byte was on disk."""
        named = _NAME.fullmatch(os.fsencode(name))
        if named is not None and self._metrics.is_watching:
            self.note_dump(name)
            seconds = float(int(named[2]))
            loss = Loss(Kind.HELPER, "killed", seconds, named[1], signal=int(named[3]))
            self._lose(loss, max(0, int((seconds - self._offset) * _MICRO)), counted=False)

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
        oldest += [int((fault - self._offset) * _MICRO) - 1] if fault is not None else []
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
            self._reader.close()
            self._reader = None
        self._saver.end()


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

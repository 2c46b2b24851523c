"""Owns the loop of `core-dump-collector run`: events in, jobs out, results counted, and the shutdown.

One thread. Everything it waits for is a descriptor: inotify, and a pipe that signals and finished jobs
write to. What must survive is on disk; a daemon killed at any point loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.backlog import Backlog
from core_dump_collector.breaker import Brake
from core_dump_collector.config import describe
from core_dump_collector.errors import ConfigError
from core_dump_collector.health import HEARTBEAT_SECONDS, Health, Server
from core_dump_collector.jobs import Job, Outcome, RecordResult, UploadResult
from core_dump_collector.metrics import Metrics
from core_dump_collector.node import corepattern, dumpfile, scan
from core_dump_collector.node.drops import DropRecords
from core_dump_collector.node.watch import Watch
from core_dump_collector.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.config import Settings

log = structlog.get_logger()

_SCAN_SLICE = 500
"""Names looked at before events and results get their turn."""
_STOPPING = {signal.SIGTERM, signal.SIGINT}


class Daemon:
    """Collects one directory until it is told to stop."""

    def __init__(self, directory: str, settings: Settings) -> None:
        """Take hold of everything that can fail: the directory, the port, the start-up file.

        Raises:
            ConfigError: one of them cannot be had.
        """
        self._directory = directory
        self._settings = settings
        self._metrics = Metrics()
        self._backlog = Backlog(longest_pause_seconds=settings.retry_seconds)
        self._brake = Brake()
        self._drops = DropRecords(directory)
        self._stop_requests = 0
        self._watch = _open_watch(directory)
        try:
            self._health = Health(settings.startup_file)
            self._server = Server(settings, self._health, self._metrics.registry)
        except BaseException:
            self._watch.close()
            raise
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pool = Pool(settings.workers, settings.upload_options(), self._wake)
        self._scan: Iterator[scan.Found] | None = None
        self._scan_due = time.monotonic()
        self._beat_due = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        self._selector.register(self._watch, selectors.EVENT_READ, self._on_change)

    @property
    def port(self) -> int:
        """Return the port of /metrics."""
        return self._server.port

    def run(self) -> None:
        """Collect until SIGTERM or SIGINT, then shut down in order; a second signal ends it at once."""
        for number in _STOPPING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write)
        log.info("started", directory=self._directory, port=self.port, **describe(self._settings))
        try:
            while not self._stop_requests:
                self._turn()
        finally:
            self._shut_down()

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat(now)
        if now >= self._scan_due:
            self._begin_scan(now)
        self._advance_scan()
        self._submit()
        self._gauge()
        for key, _ in self._selector.select(self._pause()):
            key.data()

    def _pause(self) -> float:
        if self._scan is not None:
            return 0.0
        due = [self._beat_due, self._scan_due]
        next_job = self._backlog.next_due()
        if next_job is not None and self._pool.has_room:
            if not self._brake.is_on:
                due.append(next_job)
            elif not self._pool.in_flight:
                due.append(max(next_job, self._brake.until))
        return max(0.0, min(due) - time.monotonic())

    # What comes in

    def _begin_scan(self, now: float) -> None:
        self._scan_due = now + self._settings.scan_seconds
        self._backlog.starved = False
        self._scan = scan.scan(self._directory, self._settings.file_patterns)

    def _advance_scan(self) -> None:
        if self._scan is None:
            return
        try:
            found = list(islice(self._scan, _SCAN_SLICE))
        except OSError as error:
            log.error("cannot read the watch directory", error=error.strerror)  # noqa: TRY400  no trace needed
            found = []
        for item in found:
            self._note(item)
        if len(found) < _SCAN_SLICE:
            self._scan = None
            if not self._health.is_ready and self._watch.is_current():
                self._health.set_ready(ready=True)
                log.info("ready", waiting=len(self._backlog))

    def _on_change(self) -> None:
        changes = self._watch.read()
        for name in changes.names:
            found = scan.look(self._directory, name, patterns=self._settings.file_patterns)
            if found is not None:
                self._note(found)
        if changes.overflow:
            self._metrics.overflows.inc()
            log.warning("inotify dropped events, scanning the directory")
            self._scan_due = 0.0
        if changes.lost:
            self._lose_watch()

    def _note(self, found: scan.Found) -> None:
        name = self._take_over(found.name) if found.partial else found.name
        if name is None:
            soon = time.monotonic() + dumpfile.ABANDONED_SECONDS + 1
            self._scan_due = min(self._scan_due, soon)
        elif name:
            now = time.monotonic()
            self._backlog.add(name, now, size_bytes=found.size_bytes, written_at=found.written_at)

    def _take_over(self, partial: str) -> str | None:
        """Salvage a partial whose helper is dead; return as `dumpfile.salvage` does."""
        try:
            name = dumpfile.salvage(self._directory, partial)
        except OSError as error:
            log.warning("cannot take over a partial dump", file=partial, error=error.strerror)
            return None
        if name:
            self._metrics.salvaged.inc()
            log.warning("took over an abandoned partial dump", file=name)
        elif name is not None:
            log.warning("removed an abandoned partial dump: nothing in it", file=partial)
        return name

    def _lose_watch(self) -> None:
        if self._health.is_ready:
            log.error("the watch directory was replaced or is gone", directory=self._directory)
            self._metrics.watch_losses.inc()
            self._health.set_ready(ready=False)
        self._metrics.watched.set(0)
        self._selector.unregister(self._watch)
        with contextlib.suppress(OSError):
            self._watch.rearm()
            self._scan_due = 0.0
            log.info("watching the directory again")
        self._selector.register(self._watch, selectors.EVENT_READ, self._on_change)

    # What goes out

    def _submit(self) -> None:
        if self._pool.has_room:
            document = self._drops.next_document(time.time(), time.monotonic())
            if document is not None:
                self._pool.submit(document)
        while self._pool.has_room and self._brake.allows(time.monotonic(), self._pool.in_flight):
            name = self._backlog.take(time.monotonic())
            if name is None:
                break
            self._pool.submit(Job(self._directory, name))
        if self._backlog.starved and len(self._backlog) < self._backlog.capacity // 2:
            self._scan_due = min(self._scan_due, time.monotonic())

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self._wake_read, 4096)
            self._stop_requests += sum(number in _STOPPING for number in numbers)
        for result in self._pool.collect():
            if isinstance(result, RecordResult):
                self._settle_record(result)
            else:
                self._settle(result)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def _settle_record(self, result: RecordResult) -> None:
        self._drops.settle(result.name, time.monotonic(), stored=result.stored)
        shown = "uploaded" if result.stored else "retry"
        log.info("record of refused dumps", file=result.name, result=shown, detail=result.detail)

    def _settle(self, result: UploadResult) -> None:
        now = time.monotonic()
        name = result.name
        self._metrics.observe(result)
        shown = {"file": name, "key": result.key, "detail": result.detail or None}
        shown = {k: v for k, v in shown.items() if v is not None}
        match result.outcome:
            case Outcome.RETRY if result.retry_reason is not None:
                self._brake.fail(result.retry_reason, now)
                pause = self._backlog.retry(name, now, needs_operator=result.retry_reason.needs_operator)
                log.warning(
                    "will try again", reason=result.retry_reason, pause_seconds=round(pause, 1), **shown
                )
            case Outcome.UPLOADED | Outcome.ALREADY_STORED:
                self._brake.succeed()
                gone = not os.path.lexists(os.path.join(self._directory, name))
                self._backlog.finish(name, now, gone=gone)
                log.info(
                    result.outcome.value,
                    bytes=result.stored_bytes,
                    seconds=round(result.seconds, 3),
                    truncated=result.truncated,
                    **shown,
                )
            case Outcome.VANISHED | Outcome.BUSY:
                self._backlog.finish(name, now)
                log.debug(result.outcome.value, **shown)
            case _:
                self._backlog.finish(name, now)
                log.warning(result.outcome.value, **shown)

    # What others see

    def _beat(self, now: float) -> None:
        self._beat_due = now + HEARTBEAT_SECONDS
        self._health.beat()
        if not self._watch.is_current():
            self._lose_watch()
        metrics = self._metrics
        metrics.watched.set(int(self._watch.is_current()))
        metrics.backlog_oldest.set(self._backlog.oldest_seconds(time.time()))
        metrics.pattern_ours.set(int(corepattern.is_ours(corepattern.read(), self._directory)))
        with contextlib.suppress(OSError):
            metrics.observe_disk(self._directory)
            metrics.insecure.set(int(scan.is_insecure(self._directory)))
            metrics.quarantined.set(scan.count_quarantined(self._directory))
            for reason, number in self._drops.read_new().items():
                metrics.dropped.labels(reason).inc(number)

    def _gauge(self) -> None:
        metrics = self._metrics
        metrics.backlog_files.set(self._backlog.waiting)
        metrics.backlog_bytes.set(self._backlog.size_bytes)
        metrics.inflight.set(self._backlog.in_flight)
        missed = self._pool.rebuilds - metrics.rebuilds._value.get()  # noqa: SLF001  the only reader there is
        if missed > 0:
            metrics.rebuilds.inc(missed)
            log.error("a worker process died; the pool was started anew")

    # The end

    def _shut_down(self) -> None:
        """Stop in stages: no new files, uploads under way until the deadline, workers, files, port."""
        started = time.monotonic()
        deadline = started + self._settings.shutdown_seconds
        self._health.set_ready(ready=False)
        log.info("stopping", in_flight=self._pool.in_flight, waiting=self._backlog.waiting)
        self._selector.unregister(self._watch)
        self._watch.close()
        while self._pool.in_flight and self._stop_requests < 2:  # noqa: PLR2004  the second signal
            left = min(deadline, self._beat_due) - time.monotonic()
            if deadline <= time.monotonic():
                break
            for key, _ in self._selector.select(max(0.0, left)):
                key.data()
            if time.monotonic() >= self._beat_due:
                self._health.beat()
                self._beat_due = time.monotonic() + HEARTBEAT_SECONDS
        if self._pool.in_flight:
            log.warning("uploads cut off; the files are on disk", in_flight=self._pool.in_flight)
        self._pool.kill()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._health.end()
        self._server.stop()
        log.info("stopped", left=len(self._backlog), seconds=round(time.monotonic() - started, 1))


def _open_watch(directory: str) -> Watch:
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return Watch(directory)
    except OSError as error:
        raise ConfigError(
            f"WATCH_DIR={directory}: {error.strerror}; takes an existing directory that this user can read"
        ) from None

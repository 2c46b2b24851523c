"""Owns the loop of `core-dump-collector run`: events in, jobs out, results applied, and the shutdown.

One thread. It waits on descriptors only: inotify, the pool's, and a pipe that signals write to. The loop observes and
decides; workers do all work on dumps. State that must survive is on disk, so a daemon killed at any point loses
nothing.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from socket import gethostname
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.arrivals import Arrivals
from core_dump_collector.backlog import LIGHT_BYTES, Backlog
from core_dump_collector.breaker import CircuitBreaker
from core_dump_collector.config import describe
from core_dump_collector.errors import ConfigError
from core_dump_collector.health import HEARTBEAT_SECONDS, Health, Server
from core_dump_collector.jobs import Job, Probe, Salvage
from core_dump_collector.landing import Overview
from core_dump_collector.losses import kernellog
from core_dump_collector.losses.watcher import KernelLog
from core_dump_collector.metrics import Metrics, raise_to
from core_dump_collector.modules import ModuleUploads
from core_dump_collector.node import corepattern, scan
from core_dump_collector.node.installed import identify_helper
from core_dump_collector.node.suppressed import SuppressedCrashes
from core_dump_collector.observation import Look, Observer
from core_dump_collector.pool import Pool
from core_dump_collector.processes import Workers
from core_dump_collector.reachability import Reachability
from core_dump_collector.results import Results
from core_dump_collector.summary import facts
from core_dump_collector.workers import choose_temporary_directory

if TYPE_CHECKING:
    from core_dump_collector.config import Settings
    from core_dump_collector.logs import LogWriter

log = structlog.get_logger()

_STOPPING = {signal.SIGTERM, signal.SIGINT}


class Daemon:
    """Collects one directory until it is told to stop."""

    def __init__(self, directory: str, settings: Settings, log_writer: LogWriter) -> None:
        """Acquire everything that a wrong setting can deny: the directory, the port, the start-up file.

        Raises:
            ConfigError: one of them is not available.
        """
        _require_directory(directory)
        self._directory = directory
        self._settings = settings
        self._metrics = Metrics()
        self._observer = Observer(self._metrics.unobserved)
        self._backlog = Backlog(longest_pause_seconds=settings.retry_seconds)
        self._breaker = CircuitBreaker()
        self._store = Reachability()
        self._records = SuppressedCrashes(directory)
        self._workers = Workers()
        self._kernel_log = _watch_kernel_log(
            directory, settings, self._metrics, self._records, self._observer
        )
        self._arrivals = Arrivals(directory, settings, self._backlog, self._observer, self._metrics)
        self._results = Results(
            *(directory, self._backlog, self._arrivals.partials, self._breaker, self._store),
            *(self._records, self._kernel_log, self._metrics),
        )
        self._log_writer = log_writer
        self._stop_requests = 0
        self._quarantined = 0
        self._health = Health(settings.startup_file, self._observer)
        self._server = Server(settings, self._health, self._metrics.registry)
        choose_temporary_directory(directory)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pool = Pool(settings.upload_options())
        self._modules = ModuleUploads(directory, settings, self._metrics, self._observer)
        self._beat_due = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        self._selector.register(self._pool, selectors.EVENT_READ, self._on_results)

    @property
    def port(self) -> int:
        """Return the port of /metrics."""
        return self._server.port

    def run(self) -> bool:
        """Collect until SIGTERM or SIGINT, then shut down in order; a second signal ends it at once.

        Return False if a worker is left that nothing can end.
        """
        for number in _STOPPING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        if not {"node_name"} & self._settings.model_fields_set and self._settings.node_name != gethostname():
            log.warning("the host name cannot stand in keys; set NODE_NAME", host_name=gethostname())
        log.info("started", directory=self._directory, port=self.port, **describe(self._settings))
        try:
            self._arrivals.attach(self._selector)  # before the first scan, so that nothing falls between
            while not self._stop_requests:
                self._turn()
        finally:
            clean = self._shut_down()
        return clean

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat(now)
        self._tick(now)
        self._arrivals.advance(now)
        busy = self._backlog.in_flight > 0
        self._modules.advance(now, reachable=self._store.is_known and self._store.reason is None, busy=busy)
        self._pool.share_rate(shared=self._modules.is_running)
        self._report_readiness()
        self._submit()
        self._gauge()
        for key, _ in self._selector.select(self._pause()):
            key.data()

    def _pause(self) -> float:
        due: list[float | None] = [self._beat_due, self._arrivals.due, self._modules.due, self._pool.due]
        if self._pool.room():
            due += [self._store.probe_due, self._arrivals.partials.next_due()]
        if self._pool.room() or self._pool.room(heavy=True):
            due.append(self._next_upload())
        return max(0.0, min(moment for moment in due if moment is not None) - time.monotonic())

    def _tick(self, now: float) -> None:
        if now >= self._pool.due:
            self._pool.tick(now)

    def _next_upload(self) -> float | None:
        due = self._backlog.next_due(light=self._pool.room() > 0, heavy=self._pool.room(heavy=True) > 0)
        if due is None or not self._breaker.is_open:
            return due
        return None if self._pool.in_flight else max(due, self._breaker.until)

    # Jobs out, results in

    def _submit(self) -> None:
        now = time.monotonic()
        if self._pool.room() and now >= self._store.probe_due:
            self._store.start_probe()
            self._pool.submit(Probe())
        while self._pool.room() and (partial := self._arrivals.next_partial(now)) is not None:
            self._arrivals.partials.start(partial)
            self._pool.submit(Salvage(self._directory, partial))
        for owner in (self._records, self._kernel_log):
            document = owner.next_document(time.time(), now) if self._pool.room() else None
            if document is not None:
                self._pool.submit(document)
        while self._breaker.allows(now, self._pool.in_flight):
            light, heavy = self._pool.room() > 0, self._pool.room(heavy=True) > 0
            name = self._backlog.take(now, light=light, heavy=heavy)
            if name is None:
                break
            sighting = self._backlog.sighting(name, now)
            self._pool.submit(Job(self._directory, name, sighting), heavy=sighting.size_bytes > LIGHT_BYTES)
        pause = self._backlog.scan_pause()
        if pause is not None:
            self._arrivals.scan_again(pause)

    def _discard(self, now: float) -> None:
        """Let workers delete what could not be uploaded for DISCARD_AFTER_SECONDS, if that is set."""
        age, room = self._settings.discard_after_seconds, self._pool.room()
        if age and room:
            down = self._store.is_down_for(age, now)
            for name in self._backlog.take_expired(now, age, most=room, untried=down):
                self._pool.submit(Job(self._directory, name, self._backlog.sighting(name, now), discard=True))

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self._wake_read, 4096)
            self._stop_requests += sum(number in _STOPPING for number in numbers)

    def _on_results(self) -> None:
        for result in self._pool.collect():
            self._results.apply(result)

    # What others see

    def _beat(self, now: float) -> None:
        """Repeat every look whose subject changes without an event. None of them can end the loop."""
        self._beat_due = now + HEARTBEAT_SECONDS
        self._pool.kill_hung(now)
        self._health.beat(stuck=self._pool.is_stuck(now))
        self._arrivals.follow()
        self._discard(now)
        metrics, look, directory = self._metrics, self._observer.look, self._directory
        metrics.backlog_oldest.set(self._backlog.oldest_seconds(time.time()))
        look(Look.FREE_SPACE, lambda: metrics.observe_disk(directory))
        look(Look.CORE_PATTERN, self._observe_pattern)
        look(Look.OWNER, lambda: metrics.insecure.set(int(scan.is_insecure(directory))))
        look(Look.QUARANTINE, self._observe_quarantine)
        look(Look.HELPER, self._observe_helper)
        look(Look.WORKERS, lambda: metrics.observe_workers(self._workers.measure()))
        metrics.refused_bytes.set(self._results.measure_refused())
        refusals = look(Look.RECORDS, self._records.take_new) or []
        for refusal in refusals:
            metrics.dropped.labels(refusal.reason).inc(refusal.number)
        look(Look.KERNEL_LOG, lambda: self._kernel_log.follow(refusals))
        look(Look.OVERVIEW, self._show_overview)

    def _observe_pattern(self) -> None:
        pattern = corepattern.read()
        if self._metrics.observe_pattern(ours=corepattern.is_ours(pattern, self._directory)):
            log.error("something else took the core pattern: crashes leave no dump here", pattern=pattern)

    def _observe_quarantine(self) -> None:
        self._quarantined, size = scan.measure_quarantined(self._directory)
        self._metrics.observe_quarantine(self._quarantined, size)

    def _observe_helper(self) -> None:
        version, config = identify_helper()
        version = version or self._results.helper_version
        if version or config:
            self._metrics.observe_helper(version, config)

    def _show_overview(self) -> None:
        known = facts(self._directory, self._backlog, self._store, self._kernel_log, self._quarantined)
        self._health.overview = Overview(self._settings.node_name, known, self._results.recent)

    def _report_readiness(self) -> None:
        """Be ready while the directory is there, its last scan succeeded, and the store takes dumps."""
        collecting, store = self._arrivals.is_complete, self._store
        obstacle = ""
        if not collecting:
            obstacle = "the watch directory is not there, or was not scanned yet"
        elif not store.is_known:
            obstacle = "the store has not answered yet"
        elif store.reason is not None:
            obstacle = f"the store does not take dumps: {store.reason}"
        if (collecting, obstacle) != (self._health.is_collecting, self._health.obstacle):
            self._health.set_state(collecting=collecting, obstacle=obstacle)
            if obstacle:
                write = log.warning if store.is_known else log.info
                write("not ready", why=obstacle)
            else:
                log.info("ready", waiting=len(self._backlog))
        if store.is_known:
            self._metrics.observe_store(reachable=store.reason is None, reason=store.reason or "")

    def _gauge(self) -> None:
        metrics = self._metrics
        metrics.backlog_files.set(self._backlog.waiting)
        metrics.backlog_bytes.set(self._backlog.size_bytes)
        metrics.inflight.set(self._backlog.in_flight)
        metrics.connections.set(self._pool.connections)
        raise_to(metrics.log_lines_dropped, self._log_writer.dropped)
        if raise_to(metrics.rebuilds, self._pool.rebuilds):
            log.error("a worker process died; another takes its place")

    # The end

    def _shut_down(self) -> bool:
        """Stop in stages: no new files, uploads under way until the deadline, workers, files, port."""
        started = time.monotonic()
        deadline = started + self._settings.shutdown_seconds
        self._health.set_state(collecting=False, obstacle="stopping")
        log.info("stopping", in_flight=self._pool.in_flight, waiting=self._backlog.waiting)
        self._arrivals.close()
        self._observer.look(Look.KERNEL_LOG, self._kernel_log.close)
        self._modules.stop()
        while self._pool.in_flight > self._store.is_probing and self._stop_requests < 2:  # noqa: PLR2004  the second signal
            now = time.monotonic()
            self._tick(now)
            left = min(deadline, self._beat_due, self._pool.due) - now
            if deadline <= now:
                break
            for key, _ in self._selector.select(max(0.0, left)):
                key.data()
            if time.monotonic() >= self._beat_due:
                self._health.beat()
                self._beat_due = time.monotonic() + HEARTBEAT_SECONDS
        if self._pool.in_flight > self._store.is_probing:
            log.warning("uploads were cut off; their files are on disk", in_flight=self._pool.in_flight)
        clean = self._pool.kill()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._health.end()
        self._server.stop()
        log.info("stopped", left=len(self._backlog), seconds=round(time.monotonic() - started, 1))
        return clean


def _watch_kernel_log(
    directory: str, settings: Settings, metrics: Metrics, records: SuppressedCrashes, observer: Observer
) -> KernelLog:
    kernel_log = KernelLog(
        directory,
        metrics.losses,
        observer,
        sees_node=not corepattern.is_contained(),
        open_reader=kernellog.open_reader if settings.kernel_log == "auto" else None,
    )
    for refusal in records.known():
        kernel_log.note_refusal(refusal)
    return kernel_log


def _require_directory(directory: str) -> None:
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise ConfigError(
            f"WATCH_DIR={directory}: {error.strerror}; takes an existing directory that this user can read"
        ) from None

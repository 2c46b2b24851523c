"""Owns every metric. Only the daemon's own process touches them; labels are bounded."""

from __future__ import annotations

import os
import platform
import signal as signals
import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from core_dump_collector import __version__
from core_dump_collector.jobs import STORED_OUTCOMES, Outcome, RetryReason, UploadResult
from core_dump_collector.losses.counters import LossMetrics
from core_dump_collector.losses.messages import REFUSALS
from core_dump_collector.moduleevents import DROPPED, STORED
from core_dump_collector.observation import Look

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics import MetricWrapperBase

    from core_dump_collector.processes import Usage

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)
_LATENCY_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 86400, 7 * 86400)
_BYTES = tuple(float(4**n * 1024) for n in range(13))
"""1 KiB to 16 GiB."""
_SIGNALS = {int(s): s.name for s in signals.Signals}
_UPLOADS = (Outcome.UPLOADED, Outcome.ALREADY_STORED, Outcome.QUARANTINED)
_ENDS = {
    Outcome.UPLOADED: "stored",
    Outcome.ALREADY_STORED: "stored",
    Outcome.QUARANTINED: "quarantined",
    Outcome.DISCARDED: "discarded",
}
_SKIPPED = (Outcome.BUSY, Outcome.VANISHED, Outcome.REFUSED)


class Metrics:
    """Every metric of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        """Create all of them, each with its label values, so that rates are right from the first event."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of all samples, which nobody asks for
        self.registry = CollectorRegistry()
        self._shown_store: tuple[bool, str] | None = None
        self._shown_helper: tuple[str, str] | None = None
        self._was_ours = False
        self._add_uploads(self.registry)
        self._add_store(self.registry)
        self._add_dumps(self.registry)
        self._add_losses(self.registry)
        self._add_modules(self.registry)
        self._add_backlog(self.registry)
        self._add_directory(self.registry)
        self._add_helper(self.registry)
        self._add_process(self.registry)
        self.losses = LossMetrics(self.registry)

    def _add_uploads(self, r: CollectorRegistry) -> None:
        self.uploads = Counter(
            "core_dump_uploads", "Dumps that left the directory, by result.", ["result"], registry=r
        )
        self.skipped = Counter(
            "core_dump_files_skipped", "Files that were not uploaded, by reason.", ["reason"], registry=r
        )
        self.retries = Counter("core_dump_retries", "Failed attempts, by reason.", ["reason"], registry=r)
        self.upload_bytes = Counter("core_dump_upload_bytes", "Bytes stored in S3.", registry=r)
        _preset(self.uploads, _UPLOADS)
        _preset(self.skipped, _SKIPPED)
        _preset(self.retries, RetryReason)

    def _add_store(self, r: CollectorRegistry) -> None:
        self.upload_seconds = Histogram(
            "core_dump_upload_duration_seconds",
            "From opening a dump to its unlinking.",
            registry=r,
            buckets=_SECONDS,
        )
        self.last_success = Gauge(
            "core_dump_last_success_timestamp_seconds",
            "Unix time at which a dump was last stored; 0 before the first.",
            registry=r,
        )
        self.crash_to_bucket = Histogram(
            "core_dump_crash_to_bucket_seconds",
            "From a crash to its dump in the bucket.",
            registry=r,
            buckets=_LATENCY_SECONDS,
        )
        self.inflight = Gauge("core_dump_inflight_uploads", "Dumps being uploaded.", registry=r)
        self.connections = Gauge(
            "core_dump_upload_connections",
            "Connections that all workers together may use: more while throughput grows with them.",
            registry=r,
        )
        self.store_reachable = Gauge(
            "core_dump_store_reachable",
            "1 while the store takes dumps; 0 with the reason while it does not. Absent until it was asked.",
            ["reason"],
            registry=r,
        )

    def _add_dumps(self, r: CollectorRegistry) -> None:
        self.dump_bytes = Histogram(
            "core_dump_dump_size_bytes", "Size of a dump on disk.", registry=r, buckets=_BYTES
        )
        self.dumps = Counter("core_dump_dumps", "Dumps stored, by signal.", ["signal"], registry=r)
        self.truncated = Counter(
            "core_dump_dumps_truncated", "Dumps stored that are not whole, trimmed ones included.", registry=r
        )
        self.sensitive = Counter("core_dump_dumps_sensitive", "Dumps stored that are sensitive.", registry=r)
        self.salvaged = Counter(
            "core_dump_partials_salvaged", "Abandoned partial dumps that were salvaged.", registry=r
        )

    def _add_losses(self, r: CollectorRegistry) -> None:
        self.dropped = Counter(
            "core_dump_dumps_dropped", "Dumps the helper refused, by reason.", ["reason"], registry=r
        )
        self.discarded = Counter(
            "core_dump_dumps_discarded",
            "Dumps deleted by DISCARD_AFTER_SECONDS without being stored.",
            registry=r,
        )
        self.quarantined = Gauge(
            "core_dump_quarantined_files",
            "Dumps in quarantine/: the store refused them for good.",
            registry=r,
        )
        self.quarantined_bytes = Gauge("core_dump_quarantined_bytes", "Their size on disk.", registry=r)
        self.refused_bytes = Gauge(
            "core_dump_refused_bytes",
            "Size of files in the directory that the collector refuses to upload.",
            registry=r,
        )
        _preset(self.dropped, REFUSALS)

    def _add_modules(self, r: CollectorRegistry) -> None:
        self.modules = Counter(
            "core_dump_modules",
            "Executables and libraries of crashed processes that the bucket has, by result.",
            ["result"],
            registry=r,
        )
        self.module_bytes = Counter(
            "core_dump_module_upload_bytes", "Bytes of executables and libraries stored in S3.", registry=r
        )
        self.modules_dropped = Counter(
            "core_dump_modules_dropped",
            "Executables and libraries deleted without being stored, by reason.",
            ["reason"],
            registry=r,
        )
        self.module_lists = Counter(
            "core_dump_module_lists", "Lists of the modules of a dump, by result.", ["result"], registry=r
        )
        self.modules_waiting = Gauge(
            "core_dump_modules_waiting_files", "Executables and libraries that wait on disk.", registry=r
        )
        self.modules_waiting_bytes = Gauge(
            "core_dump_modules_waiting_bytes", "Their size on disk.", registry=r
        )
        _preset(self.modules, STORED)
        _preset(self.modules_dropped, DROPPED)
        _preset(self.module_lists, ("published", "dropped"))

    def _add_backlog(self, r: CollectorRegistry) -> None:
        self.backlog_files = Gauge("core_dump_backlog_files", "Dumps that wait on disk.", registry=r)
        self.backlog_bytes = Gauge("core_dump_backlog_bytes", "Their size on disk.", registry=r)
        self.backlog_oldest = Gauge(
            "core_dump_backlog_oldest_seconds", "Age of the oldest waiting dump.", registry=r
        )

    def _add_directory(self, r: CollectorRegistry) -> None:
        self.size_bytes = Gauge(
            "core_dump_watch_directory_size_bytes", "Size of the watch directory's file system.", registry=r
        )
        self.free_bytes = Gauge(
            "core_dump_watch_directory_free_bytes", "Free space of its file system.", registry=r
        )
        self.watched = Gauge(
            "core_dump_watch_directory_watched",
            "1 while the directory is there and collected.",
            registry=r,
        )
        self.insecure = Gauge(
            "core_dump_watch_directory_insecure", "1 if users other than root may write to it.", registry=r
        )
        self.inotify_active = Gauge(
            "core_dump_inotify_active",
            "1 while inotify reports new dumps; 0 while the directory is scanned every few seconds instead.",
            registry=r,
        )
        self.overflows = Counter(
            "core_dump_inotify_overflows",
            "Times the kernel dropped events, so that the directory was scanned.",
            registry=r,
        )
        self.watch_losses = Counter(
            "core_dump_watch_losses", "Times the directory was deleted, moved or remounted.", registry=r
        )

    def _add_helper(self, r: CollectorRegistry) -> None:
        self.pattern_ours = Gauge(
            "core_dump_core_pattern_ours", "1 if a crash on the node leads to this directory.", registry=r
        )
        self.pattern_taken = Counter(
            "core_dump_core_pattern_taken",
            "Times something else took the core pattern while the collector ran.",
            registry=r,
        )
        self.helper_info = Gauge(
            "core_dump_helper_info",
            "Always 1; release and configuration (SHA-256) of the helper on the node, as far as known.",
            ["version", "config"],
            registry=r,
        )

    def _add_process(self, r: CollectorRegistry) -> None:
        ProcessCollector(registry=r)
        self.workers = Gauge("core_dump_worker_processes", "Worker processes that run.", registry=r)
        self.workers_resident = Gauge(
            "core_dump_workers_resident_memory_bytes", "Resident memory of all workers.", registry=r
        )
        self.workers_cpu = Counter("core_dump_workers_cpu_seconds", "CPU time of all workers.", registry=r)
        self.rebuilds = Counter("core_dump_pool_rebuilds", "Workers that died and were replaced.", registry=r)
        self.unobserved = Counter(
            "core_dump_observation_failures",
            "Times the collector could not look at something; collecting went on.",
            ["what"],
            registry=r,
        )
        self.log_lines_dropped = Counter(
            "core_dump_log_lines_dropped",
            "Log lines that were dropped because nobody read them.",
            registry=r,
        )
        self.build_info = Gauge(
            "core_dump_build_info",
            "Always 1; its labels say which version runs.",
            ["version", "python"],
            registry=r,
        )
        _preset(self.unobserved, Look)
        self.build_info.labels(__version__, platform.python_version()).set(1)

    def observe(self, result: UploadResult) -> None:
        """Count one result."""
        if result.outcome in _UPLOADS:
            self.uploads.labels(result.outcome).inc()
        elif result.outcome is Outcome.DISCARDED:
            self.discarded.inc()
        elif result.outcome in _SKIPPED:
            self.skipped.labels(result.outcome).inc()
        if result.outcome in _ENDS:
            self.losses.see(_ENDS[result.outcome])
        if result.retry_reason is not None:
            self.retries.labels(result.retry_reason).inc()
        if result.outcome not in STORED_OUTCOMES:
            return
        now = time.time()
        self.last_success.set(now)
        if result.crashed_at is not None:
            self.crash_to_bucket.observe(max(0.0, now - result.crashed_at))
        self.upload_bytes.inc(result.stored_bytes if result.outcome is Outcome.UPLOADED else 0)
        self.upload_seconds.observe(result.seconds)
        self.dump_bytes.observe(result.read_bytes)
        self.dumps.labels(_SIGNALS.get(result.signal or 0, "other")).inc()
        self.truncated.inc(1 if result.truncated else 0)
        self.sensitive.inc(1 if result.sensitive else 0)

    def observe_store(self, *, reachable: bool, reason: str) -> None:
        """Show whether the store takes dumps: one sample, with the reason as its label."""
        if (reachable, reason) != self._shown_store:
            self._shown_store = (reachable, reason)
            self.store_reachable.clear()
            self.store_reachable.labels(reason).set(int(reachable))

    def observe_disk(self, directory: str) -> None:
        """Read the free space of the watch directory's file system."""
        status = os.statvfs(directory)
        self.free_bytes.set(status.f_bavail * status.f_frsize)
        self.size_bytes.set(status.f_blocks * status.f_frsize)

    def observe_pattern(self, *, ours: bool) -> bool:
        """Show whether a crash leads to the directory; count a pattern that was ours until now, and return True."""
        taken = self._was_ours and not ours
        self._was_ours = ours
        self.pattern_ours.set(int(ours))
        self.pattern_taken.inc(int(taken))
        return taken

    def observe_quarantine(self, files: int, size_bytes: int) -> None:
        """Show number and size of the files in quarantine/."""
        self.quarantined.set(files)
        self.quarantined_bytes.set(size_bytes)

    def observe_helper(self, version: str, config: str) -> None:
        """Show release and configuration of the helper, in one sample."""
        if (version, config) != self._shown_helper:
            self._shown_helper = (version, config)
            self.helper_info.clear()
            self.helper_info.labels(version, config).set(1)

    def observe_workers(self, usage: Usage) -> None:
        """Show CPU time and memory of the workers."""
        self.workers.set(usage.processes)
        self.workers_resident.set(usage.resident_bytes)
        raise_to(self.workers_cpu, usage.cpu_seconds)


def raise_to(counter: Counter, total: float) -> bool:
    """Raise a counter to a total that is counted elsewhere; tell whether it was lower."""
    missed: float = total - counter._value.get()  # noqa: SLF001  the only reader there is
    if missed > 0:
        counter.inc(missed)
    return missed > 0


def _preset(metric: MetricWrapperBase, values: Iterable[str]) -> None:
    for value in values:
        metric.labels(value)


def render_markdown() -> str:
    """Return the table of docs/metrics.md."""
    rows = ["| metric | type | labels | what |", "|---|---|---|---|"]
    metrics = Metrics()
    for value in (*vars(metrics).values(), *vars(metrics.losses).values()):
        if isinstance(value, (Counter, Gauge, Histogram)):
            name = value._name + ("_total" if value._type == "counter" else "")  # noqa: SLF001
            labels = ", ".join(value._labelnames)  # noqa: SLF001
            rows.append(f"| `{name}` | {value._type} | {labels} | {value._documentation} |")  # noqa: SLF001
    return "\n".join(rows) + "\n"

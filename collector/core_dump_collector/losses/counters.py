"""Owns the metrics of losses. They are exposed only while the kernel log is watched: without it, a zero is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from core_dump_collector.losses.ledger import Kind
from core_dump_collector.losses.messages import HELPER_FAILURES, Drop

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OUTCOMES = ("stored", "refused", "kernel", "helper", "no_trace", "quarantined", "discarded")
"""How a crash ended; the sum over all is the number of crashes that were seen."""


class LossMetrics:
    """The metrics of the kernel log."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Create all of them; only the first is exposed before the log is watched."""
        self._registry = registry
        self.is_watching = False
        """The metrics of losses are exposed."""
        self.watched = Gauge(
            "core_dump_kernel_log_watched",
            "1 while the kernel log is read; 0 if it is not, and then the metrics of losses are absent.",
            registry=registry,
        )
        self._add_crashes()
        self._add_log()
        self._shown = (
            *(self.crashes_seen, self.kernel_dropped, self.helper_failures),
            *(self.oom_kills, self.faults_suppressed, self.lines_lost),
        )

    def _add_crashes(self) -> None:
        self.crashes_seen = Counter(
            "core_dump_crashes_seen",
            "Crashes that anything told of, by outcome: the denominator of coverage.",
            ["outcome"],
            registry=None,
        )
        self.kernel_dropped = Counter(
            "core_dump_kernel_dropped",
            "Dumps that the kernel did not make, by reason.",
            ["reason"],
            registry=None,
        )
        self.helper_failures = Counter(
            "core_dump_helper_failures",
            "Crashes of which the helper left neither a dump nor a record, by reason.",
            ["reason"],
            registry=None,
        )
        for outcome in OUTCOMES:
            self.crashes_seen.labels(outcome)
        for reason in Drop:
            self.kernel_dropped.labels(reason)
        for failure in HELPER_FAILURES:
            self.helper_failures.labels(failure)

    def _add_log(self) -> None:
        self.oom_kills = Counter(
            "core_dump_oom_kills", "Processes killed because memory ran out; they never dump.", registry=None
        )
        self.faults_suppressed = Counter(
            "core_dump_faults_suppressed",
            "Lines on fatal faults that the kernel suppressed: coverage may be lower while this rises.",
            registry=None,
        )
        self.lines_lost = Counter(
            "core_dump_kernel_log_lost",
            "Records of the kernel log that were overwritten before they were read.",
            registry=None,
        )

    def watch(self, *, on: bool) -> None:
        """Expose the metrics of losses, or hide them."""
        if on == self.is_watching:
            return
        self.is_watching = on
        self.watched.set(int(on))
        for metric in self._shown:
            if on:
                self._registry.register(metric)
            else:
                self._registry.unregister(metric)

    def see(self, outcome: str, number: int = 1) -> None:
        """Count crashes by their outcome."""
        if self.is_watching:
            self.crashes_seen.labels(outcome).inc(number)

    def lose(self, kind: Kind, reason: str, number: int) -> None:
        """Count crashes that left no dump."""
        self.see(kind, number)
        if kind is Kind.KERNEL:
            self.kernel_dropped.labels(reason).inc(number)
        elif kind is Kind.HELPER:
            self.helper_failures.labels(reason).inc(number)

"""Owns what a worker's result means for the backlog, the circuit breaker, the metrics and the log."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.jobs import STORED_OUTCOMES, Outcome, ProbeResult, RecordResult, SalvageResult
from core_dump_collector.landing import MOST_DUMPS, Recent
from core_dump_collector.node.installed import VERSION

if TYPE_CHECKING:
    from core_dump_collector.backlog import Backlog
    from core_dump_collector.breaker import CircuitBreaker
    from core_dump_collector.jobs import AnyResult, UploadResult
    from core_dump_collector.losses.watcher import KernelLog
    from core_dump_collector.metrics import Metrics
    from core_dump_collector.node.suppressed import SuppressedCrashes
    from core_dump_collector.partials import Partials
    from core_dump_collector.reachability import Reachability

log = structlog.get_logger()

_MOST_REFUSED = 1000
_EXPLAINING = STORED_OUTCOMES | {Outcome.QUARANTINED, Outcome.DISCARDED}
"""There was a dump: its crash is counted by the dump's outcome."""
_SHOWN = _EXPLAINING | {Outcome.REFUSED, Outcome.RETRY}


@dataclass(slots=True)
class Results:
    """Applies results, one at a time, to everything that depends on them."""

    directory: str
    backlog: Backlog
    partials: Partials
    breaker: CircuitBreaker
    store: Reachability
    records: SuppressedCrashes
    kernel_log: KernelLog
    metrics: Metrics
    recent: tuple[Recent, ...] = ()
    """The last attempts at dumps, newest first; one for each dump."""
    helper_version: str = ""
    """Release of the helper that wrote the dump stored last."""
    _refused: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Sizes of the files that were refused, by name."""

    def apply(self, result: AnyResult) -> None:
        """Apply one result."""
        now = time.monotonic()
        if isinstance(result, SalvageResult):
            self._apply_salvage(result, now)
        elif isinstance(result, RecordResult):
            self._apply_record(result, now)
        elif isinstance(result, ProbeResult):
            self._apply_probe(result, now)
        elif self.backlog.is_in_flight(result.name):
            self.metrics.observe(result)
            self._remember(result)
            if result.outcome in _EXPLAINING:
                self.kernel_log.note_dump(result.name)
            self._apply_upload(result, now)
        else:
            log.error("a result for a file that was not being uploaded", file=result.name)

    def measure_refused(self) -> int:
        """Return the size of the files that were refused and still exist."""
        for name in list(self._refused):
            self._note_refused(name)
        return sum(self._refused.values())

    def _note_refused(self, name: str) -> None:
        self._refused.pop(name, None)
        try:
            self._refused[name] = os.lstat(os.path.join(self.directory, name)).st_size
        except (OSError, ValueError):
            return
        while len(self._refused) > _MOST_REFUSED:
            self._refused.popitem(last=False)

    def _remember(self, result: UploadResult) -> None:
        """Keep the parts of a result that the page at `/` and the gauges show."""
        if result.outcome is Outcome.REFUSED:
            self._note_refused(result.name)
        if VERSION.fullmatch(result.helper_version):
            self.helper_version = result.helper_version
        if result.outcome in _SHOWN:
            shown = result.outcome.value
            if result.retry_reason is not None:
                shown = f"waits: {result.retry_reason}"
            elif result.truncated:
                shown = f"{shown}, truncated ({result.truncated})"
            recent = Recent(result.name, shown, time.time(), result.outcome in STORED_OUTCOMES)
            others = (one for one in self.recent if one.name != result.name)
            self.recent = (recent, *others)[:MOST_DUMPS]

    def _apply_record(self, result: RecordResult, now: float) -> None:
        for owner in (self.records, self.kernel_log):
            owner.finish(result.name, now, stored=result.stored)
        shown = "uploaded" if result.stored else "retry"
        log.info("suppressed-crash record", file=result.name, result=shown, detail=result.detail)

    def _apply_probe(self, result: ProbeResult, now: float) -> None:
        known, before = self.store.is_known, self.store.reason
        self.store.note_probe(result.reason, now)
        if not known or self.store.reason != before:
            if result.reason is not None:
                log.error(
                    "the store does not answer as it should", reason=result.reason, detail=result.detail
                )
            elif self.store.reason is None:
                log.info("the store answers")

    def _apply_salvage(self, result: SalvageResult, now: float) -> None:
        self.partials.finish(result.name, now, left=result.published is None)
        if result.published:
            self.metrics.salvaged.inc()
            log.warning("salvaged an abandoned partial dump", file=result.published)
        elif result.published is not None:
            self.kernel_log.lose_partial(result.name)
            log.warning("removed an abandoned partial dump that was empty", file=result.name)
        elif result.detail:
            log.warning("cannot salvage a partial dump", file=result.name, error=result.detail)

    def _apply_upload(self, result: UploadResult, now: float) -> None:
        name = result.name
        shown = {"file": name, "key": result.key, "detail": result.detail or None}
        shown = {k: v for k, v in shown.items() if v is not None}
        match result.outcome:
            case Outcome.RETRY if result.retry_reason is not None:
                self.breaker.fail(result.retry_reason, now)
                self.store.note_upload(result.retry_reason, now)
                slow, undeleted = result.retry_reason.needs_operator, result.undeleted
                pause = self.backlog.retry(name, now, needs_operator=slow, undeleted=undeleted)
                log.warning(
                    "will try again", reason=result.retry_reason, pause_seconds=round(pause, 1), **shown
                )
            case Outcome.UPLOADED | Outcome.ALREADY_STORED:
                self.breaker.succeed()
                self.store.note_upload(None, now)
                gone = not os.path.lexists(os.path.join(self.directory, name))
                self.backlog.finish(name, gone=gone)
                log.info(
                    result.outcome.value,
                    bytes=result.stored_bytes,
                    seconds=round(result.seconds, 3),
                    truncated=result.truncated,
                    **shown,
                )
            case Outcome.BUSY:
                self.backlog.postpone(name, now)
                log.debug(result.outcome.value, **shown)
            case Outcome.DISCARDED:
                self.backlog.finish(name)
                log.error("deleted a dump that could not be uploaded: DISCARD_AFTER_SECONDS", **shown)
            case Outcome.VANISHED:
                self.backlog.finish(name)
                log.debug(result.outcome.value, **shown)
            case _:
                self.backlog.finish(name)
                log.warning(result.outcome.value, **shown)

"""Owns the decision which crashes are losses; each is counted once, however many sources report it. Pure, no clock.

A loss that the kernel or the helper reports is counted at once. A fault is a loss only if it stays unexplained for a
while. A line of the helper, a dropped dump, a recorded refusal or a dump explains one fault.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from core_dump_collector.losses.explanations import SLACK_SECONDS, Explanation, Explanations
from core_dump_collector.losses.messages import (
    HELPER_FAILURES,
    Drop,
    Dropped,
    Fault,
    HelperCannotCount,
    HelperFailed,
    HelperRefused,
    HelperTold,
    Suppressed,
)

if TYPE_CHECKING:
    from core_dump_collector.losses.messages import Event

GRACE_SECONDS = 360.0
"""A fault waits so long for an explanation: a helper may wait 300 s for a slot before it reports the crash."""
SUPPRESSED_SECONDS = 2.0
"""After the number of suppressed lines the kernel prints a line of the same kind within this time."""
_MOST = 4000
MOST_JUDGED = 500
"""Most faults that one call judges; the rest wait for the next, so that many faults do not stall the loop."""
_NOT_IN_NAME = re.compile(rb"[^A-Za-z0-9._+-]")


class Kind(StrEnum):
    """Who lost a dump."""

    KERNEL = "kernel"
    HELPER = "helper"
    NO_TRACE = "no_trace"
    """A process died of a fault, and nothing reports a dump."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A crash, or several of one kind, without a dump."""

    kind: Kind
    reason: str
    seconds: float
    """Unix time."""
    comm: bytes = b""
    pid: int = 0
    """0 if unknown; in the process's own namespace if the kernel reported it."""
    signal: int = 0
    number: int = 1


@dataclass(slots=True)
class Ledger:
    """The faults that wait for an explanation, and the explanations that wait for a fault."""

    grace_seconds: float = GRACE_SECONDS
    _faults: deque[tuple[float, Fault]] = field(default_factory=deque)
    _explanations: Explanations = field(default_factory=Explanations)
    _waiting: Counter[int] = field(default_factory=Counter)
    """Threads of the waiting faults."""
    _uncounting: dict[int, float] = field(default_factory=dict)
    """Helpers that said that they cannot record refusals, by pid."""
    _suppressed: tuple[float, int] | None = None
    _last_drop: float = 0.0
    _without_trace: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST))
    """Times of faults that were counted, in case the kernel counts them later among suppressed lines."""

    @property
    def oldest_fault(self) -> float | None:
        """Return the time of the oldest fault that waits."""
        return self._faults[0][0] if self._faults else None

    def add(self, event: Event, seconds: float) -> list[Loss]:
        """Process an event of the kernel log, in its order; return the losses that are certain at once."""
        match event:
            case Fault():
                self._faults.append((seconds, event))
                self._waiting[event.tid] += 1
            case Dropped():
                return self._add_drop(event, seconds)
            case Suppressed(number, faults=False):
                lost = self._name_suppressed(Drop.UNNAMED)
                self._suppressed = (seconds, number)
                return lost
            case HelperTold():
                self._explain_by_helper(event, seconds)
            case HelperFailed(reason, comm, pid, signal):
                self._explain_by_helper(event, seconds)
                return [Loss(Kind.HELPER, reason, seconds, comm, pid, signal)]
            case HelperCannotCount(helper):
                self._uncounting[helper] = seconds
            case HelperRefused(helper, reason, comm, pid, signal):
                if self._uncounting.pop(helper, None) is not None and reason in HELPER_FAILURES:
                    self._explain_by_helper(event, seconds)
                    return [Loss(Kind.HELPER, reason, seconds, comm, pid, signal)]
            case _:
                pass
        return []

    def explain_by_dump(self, comm: bytes, timestamp: int, signal: int) -> None:
        """Note a dump that exists or is stored, by the fields of its name."""
        comm = name_form(comm)
        if self._explanations.claim_dump(comm, timestamp, signal):
            return  # the helper has reported this crash: one explanation is enough
        first, last = timestamp - SLACK_SECONDS, timestamp + SLACK_SECONDS
        self._explanations.add(Explanation(first, last, comm, signal=signal))

    def explain_by_record(self, first: float, last: float, signal: int, number: int) -> None:
        """Note refusals that the helper recorded in a period; a record does not name the thread."""
        self._explanations.add(
            Explanation(first - SLACK_SECONDS, last + SLACK_SECONDS, None, signal=signal, number=number)
        )

    def settle(self, now: float) -> list[Loss]:
        """Return the faults that were not explained in time, and suppressed lines without a known reason."""
        lost: list[Loss] = []
        if self._suppressed is not None and now - self._suppressed[0] > SUPPRESSED_SECONDS:
            lost += self._name_suppressed(Drop.UNNAMED)
        for _ in range(MOST_JUDGED):
            if not self._is_due(now):
                break
            seconds, fault = self._faults.popleft()
            self._stop_waiting(fault.tid)
            comm = name_form(fault.comm)
            if not self._explanations.use(comm, fault.tid, fault.signal, seconds, self._waiting):
                self._without_trace.append(seconds)
                lost.append(Loss(Kind.NO_TRACE, Kind.NO_TRACE, seconds, fault.comm, fault.tid, fault.signal))
        oldest = self._faults[0][0] if self._faults else now
        horizon = min(now - 2 * self.grace_seconds, oldest) - SLACK_SECONDS
        self._explanations.forget_before(horizon)
        self._uncounting = {pid: at for pid, at in self._uncounting.items() if at > horizon}
        return lost

    def _is_due(self, now: float) -> bool:
        """Tell whether the oldest fault is to be judged."""
        too_many = len(self._faults) > _MOST
        return bool(self._faults) and (too_many or now - self._faults[0][0] >= self.grace_seconds)

    def may_explain(self, timestamp: int) -> bool:
        """Tell whether a dump of this time can explain a waiting fault."""
        return bool(self._faults) and timestamp >= self._faults[0][0] - SLACK_SECONDS - 1

    def must_look_for_dumps(self, now: float) -> bool:
        """Tell whether a fault is due and the helper has not reported its process."""
        return any(
            now - at >= self.grace_seconds and not self._explanations.is_told(fault.tid)
            for at, fault in self._faults
        )

    def _add_drop(self, event: Dropped, seconds: float) -> list[Loss]:
        lost = self._name_suppressed(event.reason)
        lost.append(Loss(Kind.KERNEL, event.reason, seconds, event.comm, event.pid))
        comm = name_form(event.comm) if event.comm else None
        self._explanations.add(Explanation(seconds - SLACK_SECONDS, seconds + 1, comm))
        self._last_drop = seconds
        return lost

    def _name_suppressed(self, reason: Drop) -> list[Loss]:
        """Return the losses whose lines the kernel suppressed, except those that were counted as faults."""
        if self._suppressed is None:
            return []
        seconds, number = self._suppressed
        self._suppressed = None
        counted = sum(1 for at in self._without_trace if self._last_drop <= at <= seconds)
        self._without_trace.clear()
        self._explanations.add(Explanation(self._last_drop - 1, seconds, None, number=number))
        left = number - min(number, counted)
        return [Loss(Kind.KERNEL, reason, seconds, number=left)] if left else []

    def _explain_by_helper(self, event: HelperTold | HelperFailed | HelperRefused, seconds: float) -> None:
        if not self._explanations.is_told(event.pid):
            first = seconds - self.grace_seconds
            self._explanations.add(
                Explanation(first, seconds + 1, name_form(event.comm), event.pid, event.signal)
            )

    def _stop_waiting(self, tid: int) -> None:
        self._waiting[tid] -= 1
        if not self._waiting[tid]:
            del self._waiting[tid]


def name_form(comm: bytes) -> bytes:
    """Return the name of a thread as it is in the name of a dump (docs/contracts.md)."""
    clean = _NOT_IN_NAME.sub(b"_", comm) or b"_"
    return b"_" + clean[1:] if clean[:1] in {b"-", b"."} else clean

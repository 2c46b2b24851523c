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
SLACK_SECONDS = 10.0
"""Two reports of one crash may differ by so much: their times come from different clocks."""
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
class Explanation:
    """Explains faults of a period, and of one process as far as it is known."""

    first: float
    last: float
    comm: bytes | None = None
    """As in the name of a dump; None for any."""
    pid: int = 0
    signal: int = 0
    number: int = 1


@dataclass(slots=True)
class Ledger:
    """The faults that wait for an explanation, and the explanations that wait for a fault."""

    grace_seconds: float = GRACE_SECONDS
    _faults: deque[tuple[float, Fault]] = field(default_factory=deque)
    _explanations: deque[Explanation] = field(default_factory=deque)
    _told: set[int] = field(default_factory=set)
    """Processes that the helper has reported, while their explanations are kept."""
    _undumped: dict[int, Explanation] = field(default_factory=dict)
    """Explanations of those processes whose dump was not seen yet, oldest first."""
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
        for told in self._undumped.values():
            same = (told.comm, told.signal) == (comm, signal)
            if same and told.first <= timestamp <= told.last + SLACK_SECONDS:
                del self._undumped[told.pid]  # the helper has reported this crash: one explanation is enough
                return
        first, last = timestamp - SLACK_SECONDS, timestamp + SLACK_SECONDS
        self._explain(Explanation(first, last, comm, signal=signal))

    def explain_by_record(self, first: float, last: float, signal: int, number: int) -> None:
        """Note refusals that the helper recorded in a period; a record does not name the thread."""
        self._explain(
            Explanation(first - SLACK_SECONDS, last + SLACK_SECONDS, None, signal=signal, number=number)
        )

    def settle(self, now: float) -> list[Loss]:
        """Return the faults that were not explained in time, and suppressed lines whose reason nothing names."""
        lost: list[Loss] = []
        if self._suppressed is not None and now - self._suppressed[0] > SUPPRESSED_SECONDS:
            lost += self._name_suppressed(Drop.UNNAMED)
        for _ in range(MOST_JUDGED):
            if not self._is_due(now):
                break
            seconds, fault = self._faults.popleft()
            self._stop_waiting(fault.tid)
            if not self._use_explanation(fault, seconds):
                self._without_trace.append(seconds)
                lost.append(Loss(Kind.NO_TRACE, Kind.NO_TRACE, seconds, fault.comm, fault.tid, fault.signal))
        oldest = self._faults[0][0] if self._faults else now
        horizon = min(now - 2 * self.grace_seconds, oldest) - SLACK_SECONDS
        while self._explanations and self._explanations[0].last < horizon:
            self._forget_oldest()
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
        """Tell whether a fault is due whose process the helper has not reported."""
        return any(
            now - at >= self.grace_seconds and fault.tid not in self._told for at, fault in self._faults
        )

    def _add_drop(self, event: Dropped, seconds: float) -> list[Loss]:
        lost = self._name_suppressed(event.reason)
        lost.append(Loss(Kind.KERNEL, event.reason, seconds, event.comm, event.pid))
        comm = name_form(event.comm) if event.comm else None
        self._explain(Explanation(seconds - SLACK_SECONDS, seconds + 1, comm))
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
        self._explain(Explanation(self._last_drop - 1, seconds, None, number=number))
        left = number - min(number, counted)
        return [Loss(Kind.KERNEL, reason, seconds, number=left)] if left else []

    def _explain_by_helper(self, event: HelperTold | HelperFailed | HelperRefused, seconds: float) -> None:
        if event.pid not in self._told:
            first = seconds - self.grace_seconds
            self._explain(Explanation(first, seconds + 1, name_form(event.comm), event.pid, event.signal))

    def _explain(self, explanation: Explanation) -> None:
        while len(self._explanations) >= _MOST:
            self._forget_oldest()
        self._explanations.append(explanation)
        if explanation.pid:
            self._told.add(explanation.pid)
            self._undumped[explanation.pid] = explanation

    def _stop_waiting(self, tid: int) -> None:
        self._waiting[tid] -= 1
        if not self._waiting[tid]:
            del self._waiting[tid]

    def _forget_oldest(self) -> None:
        pid = self._explanations.popleft().pid
        self._told.discard(pid)
        self._undumped.pop(pid, None)

    def _use_explanation(self, fault: Fault, seconds: float) -> bool:
        found = self._find(fault, seconds)
        if found is not None:
            found.number -= 1
        return found is not None

    def _find(self, fault: Fault, seconds: float) -> Explanation | None:
        """Return the explanation that fits best: of this process, then of this name, then of any."""
        comm = name_form(fault.comm)
        fits = [
            one
            for one in self._explanations
            if one.first <= seconds <= one.last
            and one.number > 0
            and (one.comm is None or one.comm == comm or one.pid == fault.tid)
            and (not one.signal or not fault.signal or one.signal == fault.signal)
            and (one.pid == fault.tid or one.pid not in self._waiting)
        ]
        return max(fits, key=lambda one: (one.pid == fault.tid, one.comm is not None), default=None)


def name_form(comm: bytes) -> bytes:
    """Return the name of a thread as it is in the name of a dump (docs/contracts.md)."""
    clean = _NOT_IN_NAME.sub(b"_", comm) or b"_"
    return b"_" + clean[1:] if clean[:1] in {b"-", b"."} else clean

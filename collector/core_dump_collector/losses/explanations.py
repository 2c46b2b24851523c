"""Owns the explanations of faults: lines of the helper, dropped dumps, recorded refusals and dumps. Pure.

Each one explains one fault, or as many as it counts. They are found by process and by name, because a node can have
thousands of faults, of explanations and of dumps at once, and the daemon's loop waits for the search.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

SLACK_SECONDS = 10.0
"""Two reports of one crash may differ by so much: their times come from different clocks."""
MOST_KEPT = 4000


@dataclass(slots=True, eq=False)
class Explanation:
    """Explains faults of a period, and of one process as far as it is known."""

    first: float
    last: float
    comm: bytes | None = None
    """As in the name of a dump; None for any."""
    pid: int = 0
    signal: int = 0
    number: int = 1

    def fits(self, seconds: float, signal: int) -> bool:
        """Tell whether it can explain one more fault, of this time and signal."""
        is_same = not self.signal or not signal or self.signal == signal
        return is_same and self.number > 0 and self.first <= seconds <= self.last


def _end(explanation: Explanation) -> float:
    return explanation.last


@dataclass(slots=True)
class Explanations:
    """The explanations that are kept, oldest first."""

    _all: deque[Explanation] = field(default_factory=deque)
    _by_name: defaultdict[bytes | None, deque[Explanation]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    _by_pid: dict[int, Explanation] = field(default_factory=dict)
    """Those that the helper has reported."""
    _undumped: defaultdict[tuple[bytes | None, int], list[Explanation]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Reported ones without a dump so far, by name and signal, ordered by their end; their periods are equally long."""

    def add(self, explanation: Explanation) -> None:
        """Keep an explanation; beyond `MOST_KEPT` the oldest one goes."""
        while len(self._all) >= MOST_KEPT:
            self._forget_oldest()
        self._all.append(explanation)
        self._by_name[explanation.comm].append(explanation)
        if explanation.pid:
            self._by_pid[explanation.pid] = explanation
            insort(self._undumped[explanation.comm, explanation.signal], explanation, key=_end)

    def is_told(self, pid: int) -> bool:
        """Tell whether the helper has reported this process."""
        return pid in self._by_pid

    def claim_dump(self, comm: bytes, timestamp: int, signal: int) -> bool:
        """Tell whether a dump is the first one of a crash that the helper has reported."""
        waiting = self._undumped.get((comm, signal), [])
        place = bisect_left(waiting, timestamp - SLACK_SECONDS, key=_end)
        if place == len(waiting) or waiting[place].first > timestamp:
            return False
        self._drop_undumped(waiting[place])
        return True

    def use(self, comm: bytes, tid: int, signal: int, seconds: float, waiting: Container[int]) -> bool:
        """Use up an explanation of a fault: of its process, else of its name, else of any; return False if none fits.

        Args:
            comm: the thread's name as in the name of a dump.
            tid: the thread.
            signal: 0 if unknown.
            seconds: time of the fault.
            waiting: threads of other faults; their own explanations are not used for this one.
        """
        own = self._by_pid.get(tid)
        others = chain(self._by_name.get(comm, ()), self._by_name.get(None, ()))
        found = own if own is not None and own.fits(seconds, signal) else None
        if found is None:
            found = next(
                (one for one in others if one.pid not in waiting and one.fits(seconds, signal)), None
            )
        if found is not None:
            found.number -= 1
        return found is not None

    def forget_before(self, horizon: float) -> None:
        """Forget the oldest ones, as long as they end before this time."""
        while self._all and self._all[0].last < horizon:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = self._all.popleft()
        named = self._by_name[oldest.comm]
        named.popleft()  # both are in the order in which explanations were added
        if not named:
            del self._by_name[oldest.comm]
        if oldest.pid:
            del self._by_pid[oldest.pid]
            self._drop_undumped(oldest)

    def _drop_undumped(self, explanation: Explanation) -> None:
        name = explanation.comm, explanation.signal
        undumped = self._undumped.get(name, [])
        if explanation in undumped:
            undumped.remove(explanation)  # identity, and the oldest is near the front
            if not undumped:
                del self._undumped[name]

"""Hold time: from the signal to waitpid returning, for each handler and each kind of memory."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.kernel import PATTERN, core_pattern

from bench import victims

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.cgroup import Group
    from bench.handlers import Handler, Workshop


@dataclass(frozen=True)
class Crash:
    """One measurement; seconds and bytes."""

    hold: float
    whole: float
    cpu: float
    written: int


@dataclass
class Result:
    """All rounds of one handler."""

    handler: Handler
    crashes: list[Crash] = field(default_factory=list)
    peak_kib: int = 0

    def median(self, what: str) -> float:
        """Return the median of a field."""
        return float(statistics.median(getattr(crash, what) for crash in self.crashes))


def take(handler: Handler, what: str, group: Group, workshop: Workshop) -> Crash:
    """Crash one process into one handler."""
    cpu = group.cpu_seconds()
    hold, whole = take_only(handler, what, group)
    return Crash(hold, whole, group.cpu_seconds() - cpu, workshop.clean())


def take_only(handler: Handler, what: str, group: Group) -> tuple[float, float]:
    """Crash one process; return seconds until it was released, and until the handler had ended."""
    present = len(group.members())
    with victims.loaded(what) as pid, core_pattern(handler.kernel_pattern, handler.pipe_limit):
        begin, (hold,) = victims.crash([pid])
    return hold, group.wait_empty(leave=present) - begin


def compare(
    handlers: Sequence[Handler], what: str, rounds: int, group: Group, workshop: Workshop
) -> list[Result]:
    """Measure handlers in alternating rounds."""
    results = [Result(handler) for handler in handlers]
    for turn in range(rounds):
        for result in results if turn % 2 == 0 else reversed(results):
            if turn >= result.handler.most_rounds:
                continue
            crash = take(result.handler, what, group, workshop)
            result.crashes.append(crash)
            print(f"{result.handler.name}: {crash}", file=sys.stderr, flush=True)
    return results


def compare_paired(
    handlers: Sequence[Handler], what: str, rounds: int, group: Group, workshop: Workshop
) -> list[Result]:
    """Measure handlers in alternating rounds; within a round one crash follows the other at once."""
    results = [Result(handler) for handler in handlers]
    for turn in range(rounds):
        ordered = results if turn % 2 == 0 else results[::-1]
        with victims.many(what, len(ordered)) as pids, core_pattern(ordered[0].handler.kernel_pattern):
            for result, pid in zip(ordered, pids, strict=True):
                PATTERN.write_text(result.handler.kernel_pattern + "\n")
                cpu, present = group.cpu_seconds(), len(group.members())
                begin, (hold,) = victims.crash([pid])
                whole = group.wait_empty(leave=present) - begin
                crash = Crash(hold, whole, group.cpu_seconds() - cpu, workshop.clean())
                if not crash.written and result.handler.writes:
                    raise RuntimeError(f"{result.handler.name} wrote nothing: see the kernel log")
                result.crashes.append(crash)
                print(f"{result.handler.name}: {crash}", file=sys.stderr, flush=True)
    return results


@contextlib.contextmanager
def watched(group: Group) -> Iterator[dict[int, int]]:
    """Note the peak memory of each member while something runs."""
    seen: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            group.peaks(seen)

    present = set(group.members())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        for pid in present:
            seen.pop(pid, None)


def peak_kib(handler: Handler, what: str, group: Group, workshop: Workshop) -> int:
    """Return the peak memory of helper and compressor together for one crash: not a timed one."""
    with watched(group) as seen:
        take(handler, what, group, workshop)
    return sum(seen.values())


def compare_small(
    handlers: Sequence[Handler], rounds: int, workshop: Workshop, count: int = 1, what: str = ""
) -> list[list[float]]:
    """Crash `count` small processes, or processes that hold `what`, at once; for each handler, the hold times.

    Patterns go to the kernel bare, without the line that counts CPU time: start-up is what is measured.
    """
    times: list[list[float]] = [[] for _ in handlers]
    for _ in range(rounds):
        for handler, mine in zip(handlers, times, strict=True):
            crowd = victims.many(what, count) if what else victims.small(count)
            with crowd as pids, core_pattern(handler.kernel_pattern, handler.pipe_limit):
                _, holds = victims.crash(pids)
                mine.extend(holds if count == 1 else [max(holds)])
            settle(workshop)
    return times


def settle(workshop: Workshop) -> None:
    """Wait until no handler writes any more, and clean up."""
    before = -1
    while (now := sum(1 for _ in workshop.out.glob("*.partial"))) or before:
        before = now
        time.sleep(0.02)
    time.sleep(0.05)
    workshop.clean()


def stalled_seconds() -> float:
    """Return how long some process of the machine has waited for memory: /proc/pressure/memory."""
    with open("/proc/pressure/memory") as file:
        return int(file.readline().rpartition("=")[2]) / 1e6

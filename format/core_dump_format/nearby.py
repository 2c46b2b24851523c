"""Owns the memory of a trimmed dump beyond its vital part: memory that pointers lead to, small segments. Pure.

It also finds the memory that the process has never touched. Every address and every amount is chosen by the crashed
process, so each loop has a bound in time and in number; memory that is not reached in time is dropped from the dump.
"""

from __future__ import annotations

import time
from bisect import bisect_right

from core_dump_format.state import AT_SYSINFO_EHDR
from core_dump_format.vital import AbandonedError

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_format.state import ProcessState
    from core_dump_format.vital import Selection

SURVEY_SECONDS = 0.3
"""For asking which pages of all segments exist."""
POINTED_SECONDS = 0.1
"""For following pointers."""
MAX_RANGES = 1 << 16
MAX_UNTOUCHED = 1 << 13
"""The largest untouched ranges keep a program header; a debugger handles some thousand."""
STACK_BYTES, OTHER_STACK_BYTES = 256 << 10, 16 << 10
"""Of the crashing thread's stack, and of others: searched for pointers."""
WINDOW_BYTES = 16 << 10
ADDRESS_LIMIT = 1 << 63
"""/proc/PID/pagemap has no entries from here on."""


class Nearby:
    """Copies memory until a budget is used up, and notes which memory was never touched."""

    def __init__(self, selection: Selection, state: ProcessState, budget_bytes: int) -> None:
        """Take a selection whose vital part is complete; it may hold `budget_bytes` in all."""
        self._selection, self._state, self._budget = selection, state, budget_bytes
        self._front, self._memory = selection.front, selection.memory
        self._present: dict[int, list[tuple[int, int]]] = {}
        self.was_killed = False
        """Whether the process has no memory any more, so that some of it was perhaps read too late."""
        self.untouched: list[tuple[int, int, int]] = []
        """Index of the segment, start and end of ranges of private anonymous memory that no page exists for."""

    def run(self) -> None:
        """Survey the memory and copy what fits; raises AbandonedError."""
        selection = self._selection
        self._survey()
        used = sum(len(content) for _, _, content in selection.pieces)
        room = max(0, self._budget - used)
        selection.left = room // 2
        self._take_pointed()
        selection.left += room - room // 2
        self._take_small()
        first = selection.pieces[0][1] if selection.pieces else 0
        self.was_killed = not self._memory.read(first, self._memory.page)

    def _survey(self) -> None:
        """Find the ranges of each segment whose pages exist, and those of anonymous memory whose pages do not."""
        end = time.monotonic() + SURVEY_SECONDS
        anonymous = self._anonymous()
        untouched: list[tuple[int, int, int]] = []
        ranges = 0
        for index in self._by_size():
            for first, last, is_present in self._joined(index):
                if is_present:
                    self._present.setdefault(index, []).append((first, last))
                elif index in anonymous:
                    untouched.append((last - first, index, first))
                ranges += 1
                if ranges > MAX_RANGES or time.monotonic() > end:
                    break
            if ranges > MAX_RANGES or time.monotonic() > end:
                break
        untouched.sort(reverse=True)
        self.untouched = [(index, first, first + size) for size, index, first in untouched[:MAX_UNTOUCHED]]

    def _by_size(self) -> list[int]:
        """Return the segments that hold memory, the smallest first."""
        sizes = self._front.sizes
        held = [index for index in range(1, 1 + self._front.loads) if sizes[index]]
        return sorted(held, key=sizes.__getitem__)

    def _joined(self, index: int) -> Iterator[tuple[int, int, bool]]:
        """Yield start, end and presence of the ranges of a segment that are known; neighbours differ in presence."""
        start, end = self._front.span(index)
        if start >= ADDRESS_LIMIT or (start | end) % self._memory.page:
            return
        first = last = start
        is_present = False
        for begin, stop, flag in self._memory.survey(start, end):
            if self._selection.is_abandoned:
                raise AbandonedError
            if flag != is_present or begin != last:
                if first < last:
                    yield first, last, is_present
                first, is_present = begin, flag
            last = stop
        if first < last:
            yield first, last, is_present

    def _anonymous(self) -> set[int]:
        """Return the segments in which no file is mapped, nor memory that processes share: NT_FILE lists both."""
        state, front = self._state, self._front
        if not state.has_all_files:
            return set()
        files = sorted((start, end) for start, end, _ in state.files)
        found = set()
        for index in range(1, 1 + front.loads):
            start, end = front.span(index)
            before = bisect_right(files, (end - 1, ADDRESS_LIMIT * 2))
            if not before or files[before - 1][1] <= start:
                found.add(index)
        found.discard(front.find(state.auxv.get(AT_SYSINFO_EHDR, 0)))  # its absent pages are not zeros
        return found

    def _take_pointed(self) -> None:
        """Copy the memory that registers and stacks point to, with its surroundings."""
        selection, front = self._selection, self._front
        end = time.monotonic() + POINTED_SECONDS
        seen: set[int] = set()
        for address in selection.pointers(self._state.threads, STACK_BYTES, OTHER_STACK_BYTES):
            window = address // WINDOW_BYTES
            if window in seen:
                continue
            seen.add(window)
            if selection.left < self._memory.page or time.monotonic() > end:
                return
            if front.find(address):
                below = address % WINDOW_BYTES
                selection.take(address, below, WINDOW_BYTES - below)

    def _take_small(self) -> None:
        """Copy all pages of segments, of the smallest first, and the beginning of the first one that is too long."""
        selection, page = self._selection, self._memory.page
        by_size = sorted(self._present.values(), key=lambda ranges: sum(end - start for start, end in ranges))
        for ranges in by_size:
            for first, last in ranges:
                at = first
                while at < last:
                    size = min(last - at, selection.left // page * page)
                    if size <= 0:
                        return
                    selection.take(at, 0, size)
                    at += size

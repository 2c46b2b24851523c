"""Owns which memory is vital: what a debugger needs for the backtrace of every thread, the most important first. Pure.

A dump that is cut anywhere behind its vital part still gives every backtrace; one that is cut within it loses the least
important first. Every address comes from the crashed process, so each loop and each amount has a bound. What cannot be
read is not vital: the core still has it, at its usual place.
"""

from __future__ import annotations

from struct import Struct

from core_dump_format.state import (
    AARCH64,
    AT_BASE,
    AT_PHDR,
    AT_PHNUM,
    AT_SYSINFO_EHDR,
    REGISTERS,
    SIGNAL_MARKS,
    X86_64,
)

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from core_dump_format.front import Front
    from core_dump_format.pages import Pages
    from core_dump_format.state import ProcessState, Thread

VITAL_BYTES = 32 << 20
CRASH_WINDOW_BYTES = 1 << 20
"""Of the crashing thread's stack, above its stack pointer."""
WINDOW_BYTES = 64 << 10
"""Of every other thread's stack."""
BELOW_BYTES = 512
"""Below a stack pointer: a leaf function may use 128 bytes there (x86-64 psABI, "red zone")."""
OVERFLOW_BYTES = 1 << 20
"""By which a function may lower the stack pointer before it touches the memory there."""
VDSO_BYTES = 64 << 10
LOADER_BYTES = 4 << 20
FIRST_PAGES_BYTES = 4 << 20
DATA_BYTES, DATA_SEGMENT_BYTES = 16 << 20, 2 << 20
POINTED_BYTES = 1 << 20
POINTING_BYTES = 16 << 10
"""Of the crashing thread's newest frames; a sixteenth of it for others."""
MAX_POINTING_THREADS = 64
PIECE_BYTES = 1 << 20
RESIDENT, OBTAINABLE, EVERY = range(3)
"""Pages to copy: in memory or swapped out; those, and pages of files where a read certainly ends; all of a range."""
MAX_LINK_MAPS = 4096
MAX_NAMESPACES = 16
"""glibc's DL_NNS."""
MAX_HEADERS = 64
LINK_MAP_BYTES, NAME_BYTES, DYNAMIC_BYTES = 1280, 256, 4096
"""Sizes of glibc's private struct link_map, of most library names, of most dynamic sections."""
PT_DYNAMIC, PT_PHDR, DT_DEBUG = 2, 6, 21
PF_X, PF_W = 1, 2
MAX_SIGNAL_FRAMES = 4
SIGNAL_FRAMES = {X86_64: (SIGNAL_MARKS[X86_64], -24), AARCH64: (SIGNAL_MARKS[AARCH64], -32)}
"""By machine: the mark of a signal frame, and where the interrupted stack pointer lies from there. A handler may run on
a stack of its own (sigaltstack(2))."""


class AbandonedError(Exception):
    """Nobody waits for the selection any more."""


class Selection:
    """The vital pages of a core, copied in the order of their importance."""

    def __init__(self, front: Front, memory: Pages, limit_bytes: int = VITAL_BYTES) -> None:
        """Start empty; at most `limit_bytes` are copied."""
        self.front, self.memory, self.left = front, memory, limit_bytes
        self.pieces: list[tuple[int, int, bytes]] = []
        """Index of the segment, address and content of each run of pages."""
        self.is_whole = False
        """Whether everything that is vital was copied."""
        self.vital_pieces: int | None = None
        """How many pieces are vital, once all were copied."""
        self.is_abandoned = False
        self._lacks = False
        self._taken: set[int] = set()

    def run(self, state: ProcessState) -> None:
        """Copy everything that is vital; raises AbandonedError."""
        if state.threads:
            self._take_crash(state.threads[0])
            self._take_names(state)
            self._take_threads(state.threads[1:])
            self._take_modules(state)
            self._take_ended(state)
            self._take_pointed(state.threads)
        self.is_whole = not self._lacks and not self.memory.refused and bool(self.pieces)
        self.vital_pieces = len(self.pieces)

    def take(
        self, address: int, below: int, above: int, most: int | None = None, *, pages: int = RESIDENT
    ) -> int:
        """Copy the pages from `below` bytes under an address to `above` bytes over it, within its segment.

        Args:
            address: where to look.
            below: bytes wanted before it.
            above: bytes wanted from it on.
            most: limit of this kind of memory.
            pages: RESIDENT; OBTAINABLE for the few that matter most; EVERY only where no file is mapped.

        Returns:
            The number of bytes copied now.
        """
        if self.is_abandoned:
            raise AbandonedError
        index, page = self.front.find(address), self.memory.page
        low, high = self.front.span(index)
        if not index or (low | high) % page:
            return 0
        start = max(low, address - below) // page * page
        end = min(high, -(-(address + above) // page) * page)
        room = min(self.left, end - start if most is None else most) // page * page
        if start + room < end:
            self._lacks = self._lacks or most is None
            end = start + room
        read = self.memory.read if pages == RESIDENT else self.memory.fetch
        return sum(
            self._copy(index, first, last, read)
            for begin, stop in self._untaken(start, end)
            for first, last in self._parts(begin, stop, pages)
        )

    def _parts(self, start: int, end: int, pages: int) -> Iterable[tuple[int, int]]:
        """Return the parts of a range that are to be copied."""
        if pages == EVERY:
            return [(start, end)]
        return (self.memory.resident if pages == RESIDENT else self.memory.obtainable)(start, end)

    def _untaken(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that were not copied yet, and mark them."""
        page, taken = self.memory.page, self._taken
        pages = [address for address in range(start, end, page) if address not in taken]
        taken.update(pages)
        first = last = start
        for address in pages:
            if address != last:
                if first < last:
                    yield first, last
                first = address
            last = address + page
        if pages:
            yield first, last

    def _copy(self, index: int, start: int, end: int, read: Callable[[int, int], bytes]) -> int:
        copied, page, at = 0, self.memory.page, start
        while at < end:
            data = read(at, min(end - at, PIECE_BYTES))
            size = len(data) // page * page
            if size:
                self.pieces.append((index, at, data[:size]))
                copied += size
                self.left -= size
            at += size or page
        return copied

    def _look(self, address: int, size: int) -> bytes:
        """Copy a small structure's pages and return its content, or nothing if it cannot be read."""
        self.take(address, 0, size, pages=OBTAINABLE)
        data = self.memory.read(address, size)
        return data if len(data) == size else b""

    def _take_crash(self, thread: Thread) -> None:
        """Copy the crashing thread's stack, and those that its signal handlers interrupted."""
        window = min(CRASH_WINDOW_BYTES, self.left // 4)
        self.take(self._on_stack(thread.sp), BELOW_BYTES, window)
        mark, distance = SIGNAL_FRAMES.get(self.front.machine, (b"", 0))
        sp = thread.sp
        for _ in range(MAX_SIGNAL_FRAMES if mark else 0):
            stack = self.memory.read(sp, min(window, WINDOW_BYTES))
            at = stack.find(mark, -distance)
            if at < 0:
                return
            (sp,) = Struct("=Q").unpack_from(stack, at + distance)
            self.take(self._on_stack(sp), BELOW_BYTES, min(window, self.left // 4))

    def _on_stack(self, sp: int) -> int:
        """Return an address of the stack: the stack pointer of one that has overflowed lies below it."""
        index = 0 if self.front.find(sp) else self.front.after(sp)
        start = self.front.addresses[index]
        return start if index and start - sp < OVERFLOW_BYTES else sp

    def _take_block(self, thread: Thread) -> None:
        """Copy a thread control block: TLS lies below its address or above, glibc's struct pthread likewise."""
        self.take(thread.tls, self.memory.page, 2 * self.memory.page)

    def _take_names(self, state: ProcessState) -> None:
        """Copy the pages that name frames: control block and code of the crashing thread, the vdso, the loader's list.

        By address: elfutils reads no page if the next one has a lower offset (libdwfl/core-file.c, do_more).
        """
        first, thread, vdso = len(self.pieces), state.threads[0], state.auxv.get(AT_SYSINFO_EHDR, 0)
        self._take_block(thread)
        self.take(vdso, 0, VDSO_BYTES, pages=EVERY if state.maps_no_file(vdso) else RESIDENT)
        self.take(thread.pc, 0, 1)  # code that a program generated at run time is in the core
        self._take_loader(state)
        self.pieces[first:] = sorted(self.pieces[first:], key=lambda piece: piece[1])

    def _take_loader(self, state: ProcessState) -> None:
        """Copy the list of loaded libraries: program headers, dynamic section, r_debug, each link_map (<link.h>)."""
        left, self.left = self.left, min(self.left, LOADER_BYTES, self.left // 4)
        share = self.left
        word = self.front.layout.word_bytes
        words = Struct("=6" + self.front.layout.word)
        seen: set[int] = set()
        debug = self._find_debug(state)
        for _ in range(MAX_NAMESPACES):
            content = self._look(debug, words.size)
            if not content:
                break
            version, link, _, _, _, following = words.unpack(content)
            self._take_link_maps(link, seen, Struct("=5" + self.front.layout.word), word)
            if version & 0xFFFFFFFF < 2 or following in seen:
                break
            seen.add(following)
            debug = following
        self.left = left - (share - self.left)

    def _find_debug(self, state: ProcessState) -> int:
        """Return the address of the loader's r_debug, or 0."""
        layout = self.front.layout
        row, words = layout.row, layout.words
        at, count = state.auxv.get(AT_PHDR, 0), min(MAX_HEADERS, state.auxv.get(AT_PHNUM, 0))
        content = self._look(at, row.size * count)
        table = layout.cast(content)
        rows = [table[number * words : (number + 1) * words] for number in range(len(table) // words)]
        kinds = [entry[0] for entry in row.iter_unpack(content)]
        base = next((at - entry[2] for kind, entry in zip(kinds, rows) if kind == PT_PHDR), 0)
        for kind, entry in zip(kinds, rows):
            if kind == PT_DYNAMIC:
                pair = Struct("=2" + layout.word)
                size = min(entry[5], DYNAMIC_BYTES) // pair.size * pair.size
                return int(dict(pair.iter_unpack(self._look(base + entry[2], size))).get(DT_DEBUG, 0))
        return 0

    def _take_link_maps(self, link: int, seen: set[int], struct: Struct, word: int) -> None:
        while link and link not in seen and len(seen) < MAX_LINK_MAPS:
            seen.add(link)
            content = self._look(link, 5 * word)
            if not content:
                return
            _, name, dynamic, following, _ = struct.unpack(content)
            self.take(link, 0, LINK_MAP_BYTES)
            self.take(name, 0, NAME_BYTES)
            self.take(dynamic, 0, DYNAMIC_BYTES // 8)
            link = following

    def _take_threads(self, threads: list[Thread]) -> None:
        """Copy a window of each stack; shrink all windows until they fit into half of what is left."""
        window, share = WINDOW_BYTES, self.left // 2
        heights = [self._height(thread.sp) for thread in threads]
        while window > self.memory.page and sum(min(window, height) for height in heights) > share:
            window //= 2
        blocks = 3 * self.memory.page * len(threads) <= self.left - share
        for thread in threads:
            self.take(thread.sp, BELOW_BYTES if window > self.memory.page else 0, window)
            if blocks:
                self._take_block(thread)
            else:
                self.take(thread.tls, 0, 1)
            self.take(thread.pc, 0, 1)

    def _height(self, sp: int) -> int:
        """Return how much of a stack lies above its stack pointer."""
        index = self.front.find(sp)
        return self.front.span(index)[1] - sp if index else 0

    def _take_modules(self, state: ProcessState) -> None:
        """Copy the first page of each mapping of a program or library, then their small data, the smallest first."""
        front = self.front
        spans = [(start, end, name, front.at(start)) for start, end, name in state.files]
        code = {name for start, _, name, index in spans if front.flags[index] & PF_X}
        data: dict[int, int] = {}
        room = min(FIRST_PAGES_BYTES, self.left // 2)
        for start, end, name, index in spans:
            if name not in code:
                continue
            if room > 0 and front.sizes[index] and front.addresses[index] == start:
                room -= self.take(start, 0, 1, room, pages=OBTAINABLE)
            for address in (start, end):
                segment = front.find(address)
                is_data = segment and front.addresses[segment] == address and front.flags[segment] & PF_W
                if is_data and front.sizes[segment] <= DATA_SEGMENT_BYTES:
                    data[segment] = front.sizes[segment]
        room = min(DATA_BYTES, self.left // 2)
        for segment in sorted(data, key=data.__getitem__):
            room -= self.take(front.addresses[segment], 0, data[segment], room)

    def _take_ended(self, state: ProcessState) -> None:
        """Copy what the loader's data point to: among it the control block of a main thread that has ended.

        libthread_db finds no thread at all without it, and the core has no registers of such a thread.
        """
        front, room = self.front, min(POINTED_BYTES, self.left)
        base = state.auxv.get(AT_BASE, 0)
        loader = next((name for start, _, name in state.files if start == base), None)
        for start, _, name in state.files:
            segment = front.find(start)
            if name != loader or not segment or not front.flags[segment] & PF_W:
                continue
            data = self.memory.read(start, min(front.sizes[segment], POINTING_BYTES))
            for address in dict.fromkeys(front.layout.cast(data).tolist()):
                if room > 0:
                    room -= self.take(address, 0, self.memory.page, room)

    def _take_pointed(self, threads: list[Thread]) -> None:
        """Copy the pages that registers and newest frames point to: they hold what arguments of functions point to."""
        page, room = self.memory.page, min(POINTED_BYTES, self.left)
        pointers: dict[int, int] = {}
        for address in self.pointers(threads, POINTING_BYTES, POINTING_BYTES // 16):
            pointers.setdefault(address // page * page, address)
        for start, address in pointers.items():
            if room <= 0:
                return
            if start not in self._taken:
                room -= self.take(address, 0, 1, room)

    def pointers(self, threads: list[Thread], size: int, other_size: int) -> Iterator[int]:
        """Yield the values of registers and the words of stacks: `size` bytes of the first, `other_size` of others."""
        for thread in threads[:MAX_POINTING_THREADS]:
            yield from thread.registers
            stack = self.memory.read(thread.sp // 8 * 8, size)
            yield from dict.fromkeys(self.front.layout.cast(stack).tolist())
            size = other_size


def is_known(front: Front) -> bool:
    """Tell whether the registers of the core's machine are known."""
    return (front.layout.bits, front.machine) in REGISTERS

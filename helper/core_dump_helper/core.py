"""Owns reading the core from the kernel's pipe, and how long it should be."""

from __future__ import annotations

import os
import select
import struct
import sys
import time
from _queue import Empty, SimpleQueue
from _thread import start_new_thread

from core_dump_helper.system import CHUNK, enlarge, log, read_fields

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_helper.settings import Settings

FEW = 4  # buffers that every dump may have
MAP_POPULATE = 0x8000  # a third less time for a new buffer than a page fault for each of its pages
HEADER_LIMIT = 16 << 20


def elf_length(head: bytes | bytearray) -> tuple[int, int]:
    """Return how many leading bytes must be known, and (when `head` has them) the length its headers promise.

    The kernel says nothing when a dump ends early because its process was killed: only this length tells.
    0, 0 for what is no ELF file. From 65,535 segments on, the first one, which lies behind the table, tells how many.
    """
    if len(head) < 64:
        return 64, 0
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return 0, 0
    order = "<" if head[5] == 1 else ">"
    offsets, layout, at = ("QQ", "8xQ16xQ16x", 54) if head[4] == 2 else ("II", "4xI8xI12x", 42)
    layout = order + layout
    table, sections = struct.unpack_from(order + offsets, head, 32 if head[4] == 2 else 28)
    size, count, section_size, section_count = struct.unpack_from(order + "HHHH", head, at)
    if size != struct.calcsize(layout) or table > HEADER_LIMIT:
        return 0, 0
    end = table + size
    if len(head) >= end:
        if count == 0xFFFF:  # PN_XNUM
            count = max(0, struct.unpack_from(layout, head, table)[0] - table) // size
        end = table + count * size
    if end > HEADER_LIMIT:
        return 0, 0
    if len(head) < end:
        return end, 0
    length = max([offset + held for offset, held in struct.iter_unpack(layout, head[table:end])], default=0)
    return end, max(length, end, sections + section_size * section_count if sections else 0)


class Reader:
    """Reads the core in its own thread, ahead of the compressor, so that the crashed process is released early."""

    def __init__(self, descriptor: int, settings: Settings, deadline: float) -> None:
        """Prepare to read `descriptor`, which is closed at the end, at a limit, or at `deadline` (monotonic)."""
        self.reason, self.size, self.ended = "", 0, False
        self._descriptor, self._deadline = descriptor, deadline
        self._limit = settings.MAX_DUMP_BYTES or sys.maxsize
        self._most, self._allowed, self._allocated = settings.BUFFER_BYTES // CHUNK, FEW, 0
        self._full: SimpleQueue[tuple[memoryview, int]] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        enlarge(descriptor)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the core piece by piece; a piece is valid until the next is asked for."""
        start_new_thread(self._read, ())
        while True:
            buffer, size = self._full.get()
            if not size:
                return
            yield buffer[:size]
            self._free.put(buffer)

    @property
    def is_full(self) -> bool:
        """Tell whether the crashed process waits for the compressor: no buffer is left, or hardly one."""
        return not self.ended and self._allocated == self._allowed <= self._full.qsize() + 2

    def stop(self, reason: str) -> None:
        """Read no more, for this reason; the first one stays."""
        self.reason = self.reason or reason

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        try:
            while not self.reason and self._fill(poll):
                pass
        except (OSError, MemoryError) as error:
            log("reading the core: %s" % error)
            self.stop("read_error")
        finally:
            os.close(self._descriptor)
            self.ended = True
            self._full.put((memoryview(b""), 0))

    def _fill(self, poll: select.poll) -> bool:
        """Fill one buffer and hand it over; False at the end of the core."""
        buffer, size, count = self._buffer(), 0, 1
        room = min(CHUNK, self._limit - self.size)
        if not room:
            self.stop("max_dump_bytes")
        while size < room and count and not self.reason:
            if poll.poll(500):
                count = os.readv(self._descriptor, [buffer[size:room]])
                size += count
            if time.monotonic() > self._deadline:
                self.stop("deadline")
        self.size += size
        if size:
            self._full.put((buffer, size))
        return count > 0

    def _buffer(self) -> memoryview:
        """Return a buffer: a used one, else a new one while memory allows, else the next one that comes free."""
        try:
            return self._free.get_nowait()
        except Empty:
            pass
        if self._allocated == self._allowed < self._most:
            available = int(read_fields("/proc/meminfo")[b"MemAvailable"][0]) // 1024
            eighth = (available + self._allocated) // 8
            self._allowed = max(self._allowed, min(self._allowed + 64, self._most, eighth))
        while self._allocated == self._allowed and not self.reason:
            try:
                return self._free.get(True, 0.5)
            except Empty:
                if time.monotonic() > self._deadline:
                    self.stop("deadline")
        self._allocated += 1
        if self._allocated <= FEW:
            return memoryview(bytearray(CHUNK))
        from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

        return memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE))

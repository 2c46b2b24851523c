"""Owns reading the core from the kernel's pipe, and the length that its ELF headers promise."""

from __future__ import annotations

import os
import select
import sys
import time
from _queue import Empty, SimpleQueue
from _struct import calcsize, iter_unpack, unpack_from
from _thread import start_new_thread

from core_dump_helper.system import CHUNK, enlarge_pipe, log, read_fields, read_file, write_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_helper.settings import Settings

MIN_BUFFERS = 4
"""Buffers that every dump may use, however little memory there is."""
GROWTH_BUFFERS = 64
CACHED = (b"inactive_file ", b"active_file ")
MAP_POPULATE = 0x8000  # a third less time for a new buffer than a page fault for each of its pages
IDENT_BYTES = 64
"""Bytes that hold the ELF header of either class: elf(5)."""
HEADER_LIMIT = 16 << 20
PN_XNUM = 0xFFFF
"""Number of segments in the ELF header when the real number does not fit."""


class ElfHeader:
    """The fields of an ELF header, of either class and byte order, that tell how long a core is."""

    def __init__(self, head: bytes | bytearray) -> None:
        """Read the first IDENT_BYTES of an ELF file."""
        order = "<" if head[5] == 1 else ">"
        wide = head[4] == 2
        self.row = order + ("8xQ16xQ16x" if wide else "4xI8xI12x")
        """Layout of a program header: offset and size in the file."""
        self.table, self._sections = unpack_from(order + ("QQ" if wide else "II"), head, 32 if wide else 28)
        counts = unpack_from(order + "HHHH", head, 54 if wide else 42)
        self.row_bytes, self.rows, self._section_bytes, self._section_count = counts

    def is_valid(self) -> bool:
        """Return whether the table has the usual layout and starts within the limit."""
        return bool(self.row_bytes == calcsize(self.row) and self.table <= HEADER_LIMIT)

    def table_end(self, head: bytes | bytearray) -> int:
        """Return where the program headers end, as far as `head` tells.

        From 65,535 segments on, the first segment tells their number, because it lies right behind the table.
        """
        rows = self.rows
        if rows == PN_XNUM and len(head) >= self.table + self.row_bytes:
            rows = max(0, unpack_from(self.row, head, self.table)[0] - self.table) // self.row_bytes
        elif len(head) < self.table + self.row_bytes:
            rows = 1
        return int(self.table + rows * self.row_bytes)

    def sections_end(self) -> int:
        """Return where the section headers end, or 0 if there are none."""
        return self._sections + self._section_bytes * self._section_count if self._sections else 0


def elf_length(head: bytes | bytearray) -> tuple[int, int]:
    """Return how many leading bytes must be known, and the length that the headers in `head` promise.

    The length is 0 as long as `head` is too short; both are 0 if it is not an ELF file. Only this length reveals a
    dump that ended early because its process was killed: the kernel does not report it.
    """
    if len(head) < IDENT_BYTES:
        return IDENT_BYTES, 0
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return 0, 0
    header = ElfHeader(head)
    if not header.is_valid():
        return 0, 0
    end = header.table_end(head)
    if end > HEADER_LIMIT:
        return 0, 0
    if len(head) < end:
        return end, 0
    rows = iter_unpack(header.row, head[header.table : end])
    length = max([offset + held for offset, held in rows], default=0)
    return end, max(length, end, header.sections_end())


class LengthCheck:
    """Learns from the first pieces of a core how long the whole core must be."""

    def __init__(self) -> None:
        """Start without a byte."""
        self.expected = 0
        """Bytes that the headers promise; 0 while unknown."""
        self._head, self._needed = bytearray(), IDENT_BYTES

    def feed(self, piece: memoryview) -> None:
        """Look at the next piece."""
        if len(self._head) < self._needed:
            self._head += piece
            self._needed, self.expected = elf_length(self._head)

    def verdict(self, size: int) -> str:
        """Return why a core of `size` bytes is incomplete, or an empty string."""
        if self.expected and size >= self.expected:
            return ""
        return "killed" if self._needed else "not_elf"


class Memory:
    """The memory that helpers may use: what the host has available, less where a prepared cgroup has a limit.

    The kernel starts helpers in the root cgroup. Joining another one makes the kernel wait for all CPUs, 5 ms and more,
    so a helper joins only before it waits for a slot or needs memory.
    """

    def __init__(self, cgroup: str) -> None:
        """Store the cgroup's directory; an empty one stands for the root cgroup."""
        self._cgroup = cgroup

    def join(self) -> None:
        """Move this process from the root cgroup to the prepared one."""
        if self._cgroup:
            try:
                write_file(self._cgroup + "/cgroup.procs", b"0")
            except OSError as error:
                log("cannot join CGROUP %a: %s" % (self._cgroup, error.strerror))

    def available(self) -> int:
        """Return how many bytes are available now; page cache counts, because the kernel gives it back."""
        available = int(read_fields("/proc/meminfo")[b"MemAvailable"][0]) * 1024
        if self._cgroup:
            for limit, usage in (
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                try:
                    most, used = self._read(limit), self._read(usage)
                    lines = self._read("memory.stat").split(b"\n")
                except OSError:
                    continue
                if most.isdigit():
                    cached = sum(int(line.split()[1]) for line in lines if line.startswith(CACHED))
                    available = min(available, int(most) - int(used) + cached)
        return max(0, available)

    def _read(self, name: str) -> bytes:
        return read_file(self._cgroup + "/" + name, 16384).strip()


class Reader:
    """Reads the core in its own thread, ahead of the compressor, so that the crashed process is released early."""

    def __init__(self, descriptor: int, settings: Settings, memory: Memory, deadline: float) -> None:
        """Store the descriptor, which is closed at the end of the core, at a limit, or at `deadline` (monotonic)."""
        self.reason, self.size, self.ended = "", 0, False
        self._descriptor, self._deadline = descriptor, deadline
        self._limit = settings.MAX_DUMP_BYTES or sys.maxsize
        self._memory, self._max_buffers = memory, settings.BUFFER_BYTES // CHUNK
        self._allowed, self._allocated = MIN_BUFFERS, 0
        self._full: SimpleQueue[tuple[memoryview, int]] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()

    def chunks(self) -> Iterator[memoryview]:
        """Start reading; yield the core piece by piece. A piece is valid until the next one is requested."""
        enlarge_pipe(self._descriptor)
        start_new_thread(self._read, ())
        while True:
            buffer, size = self._full.get()
            if not size:
                return
            yield buffer[:size]
            self._free.put(buffer)

    @property
    def is_full(self) -> bool:
        """Whether the crashed process waits for the compressor: at most two buffers are free."""
        return not self.ended and self._allocated == self._allowed <= self._full.qsize() + 2

    def stop(self, reason: str) -> None:
        """Stop reading; the first reason stays."""
        self.reason = self.reason or reason

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        try:
            while not self.reason and self._fill(poll):
                pass
        except (OSError, MemoryError) as error:
            log("cannot read the core: %s" % error)
            self.stop("read_error")
        finally:
            os.close(self._descriptor)
            self.ended = True
            self._full.put((memoryview(b""), 0))

    def _fill(self, poll: select.poll) -> bool:
        """Fill one buffer and hand it over; return False at the end of the core."""
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
        """Return a used buffer, else a new one while memory allows, else wait for a used one."""
        try:
            return self._free.get_nowait()
        except Empty:
            pass
        if self._allocated == self._allowed < self._max_buffers:
            self._allow_more()
        while self._allocated == self._allowed and not self.reason:
            try:
                return self._free.get(True, 0.5)
            except Empty:
                if time.monotonic() > self._deadline:
                    self.stop("deadline")
        self._allocated += 1
        if self._allocated <= MIN_BUFFERS:
            return memoryview(bytearray(CHUNK))
        from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

        return memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE))

    def _allow_more(self) -> None:
        """Allow more buffers, up to an eighth of the memory that is available now."""
        if self._allowed == MIN_BUFFERS:
            start_new_thread(self._memory.join, ())
        eighth = (self._memory.available() // CHUNK + self._allocated) // 8
        grown = min(self._allowed + GROWTH_BUFFERS, self._max_buffers, eighth)
        self._allowed = max(self._allowed, grown)

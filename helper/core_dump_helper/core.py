"""Owns reading the core from the kernel's pipe, ahead of the compressor, within the memory that helpers may use."""

from __future__ import annotations

import os
import select
import sys
import time
from _queue import Empty, SimpleQueue
from _thread import start_new_thread

from core_dump_helper.length import LARGE_BYTES, elf_length
from core_dump_helper.system import CHUNK, enlarge_pipe, log, read_fields, read_file, write_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dump_helper.settings import Settings
    from core_dump_helper.vitalpart import VitalPart

    Prepare = Callable[[bytearray, Callable[[int], bool]], VitalPart | None]

MIN_BUFFERS, GROWTH_BUFFERS = 4, 64
"""Buffers that every dump may use, however little memory is available, and how many are added at once."""
CACHED = (b"inactive_file ", b"active_file ")
MAP_POPULATE = 0x8000  # a third less time for a new buffer than a page fault for each of its pages


class Memory:
    """The memory that helpers may use: what the host has available, less where a prepared cgroup has a limit.

    The kernel starts helpers in the root cgroup. Joining another one makes the kernel wait for all CPUs, 5 ms and more,
    so a helper joins only before it waits for a slot or needs memory.
    """

    def __init__(self, settings: Settings) -> None:
        """Store the directory of the prepared cgroup, and the limit of a listener's own one; both may be missing."""
        self._cgroup, self._own = settings.CGROUP, settings.own_memory

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
            available = min(available, _room(self._cgroup))
        elif self._own and self._own.limit_bytes:
            available = min(available, _room(self._own.directory) - self._own.limit_bytes // 2)
        return max(0, available)

    def vital_bytes(self) -> int:
        """Return how many bytes of the vital part may be read now."""
        quarter = self.available() // 4
        return min(quarter, self._own.vital_bytes()) if self._own and not self._cgroup else quarter


def _room(cgroup: str) -> int:
    """Return how many bytes a cgroup's limit leaves, of either version; page cache counts as free."""
    room = sys.maxsize
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used, stat = (
                read_file(cgroup + "/" + name, 16384).strip() for name in (limit, usage, "memory.stat")
            )
        except OSError:
            continue
        if most.isdigit():
            lines = stat.split(b"\n")
            cached = sum(int(line.split()[1]) for line in lines if line.startswith(CACHED))
            room = min(room, int(most) - int(used) + cached)
    return room


class Source:
    """The core as it comes out of the kernel's pipe; bytes can be put back, and ranges left out."""

    def __init__(self, descriptor: int) -> None:
        """Store the descriptor of the pipe."""
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._back = memoryview(b"")
        self._runs = [[sys.maxsize, 1]]
        self._scratch = memoryview(b"")

    def put_back(self, data: bytearray, runs: list[list[int]]) -> None:
        """Read `data` again before the pipe; of both together, keep only the ranges that `runs` marks as kept.

        Args:
            data: everything that was read so far.
            runs: [length, is kept] of successive ranges; an empty list keeps everything.
        """
        self._back = memoryview(data)
        if runs:
            self._runs = runs[::-1]
            self._scratch = memoryview(bytearray(CHUNK))

    def read(self, buffer: memoryview) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end, or -1 if nothing came for half a second."""
        while True:
            run = self._runs[-1]
            target = buffer[: run[0]] if run[1] else self._scratch[: run[0]]
            if self._back:
                count = min(len(target), len(self._back))
                target[:count] = self._back[:count]
                self._back = self._back[count:]
            elif self._poll.poll(500):
                count = os.readv(self._descriptor, [target])
            else:
                return -1
            run[0] -= count
            if not run[0]:
                self._runs.pop()
            if run[1] or not count:
                return count


class Reader:
    """Reads the core in its own thread, ahead of the compressor, so that the crashed process is released early."""

    def __init__(
        self,
        descriptor: int,
        settings: Settings,
        memory: Memory,
        deadline: float,
        prepare: Prepare | None = None,
    ) -> None:
        """Store the descriptor, which is closed at the end of the core, at a limit, or at `deadline` (monotonic).

        `prepare` is called for a core from `prepare_from` bytes on, and for one that is longer than MAX_DUMP_BYTES,
        with its first bytes and a function that adds more of them; without it, every core comes in the kernel's order.
        """
        self.reason, self.size, self.ended, self.is_large = "", 0, False, False
        self.prepare_from = LARGE_BYTES
        self._descriptor, self._deadline, self._prepare = descriptor, deadline, prepare
        self._limit = settings.MAX_DUMP_BYTES or sys.maxsize
        self._memory, self._max_buffers = memory, settings.BUFFER_BYTES // CHUNK
        self._allowed, self._allocated = MIN_BUFFERS, 0
        self._source = Source(descriptor)
        self._vital: SimpleQueue[VitalPart | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int]] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()

    def start(self, head: bytes = b"") -> VitalPart | None:
        """Start reading; return the part before the chunks, or None if the core comes in the kernel's order.

        `head` holds the bytes of the core that were read before.
        """
        self._source.put_back(bytearray(head), [])
        enlarge_pipe(self._descriptor)
        start_new_thread(self._read, ())
        return self._vital.get()

    def chunks(self) -> Iterator[memoryview]:
        """Yield the core piece by piece. A piece is valid until the next one is requested."""
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
        try:
            more = self._begin()
            while more and not self.reason:
                buffer = self._buffer()
                size, more = self._fill(buffer, self._limit)
                self._hand_over(buffer, size)
        except (OSError, MemoryError) as error:
            log("cannot read the core: %s" % error)
            self.stop("read_error")
        finally:
            self._release()
            self._vital.put(None)  # nobody waits for it any more, unless reading failed
            self._full.put((memoryview(b""), 0))

    def _release(self) -> None:
        """Close the pipe: the kernel stops writing and releases the crashed process."""
        if not self.ended:
            self.ended = True
            os.close(self._descriptor)

    def _begin(self) -> bool:
        """Read the first piece, and prepare the vital part of a large core; return False at the end of the core."""
        buffer = self._buffer()
        size, more = self._fill(buffer, sys.maxsize)
        needed, length = elf_length(buffer[:size])
        self.is_large = length >= LARGE_BYTES or needed > size == CHUNK
        is_longer = self._limit < length > size
        if self._prepare and (self.is_large or is_longer or (length and length >= self.prepare_from)):
            return self._begin_prepared(self._prepare, bytearray(buffer[:size]), buffer)
        self._vital.put(None)
        if size > self._limit:
            size = self._limit
            self.stop("max_dump_bytes")
        self._hand_over(buffer, size)
        return more

    def _begin_prepared(self, prepare: Prepare, head: bytearray, buffer: memoryview) -> bool:
        """Hand over the vital part, then the rest of a trimmed dump; return whether the rest of the core follows."""
        vital = prepare(head, lambda count: self._extend(head, count))
        if vital and vital.end > self._limit:
            self.stop("max_dump_bytes")
        self.size = vital.cut(self._limit) if vital else 0
        if vital and vital.trimmed:
            self._release()
            self._vital.put(vital)
            for piece in vital.rest:
                self._hand_over(piece, len(piece))
            return False
        self._source.put_back(head, vital.runs if vital else [])
        self._free.put(buffer)
        self._vital.put(vital)
        return True

    def _extend(self, head: bytearray, count: int) -> bool:
        """Append the next bytes of the core; return False if it ends before, or at the deadline."""
        buffer = memoryview(bytearray(min(count, CHUNK)))
        while count and not self.reason:
            size, _ = self._fill(buffer[:count], sys.maxsize)
            if not size:
                return False
            head += buffer[:size]
            count -= size
        return not count

    def _hand_over(self, buffer: memoryview, size: int) -> None:
        self.size += size
        if size:
            self._full.put((buffer, size))

    def _fill(self, buffer: memoryview, limit: int) -> tuple[int, bool]:
        """Fill a buffer as far as `limit` bytes in all allow; return the number of bytes, and False at the end."""
        size, count = 0, 1
        room = min(len(buffer), limit - self.size)
        if room <= 0:
            self.stop("max_dump_bytes")
        while size < room and count and not self.reason:
            count = self._source.read(buffer[size:room])
            size += max(0, count)
            if time.monotonic() > self._deadline:
                self.stop("deadline")
        return size, count != 0

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

"""Owns where the bytes of an object come from: a `.gz` unchanged, a raw core through gzip, a salvaged partial repaired.

Each source yields its `Part`s in order. The flow limits the number of buffers of a compressed stream.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
from typing import TYPE_CHECKING, Protocol

from core_dump_collector.budget import LEAST_BUFFERS, MEBIBYTE, MOST_BUFFERS
from core_dump_collector.node.pagecache import read_blocks
from core_dump_collector.s3 import compression, ordering
from core_dump_collector.s3.parts import BufferPart, FilePart, Memory
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.names import is_compressed
from core_dump_format.reorder import ORDER_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.flow import Flow
    from core_dump_collector.s3.parts import Part

MOST_PARTS = 10_000
"""Amazon S3 User Guide, "Multipart upload limits"."""
_WAIT_SECONDS = 1.0
_DAMAGE_BYTES = 4096
"""A damaged stream is decompressed in small pieces, because the output of a piece that has an error is lost."""


class Source(Protocol):
    """Where the parts of an object come from."""

    part_bytes: int
    gzip: bool
    """Whether the object is gzip, so that its key ends in `.gz`."""
    facts: Mapping[str, str | int]
    """Fields that the source adds to the metadata object, such as the length of a core that it compresses."""
    order: int
    """Version of the order of a raw core; 0 for the kernel's."""

    def parts(self, flow: Flow | None = None) -> Iterator[Part]:
        """Yield the parts in order, at least one; each must be released, in any order.

        `flow` says how many buffers a compressed stream may have, two without it, and gets its progress.
        """
        ...


class FileSource:
    """A file that is uploaded as it is."""

    def __init__(self, dump: DumpFile, part_bytes: int) -> None:
        """Describe the file."""
        self.gzip = dump.name.endswith(".gz")
        self.facts: Mapping[str, str | int] = {}
        self.order = 0
        self.part_bytes = part_size(dump.size_bytes, part_bytes)
        self._dump = dump

    def parts(self, flow: Flow | None = None) -> Iterator[Part]:
        """Yield ranges of the file; an empty file is one empty part."""
        size = self._dump.size_bytes
        memory = Memory(min(size, self.part_bytes))
        for number, offset in enumerate(range(0, max(size, 1), self.part_bytes), start=1):
            length = min(self.part_bytes, size - offset)
            if flow:
                flow.beat()  # a file that is read only for its checksums makes progress as well
            is_last = offset + length >= size
            yield FilePart(self._dump.fd, number, offset, length, last=is_last, memory=memory)


class GzipSource:
    """Bytes that are compressed while they are uploaded.

    Compression and sending run on different threads.
    """

    gzip = True

    def __init__(
        self,
        compressed: Callable[[], Iterator[bytes]],
        bound_bytes: int,
        part_bytes: int,
        facts: Mapping[str, str | int] | None = None,
        order: int = 0,
    ) -> None:
        """Upload what `compressed` yields, the same bytes each time; `bound_bytes` is an upper bound of its length."""
        self._compressed = compressed
        self.facts: Mapping[str, str | int] = facts or {}
        self.order = order
        self.part_bytes = part_size(bound_bytes, part_bytes)

    def parts(self, flow: Flow | None = None) -> Iterator[Part]:
        """Yield the compressed stream in parts, each in a buffer of its own; `flow` says how many there may be."""
        buffers = _Buffers(self.part_bytes, flow)
        number, buffer, filled = 1, buffers.take(), 0
        for piece in self._compressed():
            buffers.beat()
            rest = memoryview(piece)
            while rest:
                if filled == self.part_bytes:
                    yield buffers.part(number, buffer, filled, last=False)
                    number, buffer, filled = number + 1, buffers.take(), 0
                taken = min(len(rest), self.part_bytes - filled)
                buffer[filled : filled + taken] = rest[:taken]
                rest, filled = rest[taken:], filled + taken
        yield buffers.part(number, buffer, filled, last=True)


class _Buffers:
    """The buffers of one stream: made when parts need them, as many as the flow allows at that time."""

    def __init__(self, size_bytes: int, flow: Flow | None) -> None:
        self.free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._size_bytes = size_bytes
        self._flow = flow
        self._made = 0

    def take(self) -> mmap.mmap:
        """Return a buffer that is free; make one, or wait for one."""
        allowed = min(MOST_BUFFERS, max(LEAST_BUFFERS, self._flow.buffers if self._flow else 0))
        if self._made < allowed and self.free.empty():
            self._made += 1
            return mmap.mmap(-1, self._size_bytes)
        while True:
            with contextlib.suppress(queue.Empty):
                return self.free.get(timeout=_WAIT_SECONDS)
            self.beat()

    def part(self, number: int, buffer: mmap.mmap, filled: int, *, last: bool) -> BufferPart:
        """Return the part that a buffer holds; its release makes the buffer free."""
        view = memoryview(buffer)[:filled]
        return BufferPart(number, view, last=last, give_back=lambda: self.free.put(buffer))

    def beat(self) -> None:
        """Note progress."""
        if self._flow:
            self._flow.beat()


def open_source(
    dump: DumpFile, part_bytes: int, *, compress_raw: bool, salvaged: bool, ordered: bool = True
) -> Source:
    """Return the source that suits a dump.

    Args:
        dump: the file.
        part_bytes: least size of the object's parts.
        compress_raw: compress a raw core, and put its vital part first.
        salvaged: the file is an abandoned partial, whose compressed stream has no end.
        ordered: False to repeat, byte for byte, an upload in the kernel's order.
    """
    if salvaged and dump.name.endswith(".gz") and is_gzip(dump.fd):
        return GzipSource(lambda: compression.compress(_salvage(dump.fd)), 2 * dump.size_bytes, part_bytes)
    if is_compressed(dump.name) or not compress_raw:
        return FileSource(dump, part_bytes)
    bound = dump.data_bytes + dump.data_bytes // 64 + dump.size_bytes // 512 + 2 * MEBIBYTE
    core = ordering.order(dump.fd, dump.size_bytes) if ordered else None
    if core is not None:
        bound += len(core.vital)
        return GzipSource(core.compressed, bound, part_bytes, core.facts(), ORDER_VERSION)
    facts = {"bytes": dump.size_bytes}
    return GzipSource(lambda: compression.compress(read_blocks(dump.fd, MEBIBYTE)), bound, part_bytes, facts)


def part_size(bound_bytes: int, part_bytes: int) -> int:
    """Return the size of an object's parts: `part_bytes`, or larger if it would need over 10,000 of them."""
    least = -(-bound_bytes // MOST_PARTS)
    return part_bytes if least <= part_bytes else -(-least // MEBIBYTE) * MEBIBYTE


def is_gzip(fd: int) -> bool:
    """Tell whether a file begins as gzip does."""
    return os.pread(fd, 2, 0) == b"\x1f\x8b"


def _salvage(fd: int) -> Iterator[bytes]:
    return inflate_until_damage(read_blocks(fd, _DAMAGE_BYTES))

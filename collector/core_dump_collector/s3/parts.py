"""Owns the bytes of an object, in parts: a `.gz` unchanged, a raw core through gzip, a salvaged partial repaired.

A `Part` can be read several times: for the checksum, the signature and each attempt to send it. Memory stays flat: a
part of a file is read from the file, a block at a time; each part of a compressed stream is in a buffer, and the flow
limits the number of buffers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import queue
from typing import TYPE_CHECKING, Protocol

from isal import isal_zlib

from core_dump_collector.budget import LEAST_BUFFERS, MOST_BUFFERS
from core_dump_collector.node.pagecache import drop_cache, read_blocks
from core_dump_collector.s3 import compression, ordering
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.names import is_compressed
from core_dump_format.reorder import ORDER_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.flow import Flow

BLOCK_BYTES = 256 * 1024
MEBIBYTE = 1024 * 1024
MOST_PARTS = 10_000
"""Amazon S3 User Guide, "Multipart upload limits"."""
SMALL_BYTES = 512 * 1024
"""Up to here a body is sent from memory, which saves the round trip of `Expect: 100-continue`."""
_WAIT_SECONDS = 1.0
_DAMAGE_BYTES = 4096
"""A damaged stream is decompressed in small pieces, because the output of a piece that has an error is lost."""

_Buffer = bytes | memoryview


class Body(io.RawIOBase):
    """A part as the file object that botocore sends. A read returns at least a block, even if less is requested.

    http.client and urllib3 ask for 16 KiB at a time, which would cost more CPU than the sending itself.
    """

    def __init__(self, part: Part) -> None:
        """Start at the part's first byte."""
        super().__init__()
        self._part = part
        self._position = 0

    def __len__(self) -> int:
        """Return the part's length."""
        return self._part.size_bytes

    def __bool__(self) -> bool:
        """Return true even for an empty part, which `len` would make false."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next block; empty at the end."""
        left = max(0, self._part.size_bytes - self._position)
        wanted = left if size < 0 else min(left, max(size, BLOCK_BYTES))
        block = self._part.block(self._position, wanted)
        self._position += len(block)
        return block  # type: ignore[return-value]  # a memoryview is as good for a socket and a hash

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._part.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True


class Part:
    """One piece of an object, numbered from 1."""

    def __init__(self, number: int, size_bytes: int, *, last: bool) -> None:
        """Describe the part; subclasses know its bytes."""
        self.number = number
        self.size_bytes = size_bytes
        self.last = last
        self.error: OSError | None = None
        """The error of reading it, which botocore reports as an error of the network."""

    def block(self, offset: int, size: int) -> _Buffer:
        """Return up to `size` bytes from `offset` of the part."""
        raise NotImplementedError

    def release(self) -> None:
        """Free the part; it is not read again."""

    def body(self) -> bytes | Body:
        """Return the body that botocore sends."""
        return bytes(self.block(0, self.size_bytes)) if self.size_bytes <= SMALL_BYTES else Body(self)

    def blocks(self) -> Iterator[_Buffer]:
        """Yield the part's bytes."""
        position = 0
        while position < self.size_bytes:
            block = self.block(position, min(MEBIBYTE, self.size_bytes - position))
            yield block
            position += len(block)

    def crc32(self) -> int:
        """Return the CRC-32 of the part."""
        crc = 0
        for block in self.blocks():
            crc = isal_zlib.crc32(block, crc)
        return crc

    def md5(self) -> str:
        """Return the MD5 of the part in hex, which most stores use as ETag."""
        digest = hashlib.md5(usedforsecurity=False)
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


class FilePart(Part):
    """A range of a file."""

    def __init__(self, fd: int, number: int, offset: int, size_bytes: int, *, last: bool) -> None:
        """Describe the range."""
        super().__init__(number, size_bytes, last=last)
        self._fd = fd
        self._offset = offset

    def block(self, offset: int, size: int) -> bytes:
        """Read at the offset; raise OSError if the file has become shorter."""
        try:
            block = os.pread(self._fd, size, self._offset + offset)
            if not block and size:
                raise OSError("the file became shorter while it was read")  # noqa: TRY301
        except OSError as error:
            self.error = error
            raise
        return block

    def body(self) -> bytes | Body:
        """Return the body that botocore sends; a small one is in memory."""
        return b"".join(self.blocks()) if self.size_bytes <= SMALL_BYTES else Body(self)

    def release(self) -> None:
        """Drop the range from the page cache, which the node's own work needs."""
        drop_cache(self._fd, self._offset, self.size_bytes)


class BufferPart(Part):
    """A piece of a stream, in memory until it is released."""

    def __init__(self, number: int, view: memoryview, *, last: bool, give_back: Callable[[], None]) -> None:
        """Use the buffer until `release`."""
        super().__init__(number, len(view), last=last)
        self._view = view
        self._give_back = give_back

    def block(self, offset: int, size: int) -> memoryview:
        """Return a view of the buffer."""
        return self._view[offset : offset + size]

    def release(self) -> None:
        """Return the buffer to the stream."""
        self._view.release()
        self._give_back()


class Source(Protocol):
    """Where the parts of an object come from."""

    part_bytes: int
    gzip: bool
    """Whether the object is gzip, so that its key ends in `.gz`."""
    facts: Mapping[str, str | int]
    """Fields of the metadata object that come from what is done here: the length of a file that is compressed, say."""
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
        for number, offset in enumerate(range(0, max(size, 1), self.part_bytes), start=1):
            length = min(self.part_bytes, size - offset)
            if flow:
                flow.beat()  # a file that is read only for its checksums makes progress as well
            yield FilePart(self._dump.fd, number, offset, length, last=offset + length >= size)


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

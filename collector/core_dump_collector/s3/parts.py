"""Owns the parts of an object that is uploaded: ranges of a file, and pieces of a compressed stream.

A `Part` can be read several times: for the checksum, the signature and each attempt to send it. Memory stays flat: a
part of a file is read from the file, a block at a time; each part of a compressed stream is in a buffer.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING

from isal import isal_zlib

from core_dump_collector.node.pagecache import drop_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK_BYTES = 1024 * 1024
MOST_FREE_BLOCKS = 2
"""Blocks of memory that are kept for the next parts of a file."""
SMALL_BYTES = 512 * 1024
"""Up to here a body is sent from memory, which saves the round trip of `Expect: 100-continue`."""

_Buffer = bytes | memoryview


class Body(io.RawIOBase):
    """A part as the file object that botocore sends. `read(n)` returns a block, whatever n is; `read()` the rest.

    http.client and urllib3 ask for 16 KiB at a time, which would cost more CPU than the sending itself. A block is
    valid until anything else reads the part, or releases it.
    """

    def __init__(self, part: Part) -> None:
        """Start at the part's first byte."""
        super().__init__()
        self._part = part
        self._position = 0

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the bytes from here on in hex, if it is known."""
        return None if self._position else self._part.sha256

    def __len__(self) -> int:
        """Return the part's length."""
        return self._part.size_bytes

    def __bool__(self) -> bool:
        """Return true even for an empty part, which `len` would make false."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next block, or all remaining bytes if no size is given; at the end, return nothing."""
        left = max(0, self._part.size_bytes - self._position)
        block = self._part.block(self._position, left if size < 0 else min(left, BLOCK_BYTES))
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
        self.sha256: str | None = None
        """Of the part, in hex, once `crc32` has computed it."""
        self.error: OSError | None = None
        """The error of reading it, which botocore reports as an error of the network."""

    def block(self, offset: int, size: int) -> _Buffer:
        """Return up to `size` bytes from `offset` of the part, valid until the next call or `release`."""
        raise NotImplementedError

    def release(self) -> None:
        """Free the part; it is not read again."""

    def body(self) -> bytes | Body:
        """Return the body that botocore sends; a small one is in memory."""
        return b"".join(map(bytes, self.blocks())) if self.size_bytes <= SMALL_BYTES else Body(self)

    def blocks(self) -> Iterator[_Buffer]:
        """Yield the part's bytes; each block is valid until the next one."""
        position = 0
        while position < self.size_bytes:
            block = self.block(position, min(BLOCK_BYTES, self.size_bytes - position))
            yield block
            position += len(block)

    def crc32(self, *, with_sha256: bool = False) -> int:
        """Return the CRC-32 of the part; of one that is not small, compute the SHA-256 in the same pass."""
        crc, digest = 0, hashlib.sha256() if with_sha256 and self.size_bytes > SMALL_BYTES else None
        for block in self.blocks():
            crc = isal_zlib.crc32(block, crc)
            if digest is not None:
                digest.update(block)
        self.sha256 = digest.hexdigest() if digest is not None else None
        return crc

    def md5(self) -> str:
        """Return the MD5 of the part in hex, which most stores use as ETag."""
        digest = hashlib.md5(usedforsecurity=False)
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


class Memory:
    """Blocks of memory that the parts of one file are read into, each by one part at a time.

    A block that was used a moment ago is still in the processor's cache, and a new one has to be zeroed first.
    """

    def __init__(self, size_bytes: int) -> None:
        """Use blocks for parts of this size."""
        self._size_bytes = min(BLOCK_BYTES, size_bytes)
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """Return a block that no part uses."""
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(bytearray(self._size_bytes))

    def give_back(self, block: memoryview) -> None:
        """Keep a block for the next part, unless enough are free: there may be fewer connections than before."""
        if len(self._free) < MOST_FREE_BLOCKS:
            self._free.append(block)


class FilePart(Part):
    """A range of a file."""

    def __init__(  # noqa: PLR0913  a range, and where it is read to
        self, fd: int, number: int, offset: int, size_bytes: int, *, last: bool, memory: Memory | None = None
    ) -> None:
        """Describe the range."""
        super().__init__(number, size_bytes, last=last)
        self._fd = fd
        self._offset = offset
        self._memory = memory or Memory(size_bytes)
        self._own: memoryview | None = None

    def block(self, offset: int, size: int) -> memoryview:
        """Read at the offset; raise OSError if the file has become shorter."""
        if self._own is None:
            self._own = self._memory.take()
        view = self._own[:size] if size <= len(self._own) else memoryview(bytearray(size))
        try:
            count = os.preadv(self._fd, [view], self._offset + offset)
            if not count and size:
                raise OSError("the file became shorter while it was read")  # noqa: TRY301
        except OSError as error:
            self.error = error
            raise
        return view[:count]

    def release(self) -> None:
        """Drop the range from the page cache, which the node's own work needs; a small dump is deleted in a moment."""
        if self._own is not None:
            self._memory.give_back(self._own)
            self._own = None
        if self.size_bytes > SMALL_BYTES:
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

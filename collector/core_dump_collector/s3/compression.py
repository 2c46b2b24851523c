"""Owns the compression of raw cores while they are uploaded: one gzip member, made on several threads."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from isal import isal_zlib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LEVEL = 1
THREADS = min(2, len(os.sched_getaffinity(0)))
"""Uploads wait for the compressor if it has one thread (docs/benchmarks.md); more than two would take CPU from the
node's own work."""
_BLOCK_BYTES = 1 << 20
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
"""RFC 1952, section 2.3: deflate, no flags, no time, fastest, unknown system. The same core gives the same bytes."""
_LAST_BLOCK = b"\x03\0"
"""RFC 1951, section 3.2.3: an empty block that is marked as the last."""
_RAW = -15
"""zlib's wbits: 15 bits of window, no framing."""


def compress(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield one gzip member that holds the pieces; each MiB is compressed on its own, `THREADS` of them at a time.

    The bytes depend on the pieces alone, so an upload that was cut short finds the parts that it has sent.
    """
    yield _HEADER
    crc = size_bytes = 0
    for piece, its_crc, its_bytes in _compress_in_order(_join(pieces)):
        crc = isal_zlib.crc32_combine(crc, its_crc, its_bytes)
        size_bytes += its_bytes
        yield piece
    yield _LAST_BLOCK + crc.to_bytes(4, "little") + (size_bytes & 0xFFFFFFFF).to_bytes(4, "little")


def _join(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield blocks of a MiB or more; a piece that is long enough is not copied."""
    held: list[bytes] = []
    size_bytes = 0
    for piece in pieces:
        held.append(piece)
        size_bytes += len(piece)
        if size_bytes >= _BLOCK_BYTES:
            yield b"".join(held)
            held, size_bytes = [], 0
    if held:
        yield b"".join(held)


def _compress_in_order(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, int, int]]:
    ahead: deque[Future[tuple[bytes, int, int]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for block in blocks:
            ahead.append(pool.submit(_compress_block, block))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _compress_block(block: bytes) -> tuple[bytes, int, int]:
    """Compress a block; return deflate blocks that end on a byte, and the CRC-32 and length of the input."""
    compressor = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, _RAW)
    piece = compressor.compress(block) + compressor.flush(isal_zlib.Z_SYNC_FLUSH)
    return piece, isal_zlib.crc32(block), len(block)

"""Owns the way of a dump to standard output: parts are read ahead, written in order, and verified at the end.

Written bytes cannot be taken back, so only the exit status tells whether they are the dump. A decompression bomb is
still stopped at the promised length.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core_dump_format.crc32 import encode_crc32
from core_dump_format.text import printable
from core_dumps.errors import RefusedError
from core_dumps.head import read_head
from core_dumps.parts import FETCHERS, PART_BYTES, Remote, most_bytes, open_remote, unpack
from core_dumps.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump
    from core_dumps.fetch import Progress


@dataclass(slots=True)
class _Sum:
    crc: int = 0


def stream(
    bucket: Bucket, dump: Dump, output: BinaryIO, progress: Progress, *, keep_compressed: bool
) -> str | None:
    """Write a dump, decompressed, and return a warning.

    Raises:
        RefusedError: the written bytes are not the dump that was uploaded.
        CliError: it cannot be read.
    """
    remote = open_remote(bucket, dump)
    unpacks = dump.compressed and not keep_compressed
    head = None if keep_compressed else read_head(bucket, dump).core
    promise = head.expected_bytes if head else None
    limit = most_bytes(dump, promise) if unpacks else remote.size_bytes
    progress.start("download", remote.size_bytes)
    sum_, written = _Sum(), 0
    blocks = _blocks(remote, progress, sum_)
    for piece in unpack(blocks) if unpacks else blocks:
        written += len(piece)
        if written > limit:
            raise RefusedError(
                f"its content is longer than the {limit} bytes that it promises: cut off there"
            )
        output.write(piece)
    output.flush()
    _check(remote, encode_crc32(sum_.crc), None if keep_compressed else written)
    if promise is not None and promise != written:
        return f"truncated: it has {written} of the {promise} bytes that its headers promise"
    return None if remote.crc32 is not None else "nothing was verified: no checksum is known"


def _check(remote: Remote, crc: str, written: int | None) -> None:
    """Compare with what the collector recorded."""
    if remote.crc32 is not None and remote.crc32 != crc:
        uploaded = printable(remote.crc32)
        raise RefusedError(f"its CRC-32 is {crc}, but {uploaded} was uploaded: do not use what was written")
    recorded = remote.dump.number("bytes")
    if written is not None and recorded is not None and recorded != written:
        raise RefusedError(f"it has {written} bytes, but {recorded} were dumped: do not use what was written")


def _blocks(remote: Remote, progress: Progress, sum_: _Sum) -> Iterator[bytes]:
    """Yield an object's bytes in order; at most one part for each fetcher is in memory."""
    parts = [(at, min(at + PART_BYTES, remote.size_bytes)) for at in range(0, remote.size_bytes, PART_BYTES)]
    coming, waiting = iter(parts), deque[Any]()
    with Pool(FETCHERS) as pool:
        while True:
            while len(waiting) < FETCHERS and (part := next(coming, None)) is not None:
                waiting.append(pool.submit(lambda part: b"".join(remote.read(*part)), part))
            if not waiting:
                return
            block = waiting.popleft().result()
            sum_.crc = zlib.crc32(block, sum_.crc)
            progress.advance(len(block))
            yield block

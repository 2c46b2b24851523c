"""Owns the way of a dump to standard output: parts read ahead, written in order, and judged once all were written.

What was written cannot be taken back, so only the exit code says whether it was the dump. A bomb is still stopped at
the length that was promised.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core_dump_format.crc32 import encode_crc32
from core_dump_format.text import printable
from core_dumps.errors import RefusedError
from core_dumps.head import read_head
from core_dumps.parts import FETCHERS, PART_BYTES, identify, most_bytes, read_part, unpack

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
        RefusedError: what was written is not what was uploaded.
        CliError: it cannot be read.
    """
    etag, remote_crc = identify(bucket, dump)
    packed = dump.compressed and not keep_compressed
    head = None if keep_compressed else read_head(bucket, dump).core
    promise = head.expected_bytes if head else None
    limit = most_bytes(dump, promise) if packed else dump.size_bytes or 0
    progress.start("download", dump.size_bytes)
    sum_, written = _Sum(), 0
    blocks = _blocks(bucket, dump, etag, progress, sum_)
    for piece in unpack(blocks) if packed else blocks:
        written += len(piece)
        if written > limit:
            raise RefusedError(f"more comes out of it than the {limit} bytes that it promises: cut off there")
        output.write(piece)
    output.flush()
    expected, found = dump.text("crc32") or remote_crc, encode_crc32(sum_.crc)
    if expected is not None and expected != found:
        raise RefusedError(
            f"CRC-32 is {found}, but {printable(expected)} was uploaded: do not use what was written"
        )
    told = dump.number("bytes")
    if not keep_compressed and told is not None and told != written:
        raise RefusedError(
            f"{written} bytes came out of it, but {told} were dumped: do not use what was written"
        )
    if promise is not None and promise != written:
        return f"truncated: {written} of the {promise} bytes that its headers promise"
    return None if expected is not None else "nothing was verified: no checksum is known"


def _blocks(bucket: Bucket, dump: Dump, etag: str, progress: Progress, sum_: _Sum) -> Iterator[bytes]:
    """Yield an object's bytes in order; as many parts as there are fetchers are in memory."""
    coming = iter(range(-(-(dump.size_bytes or 0) // PART_BYTES)))
    waiting = deque[Any]()
    with ThreadPoolExecutor(FETCHERS) as pool:
        try:
            while True:
                while len(waiting) < FETCHERS and (number := next(coming, None)) is not None:
                    waiting.append(pool.submit(lambda n: b"".join(read_part(bucket, dump, etag, n)), number))
                if not waiting:
                    return
                part = waiting.popleft().result()
                sum_.crc = zlib.crc32(part, sum_.crc)
                progress.advance(len(part))
                yield part
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

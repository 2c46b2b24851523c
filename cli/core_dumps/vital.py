"""Owns the vital part of a dump: the few megabytes at its front that every backtrace is made of.

The helper writes headers, notes, stacks and the loader's list first, as a gzip member of its own (docs/contracts.md).
Its compressed length and CRC-32 are in the metadata object, so one ranged request fetches it and proves it. The core
that is made of it opens in any debugger; memory that lies further back in the dump is missing from it, not zero.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from core_dump_format.elf import drop_segments_beyond
from core_dump_format.text import printable
from core_dumps.errors import RefusedError
from core_dumps.parts import Remote, unpack
from core_dumps.workfile import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump
    from core_dumps.fetch import Progress

MOST_COMPRESSED_BYTES = 64 * 1024 * 1024
"""The helper writes at most 32 MiB before compression, besides headers and notes."""
MOST_BYTES = 256 * 1024 * 1024


def vital_bytes(dump: Dump) -> int | None:
    """Return the compressed length of a dump's vital part; None if there is none, or its metadata is impossible."""
    size, crc32 = dump.number("vital_bytes"), dump.number("vital_crc32")
    if dump.text("vital") not in {"whole", "partial"} or size is None or crc32 is None:
        return None
    return size if 0 < size <= min(MOST_COMPRESSED_BYTES, dump.size_bytes or 0) else None


def fetch_vital(bucket: Bucket, dump: Dump, path: str, progress: Progress) -> None:
    """Download the vital part, verify it, and write it to `path` as a core of its own.

    Raises:
        RefusedError: it differs from what was uploaded.
        CliError: it cannot be read.
    """
    progress.start("vital part", vital_bytes(dump) or 0)
    packed = read_vital(bucket, dump, progress.advance)
    core = bytearray()
    for piece in unpack([packed]):
        core += piece
        if len(core) > MOST_BYTES:
            raise RefusedError(f"the vital part decompresses to more than {MOST_BYTES} bytes: not kept")
    try:
        drop_segments_beyond(core)
    except ValueError as error:
        raise RefusedError(f"the vital part is not the front of a core: {error}") from None
    with whole_file(path, ".vital-") as file:
        file.write(core)


def read_vital(bucket: Bucket, dump: Dump, advance: Callable[[int], None] = lambda _: None) -> bytes:
    """Return the compressed vital part of a dump, verified; `advance` is called with the length of each piece.

    Raises:
        RefusedError: it differs from what was uploaded.
        CliError: it cannot be read.
    """
    size = vital_bytes(dump)
    if size is None:
        raise RefusedError(f"{printable(dump.key)}: its metadata names no vital part")
    pieces = []
    for piece in Remote(bucket, dump, size, None, None).read(0, size):
        advance(len(piece))
        pieces.append(piece)
    packed = b"".join(pieces)
    if zlib.crc32(packed) != dump.number("vital_crc32"):
        raise RefusedError("the CRC-32 of the vital part is not the one that was uploaded: not kept")
    return packed

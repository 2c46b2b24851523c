"""Owns reading gzip: files of one or more members (RFC 1952), a piece of bounded size at a time."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PIECE_BYTES = 1 << 20
"""Length of the output that exists at a time, however well a bomb is compressed."""
MOST_EMPTY_MEMBERS = 1000
"""In a row. One takes 20 bytes and some microseconds: millions would keep a reader busy without a result."""
_GZIP = 31
"""zlib's wbits: 15 bits of window, gzip framing."""

_new_stream: Callable[..., Any]
_DAMAGE: tuple[Any, ...]
try:
    from isal import igzip_lib, isal_zlib

    _new_stream, _DAMAGE = isal_zlib.decompressobj, (igzip_lib.IsalError, zlib.error)
except ImportError:
    _new_stream, _DAMAGE = zlib.decompressobj, (zlib.error,)


class DamagedError(ValueError):
    """The gzip data is damaged, or ends early; the message says which."""


def inflate(blocks: Iterable[bytes], piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield the decompressed content of a gzip file; no piece is empty.

    Raises:
        DamagedError: after everything before the damage was yielded.
    """
    stream = _new_stream(wbits=_GZIP)
    started, empty = False, 0
    for block in blocks:
        rest, piece = block, b""
        while rest or len(piece) == piece_bytes:  # the decompressor may hold more than one full piece
            if stream.eof:
                stream, empty = _new_stream(wbits=_GZIP), empty + 1
                if empty > MOST_EMPTY_MEMBERS:
                    raise DamagedError("thousands of gzip members have no content")
            started = True
            try:
                piece = stream.decompress(rest, piece_bytes)
            except _DAMAGE as error:
                raise DamagedError(f"the gzip data is damaged: {error}") from None
            if piece:
                empty = 0
                yield piece
            rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    if started and not stream.eof:
        raise DamagedError("the gzip data ends early")


def inflate_until_damage(blocks: Iterable[bytes], piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield the decompressed content of a gzip file up to its end or its first damage."""
    try:
        yield from inflate(blocks, piece_bytes)
    except DamagedError:
        return

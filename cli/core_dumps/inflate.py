"""Owns decompression: gzip of one or more members as a stream of pieces, each of bounded size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isal import isal_zlib
from isal.igzip_lib import IsalError

from core_dumps.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PIECE_BYTES = 1024 * 1024
"""So much of the output exists at a time, however well a bomb is compressed."""
_GZIP_WINDOW = 31


def inflate(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what decompresses of a gzip file.

    Raises:
        RefusedError: it is damaged, or ends early.
    """
    stream = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
    ended = started = False
    for block in blocks:
        rest = block
        while rest:
            if ended:
                stream = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
            started = True
            try:
                piece = stream.decompress(rest, PIECE_BYTES)
            except IsalError as error:  # type: ignore[misc,unused-ignore]  # no stubs
                raise RefusedError(f"the gzip data is damaged: {error}") from None
            ended = stream.eof
            if piece:
                yield piece
            rest = stream.unused_data if ended else stream.unconsumed_tail
    if not ended and started:
        raise RefusedError("the gzip data ends early")


def reader(pieces: Iterator[bytes]) -> Callable[[int], bytes]:
    """Return a `read(n)` of pieces; `n` is a hint, as elfcore takes it."""

    def read(_: int) -> bytes:
        return next(pieces, b"")

    return read

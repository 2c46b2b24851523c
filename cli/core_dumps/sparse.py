"""Owns writing a core: aligned runs of zeros become holes, found at the speed of memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLE_BYTES = 64 * 1024
_ZEROS = bytes(HOLE_BYTES)


def write_sparse(file: int, pieces: Iterator[bytes], at: int = 0) -> int:
    """Write pieces one after the other from an offset on, leaving aligned blocks of zeros out; return their end."""
    rest = b""
    for piece in pieces:
        block = rest + piece if rest else piece
        whole = len(block) // HOLE_BYTES * HOLE_BYTES
        for first, end in _data(block, whole):
            write_all(file, memoryview(block)[first:end], at + first)
        at, rest = at + whole, block[whole:]
    write_all(file, rest, at)
    return at + len(rest)


def write_all(file: int, piece: bytes | memoryview, at: int) -> None:
    """Write a piece at an offset; the kernel may take less of it at a time."""
    view = memoryview(piece)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _data(block: bytes, whole: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges between blocks of zeros.

    `startswith` compares bytes with memcmp and copies nothing; a memoryview would be compared item by item.
    """
    first = 0
    for at in range(0, whole, HOLE_BYTES):
        if block.startswith(_ZEROS, at):
            if first < at:
                yield first, at
            first = at + HOLE_BYTES
    if first < whole:
        yield first, whole

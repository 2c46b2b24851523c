"""Owns reading a core: from front to back, as it comes out of a decompressor or a download, or from a file."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

READ_BYTES = 256 * 1024


class EndError(Exception):
    """The requested bytes lie past the end of the core, the size limit or the deadline."""


class Forward:
    """Reads bytes at ascending offsets from a stream that cannot go back, up to a size limit and a deadline."""

    def __init__(self, read: Callable[[int], bytes], most_bytes: int, seconds: float = float("inf")) -> None:
        """Read with `read(n)`, which returns up to n bytes, and none at the end."""
        self._read = read
        self._most_bytes = most_bytes
        self._deadline = time.monotonic() + seconds
        self._kept = b""
        self._position = 0
        """Offset of the first kept byte."""

    @classmethod
    def over(cls, pieces: Iterable[bytes], most_bytes: int, seconds: float = float("inf")) -> Forward:
        """Read from pieces of any length."""
        coming = iter(pieces)
        return cls(lambda _: next(coming, b""), most_bytes, seconds)

    def take(self, offset: int, size: int) -> bytes:
        """Return the bytes at an offset; an offset before the last one taken cannot be read again.

        Raises:
            EndError: not all of them can be read.
        """
        found = self.reach(offset, size)
        if len(found) < size:
            raise EndError
        return found

    def reach(self, offset: int, size: int) -> bytes:
        """Return as many of the bytes at an offset as can be read."""
        size = min(size, self._most_bytes - offset)
        if offset < self._position or size <= 0:
            return b""
        while self._position + len(self._kept) <= offset:
            self._position += len(self._kept)
            self._kept = self._more()
            if not self._kept:
                return b""
        self._kept = self._kept[offset - self._position :]
        self._position = offset
        pieces, have = [self._kept], len(self._kept)
        while have < size:
            piece = self._more()
            if not piece:
                break
            pieces.append(piece)
            have += len(piece)
        self._kept = b"".join(pieces)
        return self._kept[:size]

    def check_deadline(self) -> None:
        """Stop work that needs no more bytes but takes too long.

        Raises:
            EndError: the deadline has passed.
        """
        if time.monotonic() >= self._deadline:
            raise EndError

    def _more(self) -> bytes:
        return self._read(READ_BYTES) if time.monotonic() < self._deadline else b""


class Seekable(Forward):
    """Reads a core in a file, at any offset, until a deadline."""

    def __init__(self, descriptor: int, seconds: float = float("inf")) -> None:
        """Read with a descriptor that the caller closes."""
        super().__init__(lambda _: b"", 0, seconds)
        self._descriptor = descriptor

    def reach(self, offset: int, size: int) -> bytes:
        """Return as many of the bytes at an offset as there are."""
        late = time.monotonic() >= self._deadline
        end = 0 if late else os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, offset) if 0 <= offset < end else b""

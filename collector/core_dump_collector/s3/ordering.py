"""Owns the order of a raw core while it is uploaded: its vital part first, as the helper writes large dumps.

The pages are read from the file itself, so a raw core gives its backtraces from its first megabytes as well
(docs/contracts.md, "Order of a large dump"). The same file gives the same bytes each time, so an upload that was cut
short finds the parts that it has sent. A core that cannot be ordered is uploaded as it is.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from core_dump_collector.s3 import compression
from core_dump_format.front import UnsupportedError, front_bytes, read_front
from core_dump_format.pages import Pages
from core_dump_format.reorder import Reordered
from core_dump_format.state import ProcessState
from core_dump_format.vital import Selection, is_known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_format.front import Front

LEAST_BYTES = 8 * 1024 * 1024
"""A shorter core is read whole in a moment."""
_MOST_FRONT_BYTES = 16 * 1024 * 1024
"""Of headers and notes, all of which are in memory at once; a core with more is uploaded in the kernel's order."""
_VITAL_BYTES = 16 * 1024 * 1024
"""Half of the helper's: it is in memory while it is compressed, and a worker has little."""
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class OrderedCore:
    """A raw core in its new order, compressed in two gzip members."""

    descriptor: int
    vital: bytes
    """The first member: headers, notes and vital part."""
    is_whole: bool
    """Whether everything vital is in the first member."""
    runs: tuple[tuple[int, int], ...]
    """Offset and length in the file of everything else, in the kernel's order."""
    size_bytes: int
    """Length of the ordered core before compression."""

    def compressed(self) -> Iterator[bytes]:
        """Yield the object."""
        return chain([self.vital], compression.compress(self._rest()))

    def facts(self) -> dict[str, str | int]:
        """Return the fields of the metadata object that a reader needs to fetch the vital part alone."""
        return {
            "bytes": self.size_bytes,
            "vital": "whole" if self.is_whole else "partial",
            "vital_bytes": len(self.vital),
            "vital_crc32": zlib.crc32(self.vital),
        }

    def _rest(self) -> Iterator[bytes]:
        for offset, size in self.runs:
            for at in range(offset, offset + size, _BLOCK_BYTES):
                block = os.pread(self.descriptor, min(_BLOCK_BYTES, offset + size - at), at)
                if not block:
                    raise OSError("the file became shorter while it was read")
                yield block
                os.posix_fadvise(self.descriptor, at, len(block), os.POSIX_FADV_DONTNEED)


class _FilePages(Pages):
    """The memory in a raw core."""

    def __init__(self, descriptor: int, front: Front) -> None:
        self._descriptor, self._front = descriptor, front

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, as far as its segment and the file reach."""
        front = self._front
        index = front.find(address)
        if not index or size <= 0:
            return b""
        inside = address - front.addresses[index]
        return os.pread(
            self._descriptor, min(size, front.sizes[index] - inside), front.offsets[index] + inside
        )

    def resident(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the whole range: a file does not tell which pages were touched."""
        yield start, end


def order(descriptor: int, size_bytes: int) -> OrderedCore | None:
    """Return a raw core in its new order; None if it is small, or its order cannot be changed.

    Raises:
        OSError: it cannot be read.
    """
    if size_bytes < LEAST_BYTES:
        return None
    try:
        front = _read_front(descriptor)
        if not is_known(front):
            return None
        selection = Selection(front, _FilePages(descriptor, front), _VITAL_BYTES)
        selection.run(ProcessState(front))
        if not selection.pieces:
            return None
        ordered = Reordered(front, selection.pieces, Pages.page)
    except (UnsupportedError, ValueError, OverflowError, struct.error):
        return None
    runs = tuple(_runs_of(ordered, size_bytes))
    contents = [content for _, _, content in selection.pieces]
    return OrderedCore(
        descriptor,
        b"".join(compression.compress([ordered.head, *contents])),
        selection.is_whole,
        runs,
        ordered.vital_end + sum(size for _, size in runs),
    )


def _read_front(descriptor: int) -> Front:
    head, needed = b"", front_bytes(b"")
    while needed > len(head):
        if needed > _MOST_FRONT_BYTES:
            raise UnsupportedError("its headers and notes are too long")
        head = os.pread(descriptor, needed, 0)
        if len(head) < needed:
            raise UnsupportedError("it ends within its headers")
        needed = front_bytes(head)
    return read_front(head)


def _runs_of(ordered: Reordered, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the kept runs, as far as the file reaches."""
    at = 0
    for length, is_kept in ordered.runs():
        end = min(at + length, size_bytes)
        if is_kept and end > at:
            yield at, end - at
        at += length

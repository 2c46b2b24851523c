"""Owns the order of a core that was downloaded whole: its memory by address, as in a core that the kernel wrote.

A large dump begins with its vital part, so memory that was adjacent in the process can lie apart in the dump. Some
tools read beyond the end of a segment (pystack does) and would take other memory for the rest of a structure. No byte
is added or left out: segments change places, and their headers say where they are.
"""

from __future__ import annotations

import sys
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

from core_dump_format.elf import MOST_NOTES_BYTES, new_offsets, walk_notes
from core_dump_format.reorder import NOTE_KIND
from core_dump_format.stream import Seekable
from core_dumps.sparse import write_all, write_sparse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from core_dump_format.core import Core

MOST_SEGMENTS = 1 << 19
"""Twice as many as the helper reorders, because it splits segments."""
_ENDLESS = sys.maxsize
_VITAL_END_AT, _VITAL_END_BYTES = 8, 8
"""Where this project's note holds the length of headers, notes and vital part (docs/contracts.md)."""


class _Run(NamedTuple):
    """Successive bytes of a dump that stay together."""

    offset: int
    """In the dump."""
    size: int
    place: int
    """Their offset in the file."""


class AddressOrder:
    """Where each byte of a dump belongs in the file."""

    def __init__(self, core: Core, start: int, runs: list[_Run]) -> None:
        """Take the offset of the first memory, and the runs in the order of the dump."""
        self._core, self._start, self._runs = core, start, runs

    @classmethod
    def of(cls, core: Core) -> AddressOrder | None:
        """Return the order for a dump that begins with its vital part.

        Return None for any other dump, if the memory is in order already, and if the headers contradict each other.
        """
        segments = core.layout.segments
        if not core.vital_end or not segments.came_sorted or len(segments) > MOST_SEGMENTS:
            return None
        held = [place for place in segments.places() if place[1]]
        start = min(held)[0] if held else 0
        end = start + sum(size for _, size in held)
        if core.layout.headers_end > start or end >= min(_ENDLESS, 1 << core.form.bits):
            return None
        runs, place = [_Run(0, start, 0), _Run(end, _ENDLESS, end)], start
        for offset, size in held:
            runs.append(_Run(offset, size, place))
            place += size
        runs.sort()
        if any(run.offset + run.size != following.offset for run, following in pairwise(runs)):
            return None
        runs = list(_joined(runs))
        return cls(core, start, runs) if len(runs) > 1 else None

    def write(self, file: int, pieces: Iterable[bytes]) -> int:
        """Write a dump to an empty file; return its length.

        The headers are corrected only if the dump has the length that they promise.
        """
        source, written = _Pieces(pieces), 0
        for run in self._runs:
            written += write_sparse(file, source.take(run.size), run.place) - run.place
        if written == self._core.expected_bytes:
            self._correct_headers(file)
        return written

    def _correct_headers(self, file: int) -> None:
        """Write the segments' offsets, and the note that no vital part comes first."""
        source, (first, size) = Seekable(file), self._core.layout.notes or (0, 0)
        for at, offset in new_offsets(source, self._start):
            write_all(file, offset, at)
        notes = source.reach(first, min(size, MOST_NOTES_BYTES))
        for kind, at, length in walk_notes(notes, self._core.form.note):
            if kind == NOTE_KIND and length >= _VITAL_END_AT + _VITAL_END_BYTES:
                write_all(file, bytes(_VITAL_END_BYTES), first + at + _VITAL_END_AT)


def _joined(runs: list[_Run]) -> Iterator[_Run]:
    """Join runs that follow each other in the file as they do in the dump."""
    for _, group in groupby(runs, lambda run: run.place - run.offset):
        first, *others = group
        yield first._replace(size=first.size + sum(run.size for run in others))


class _Pieces:
    """Reads a stream of pieces in lengths of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._coming = iter(pieces)
        self._piece, self._at = b"", 0

    def take(self, size: int) -> Iterator[bytes]:
        """Yield the next bytes, as far as there are any."""
        while size:
            if self._at == len(self._piece):
                self._piece, self._at = next(self._coming, b""), 0
                if not self._piece:
                    return
            part = self._piece[self._at : self._at + size]  # a whole piece is not copied
            self._at += len(part)
            size -= len(part)
            yield part

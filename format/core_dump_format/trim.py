"""Owns the layout of a trimmed dump: headers, notes, the vital part, then the other memory that was kept. Pure.

A dropped range has no program header, so that a debugger reports its memory as missing: gdb reads memory as zeros where
a header has no content. Only ranges that the process has never touched keep such a header, because zeros are what they
hold. The note of this project lists the dropped ranges (docs/contracts.md).
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct

from core_dump_format.front import UnsupportedError
from core_dump_format.reorder import Geometry, spans_by_segment

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.front import Front


class Content:
    """The memory that a trimmed dump holds."""

    def __init__(
        self,
        pieces: list[tuple[int, int, bytes]],
        vital_pieces: int,
        untouched: list[tuple[int, int, int]],
    ) -> None:
        """Store a selection.

        Args:
            pieces: index of the segment, address and content, in the order in which they are written.
            vital_pieces: how many of them, the first ones, are the vital part.
            untouched: index of the segment, start and end of ranges that hold zeros; pieces win over them.
        """
        self.pieces, self.untouched = pieces, untouched
        self.vital_pieces = min(vital_pieces, len(pieces))


class Trimmed:
    """The front of a trimmed core; its memory follows, piece by piece."""

    def __init__(self, front: Front, content: Content, page: int) -> None:
        """Lay out a core that holds only this content.

        Raises:
            UnsupportedError: a piece lies outside its segment, or two overlap.
        """
        self._front = front
        self.dropped: list[tuple[int, int]] = []
        """Start and end of each range that the kernel would have written and that is missing here, by address."""
        self._rows: list[list[int]] = []
        self._placed: dict[int, int] = {}
        """Row of each program header with content, and its piece."""
        self._lay_out(content.pieces, content.untouched)
        geometry = Geometry(front, 1 + len(self._rows), self.dropped, page)
        starts = geometry.starts(content.pieces)
        self.vital_end = starts[content.vital_pieces]
        """Length of headers, notes and vital part."""
        self.length = starts[-1]
        """Length of the whole dump."""
        self._place(geometry.data_at, starts)
        self.head = geometry.assemble(self._table(geometry), self.vital_end)

    @property
    def dropped_bytes(self) -> int:
        """Return the length of all dropped ranges."""
        return sum(end - start for start, end in self.dropped)

    def _lay_out(self, pieces: list[tuple[int, int, bytes]], untouched: list[tuple[int, int, int]]) -> None:
        kept = spans_by_segment(pieces)
        zeros: dict[int, list[tuple[int, int]]] = {}
        for index, start, end in untouched:
            zeros.setdefault(index, []).append((start, end))
        front, step = self._front, self._front.layout.words
        words = front.layout.cast(front.table)
        for index in front.order or range(1, 1 + front.loads):
            if (
                index not in kept
                and index not in zeros
                and words[index * step + 4] == words[index * step + 5]
            ):
                self._drop(*front.span(index))
                continue
            row = words[index * step : (index + 1) * step].tolist()
            self._split(index, row, kept.get(index, []), sorted(zeros.get(index, ())))

    def _split(
        self,
        index: int,
        row: list[int],
        kept: list[tuple[int, int, int]],
        zeros: list[tuple[int, int]],
    ) -> None:
        """Add the program headers of one segment."""
        at, end = self._front.span(index)
        beyond = end + max(0, row[5] - row[4])
        for first, last, number in kept:
            if not at <= first < last <= end:
                raise UnsupportedError("a kept piece does not lie within its segment")
            self._fill(row, at, first, zeros)
            self._placed[len(self._rows)] = number
            self._add(row, first, last - first, last - first)
            at = last
        self._fill(row, at, end, zeros)
        if end < beyond and kept and at == end:
            self._rows[-1][5] += beyond - end
        elif end < beyond:  # memory that the kernel leaves out of every core
            self._add(row, end, 0, beyond - end)

    def _fill(self, row: list[int], start: int, end: int, zeros: list[tuple[int, int]]) -> None:
        """Add a header for each range of zeros between two kept ones; everything else there is dropped."""
        at = start
        for first, last in zeros[max(0, bisect_right(zeros, (start, 0)) - 1) :]:
            if first >= end:
                break
            begin, stop = max(first, at), min(last, end)
            if begin < stop:
                self._drop(at, begin)
                self._add(row, begin, 0, stop - begin)
                at = stop
        self._drop(at, end)

    def _drop(self, start: int, end: int) -> None:
        if self.dropped and start < end and self.dropped[-1][1] == start:
            self.dropped[-1] = self.dropped[-1][0], end
        elif start < end:
            self.dropped.append((start, end))

    def _add(self, row: list[int], address: int, size: int, memory: int) -> None:
        added = list(row)
        added[2], added[4], added[5] = address, size, memory
        self._rows.append(added)

    def _place(self, data_at: int, starts: list[int]) -> None:
        """Set the offset of each row; one without content is where the row before it ends.

        elfutils would not read the row before if this one had a lower offset (libdwfl/core-file.c, do_more).
        """
        end = data_at
        for number, row in enumerate(self._rows):
            row[1] = starts[self._placed[number]] if number in self._placed else end
            end = row[1] + row[4]

    def _table(self, geometry: Geometry) -> bytes:
        """Return the program headers: the notes, then memory by address."""
        front, layout = self._front, self._front.layout
        notes = layout.cast(front.table)[: layout.words].tolist()
        notes[1], notes[4] = geometry.notes_at, geometry.notes_bytes
        pack = Struct("=%d%s" % (layout.words, layout.word)).pack
        return b"".join([pack(*row) for row in [notes, *self._rows]])

"""Owns the order of a large dump: headers, notes, the vital part, then everything else in the kernel's order. Pure.

The result is a valid ELF core with the same memory: each segment that is vital in part is split at the borders of the
vital pieces, and the program headers are sorted by address. A note of this project explains the order
(docs/contracts.md).
"""

from __future__ import annotations

from itertools import accumulate
from struct import Struct, pack

from core_dump_format.front import PN_XNUM, UnsupportedError

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.front import Front

ORDER_VERSION = 1
NOTE_OWNER = b"core-dump-handler\0"
NOTE_KIND = 0x43444831
"""`CDH1`: a number that no kernel uses, because some debuggers look at the number alone."""
_NOTE_HEAD, _NOTE, _RANGE = Struct("=III"), Struct("=IIQ"), Struct("=QQ")
_UNLIMITED = 1 << 62


def order_note(vital_end: int, dropped: list[tuple[int, int]]) -> bytes:
    """Return the note: version, number of dropped ranges, end of the vital part; start and end of each range."""
    ranges = b"".join([_RANGE.pack(*span) for span in dropped])
    content = _NOTE.pack(ORDER_VERSION, len(dropped), vital_end) + ranges
    owner = NOTE_OWNER + bytes(-len(NOTE_OWNER) % 4)
    return _NOTE_HEAD.pack(len(NOTE_OWNER), len(content), NOTE_KIND) + owner + content


def spans_by_segment(pieces: list[tuple[int, int, bytes]]) -> dict[int, list[tuple[int, int, int]]]:
    """Return start, end and number of the pieces of each segment, by address."""
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for number, (index, address, content) in enumerate(pieces):
        spans.setdefault(index, []).append((address, address + len(content), number))
    for found in spans.values():
        found.sort()
    return spans


class Geometry:
    """Where everything lies in the new front of a core."""

    def __init__(self, front: Front, count: int, dropped: list[tuple[int, int]], page: int) -> None:
        """Take the number of program headers and the dropped ranges."""
        self._front, self._count, self._dropped = front, count, dropped
        self.notes_at = front.layout.header.size + count * front.layout.row.size
        self.notes_bytes = len(front.notes) + -len(front.notes) % 4 + len(order_note(0, dropped))
        notes_end = self.notes_at + self.notes_bytes
        self._section_at = notes_end + -notes_end % 8
        data_at = self._section_at + (front.layout.section.size if count >= PN_XNUM else 0)
        self.data_at = data_at + -data_at % max(front.alignment, page)
        """Offset of the first segment with memory."""

    def starts(self, pieces: list[tuple[int, int, bytes]]) -> list[int]:
        """Return the offset of each piece, and the end of the last one, if they are the first memory."""
        return list(accumulate([self.data_at, *(len(content) for _, _, content in pieces)]))

    def assemble(self, table: bytes, vital_end: int) -> bytes:
        """Return everything before the memory; `vital_end` is the length of headers, notes and vital part."""
        notes = self._front.notes + bytes(-len(self._front.notes) % 4) + order_note(vital_end, self._dropped)
        parts = [self._header(), table, notes]
        if self._count >= PN_XNUM:
            parts += [bytes(self._section_at - self.notes_at - self.notes_bytes), self._section()]
        head = b"".join(parts)
        return head + bytes(self.data_at - len(head))

    def _header(self) -> bytes:
        fields, layout = list(self._front.header), self._front.layout
        many = self._count >= PN_XNUM
        fields[6] = self._section_at if many else 0
        fields[10:14] = [min(self._count, PN_XNUM), layout.section.size if many else 0, int(many), 0]
        return layout.header.pack(*fields)

    def _section(self) -> bytes:
        """Return the section header that holds the number of program headers: elf(5), e_phnum."""
        return self._front.layout.section.pack(0, 0, 0, 0, 0, 1, 0, self._count, 0, 0)


class Reordered:
    """The new front of a core, and what of the kernel's stream follows it."""

    def __init__(self, front: Front, pieces: list[tuple[int, int, bytes]], page: int) -> None:
        """Lay out a core whose vital part is `pieces`: index of the segment, address, content.

        Raises:
            UnsupportedError: a piece lies outside its segment, or two overlap.
        """
        self._front = front
        self._spans = spans_by_segment(pieces)
        self._check_spans()
        count = len(front.addresses) + self._added_rows()
        geometry = Geometry(front, count, [], page)
        self._starts = geometry.starts(pieces)
        self.vital_end = self._starts[-1]
        """Length of headers, notes and vital part, which are the front of the dump."""
        self.length = geometry.data_at + front.length - front.data_offset
        """Length of the whole dump."""
        table = self._table(count, geometry.notes_at, geometry.notes_bytes)
        self.head = geometry.assemble(table, self.vital_end)

    def _check_spans(self) -> None:
        for index, spans in self._spans.items():
            at, end = self._front.span(index)
            for first, last, _ in spans:
                if not at <= first < last <= end:
                    raise UnsupportedError("a vital piece does not lie within its segment")
                at = last

    def _added_rows(self) -> int:
        """Return how many program headers the split segments need in addition."""
        added = 0
        for index, spans in self._spans.items():
            at, end = self._front.span(index)
            for first, last, _ in spans:
                added += 1 + (first > at)
                at = last
            added += (at < end) - 1
        return added

    def _table(self, count: int, notes_at: int, notes_bytes: int) -> bytes:
        """Return the program headers."""
        front, layout = self._front, self._front.layout
        size, step = layout.row.size, layout.words
        parts: list[bytes] = []
        vital: list[tuple[int, int]] = []
        done = row_count = 0
        for index in sorted(self._spans):
            parts.append(front.table[done * size : index * size])
            row_count += index - done
            rows = self._split(index)
            vital.extend((row_count + at, number) for at, (_, number) in enumerate(rows) if number >= 0)
            parts.extend(row for row, _ in rows)
            row_count += len(rows)
            done = index + 1
        parts.append(front.table[done * size :])
        table = bytearray(b"".join(parts))
        words = layout.cast(table)
        words[4] = notes_bytes
        self._place(words, step, vital)
        words[1] = notes_at
        words.release()
        return bytes(table) if front.order is None else self._sorted(table, count)

    def _split(self, index: int) -> list[tuple[bytes, int]]:
        """Return the program headers of a segment's parts, each with the number of its piece or -1."""
        front, layout = self._front, self._front.layout
        size, step = layout.row.size, layout.words
        words = layout.cast(bytearray(front.table[index * size : (index + 1) * size]))
        at, end = front.span(index)
        physical, beyond = words[3], words[5] - words[4]
        if beyond < 0:
            raise UnsupportedError("a segment holds more than its memory")
        parts = []
        for first, last, number in self._spans[index]:
            if at < first:
                parts.append((at, first, -1))
            parts.append((first, last, number))
            at = last
        if at < end:
            parts.append((at, end, -1))
        rows = []
        for first, last, number in parts:
            words[2], words[3], words[4] = first, physical, last - first
            words[5] = last - first + (beyond if last == end else 0)  # memory that the core does not hold
            rows.append((words[:step].tobytes(), number))
        return rows

    def _place(self, words: memoryview, step: int, vital: list[tuple[int, int]]) -> None:
        """Set the offset of each segment: vital pieces in their order, the others in the kernel's."""
        sizes = words[4::step].tolist()
        sizes[0] = self.vital_end
        for row, _ in vital:
            sizes[row] = 0
        offsets = list(accumulate(sizes[:-1]))
        layout = self._front.layout
        words[step + 1 :: step] = layout.cast(pack("=%d%s" % (len(offsets), layout.word), *offsets))
        for row, number in vital:
            words[row * step + 1] = self._starts[number]

    def _sorted(self, table: bytearray, count: int) -> bytes:
        """Return the program headers with those of memory by address."""
        size, loads = self._front.layout.row.size, self._front.loads + self._added_rows()
        rows = [bytes(table[at * size : (at + 1) * size]) for at in range(count)]
        address = Struct("=%dx%s" % (2 * self._front.layout.word_bytes, self._front.layout.word)).unpack_from
        rows[1 : 1 + loads] = sorted(rows[1 : 1 + loads], key=address)
        return b"".join(rows)

    def runs(self) -> list[list[int]]:
        """Return [length, is kept] of successive ranges of the kernel's stream; all of it is covered."""
        front = self._front
        spans = sorted(
            (front.offsets[index] + first - front.addresses[index], last - first)
            for index, pieces in self._spans.items()
            for first, last, _ in pieces
        )
        runs, at = [[front.data_offset, 0]], front.data_offset
        for start, size in [*spans, (front.length, front.sections_bytes)]:
            if start > at:
                runs.append([start - at, 1])
            if size and not runs[-1][1]:
                runs[-1][0] += size
            elif size:
                runs.append([size, 0])
            at = start + size
        runs.append([_UNLIMITED, 1])
        return runs

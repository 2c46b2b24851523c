"""Owns the front of a core as the kernel writes it: ELF header, program headers in columns, notes. Pure.

The helper parses it while the crashed process is held. Work is therefore done in columns, not in rows, and nothing slow
to import is used (`typing` takes 7 ms, `array` 2 ms); `elf` reads every other core. Only cores of this machine are
read, in the layout of elf_core_dump in fs/binfmt_elf.c: the notes right behind the program headers, then the segments
without gaps, then one section header if there are more segments than 16 bits can count.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from itertools import accumulate, chain, islice
from struct import Struct, pack

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

IDENT_BYTES = 64
"""Bytes that hold the ELF header of either class."""
MAX_SEGMENTS = 1 << 18
"""More would hold the process for seconds."""
BLOCK_VALUES = 1 << 14
MAX_NOTES_BYTES = 64 << 20
"""About 18,000 threads."""
MAX_ALIGNMENT = 1 << 16
MAX_LENGTH = 1 << 62
ET_CORE, PT_LOAD, PT_NOTE = 4, 1, 4
PN_XNUM = 0xFFFF
"""e_phnum of a core with more segments than its 16 bits can count: elf(5)."""
_BYTE_ORDER = 1 if sys.byteorder == "little" else 2


class UnsupportedError(ValueError):
    """The core is not laid out as expected; the message says how."""


class Layout:
    """The structures of one ELF class, in this machine's byte order."""

    def __init__(self, bits: int) -> None:
        """Choose 32 or 64 bits."""
        wide = bits == 64
        self.bits = bits
        self.word = "Q" if wide else "I"
        self.word_bytes = bits // 8
        self.header = Struct("=16sHHI3%sIHHHHHH" % self.word)
        self.row = Struct("=IIQQQQQQ" if wide else "=IIIIIIII")
        self.section = Struct("=IIQQQQIIQQ" if wide else "=IIIIIIIIII")
        self.words = self.row.size // self.word_bytes
        """Words of a program header. Words 1, 2, 4 and 5 are p_offset, p_vaddr, p_filesz and p_memsz."""

    def cast(self, content: bytes | bytearray | memoryview) -> memoryview:
        """Return a view of a content's words; what does not fill a word is left out."""
        view = memoryview(content)[: len(content) // self.word_bytes * self.word_bytes]
        return view.cast("Q") if self.bits == 64 else view.cast("I")


class Front:
    """Everything before the memory in a core."""

    def __init__(self, layout: Layout, header: list[int], table: bytes, notes: bytes) -> None:
        """Take the ELF header's fields, all program headers and the notes; raises UnsupportedError."""
        self.layout, self.header, self.table, self.notes = layout, header, table, notes
        words = layout.cast(table)
        step = layout.words
        halves = memoryview(table).cast("I")
        width = layout.row.size // 4
        types = halves[::width].tolist()
        self.loads = types.count(PT_LOAD)
        """Number of PT_LOAD headers; they follow the notes' header."""
        self.flags = halves[1 if layout.bits == 64 else 6 :: width]
        self.offsets = column(words[1::step])
        self.addresses = column(words[2::step])
        self.sizes = column(words[4::step])
        """Bytes of each segment in the file."""
        self.alignment = max(1, words[2 * step - 1])
        """Of the first memory segment."""
        if types[0] != PT_NOTE or types[1 : 1 + self.loads] != [PT_LOAD] * self.loads or not self.loads:
            raise UnsupportedError("its first segments are not the notes and then the memory")
        self._check()
        self._sort()

    @property
    def machine(self) -> int:
        """Return the EM_ number of elf.h."""
        return int(self.header[2])

    @property
    def length(self) -> int:
        """Return where the segments end."""
        return self.offsets[-1] + self.sizes[-1]

    @property
    def data_offset(self) -> int:
        """Return where the first segment with memory begins."""
        return self.offsets[1]

    @property
    def sections_bytes(self) -> int:
        """Return the length of the section header behind the segments, or 0."""
        return self.layout.section.size if self.header[10] == PN_XNUM else 0

    def _check(self) -> None:
        """Raise UnsupportedError unless the segments lie as the kernel writes them."""
        offsets, sizes = self.offsets, self.sizes
        end = self.layout.header.size + len(self.table)
        if offsets[0] != end or end + sizes[0] > offsets[1]:
            raise UnsupportedError("its notes do not lie between program headers and memory")
        if self.alignment > MAX_ALIGNMENT or offsets[1] > end + sizes[0] + MAX_ALIGNMENT:
            raise UnsupportedError("an alignment of %d bytes" % self.alignment)
        if max(self.length, sum(sizes)) > MAX_LENGTH:
            raise UnsupportedError("its segments are longer than a file can be")
        if column(accumulate(chain(offsets[1:2], sizes[1:-1]))) != offsets[1:]:
            raise UnsupportedError("its segments do not follow one another")

    def _sort(self) -> None:
        """Prepare `find`. The kernel sorts by address, or by size if `kernel.core_sort_vma` is set."""
        addresses = self.addresses[1 : 1 + self.loads]
        self._sorted = column(sorted(addresses))
        self.order = None
        """Indexes of the memory segments by address; None if that is their order already."""
        if self._sorted != addresses:
            self.order = sorted(range(1, 1 + self.loads), key=self.addresses.__getitem__)

    def at(self, address: int) -> int:
        """Return the index of the memory segment that begins at or below an address, or 0."""
        position = bisect_right(self._sorted, address)
        return self.order[position - 1] if self.order and position else position

    def find(self, address: int) -> int:
        """Return the index of the segment whose memory the core holds at an address, or 0."""
        index = self.at(address)
        return index if index and address - self.addresses[index] < self.sizes[index] else 0

    def after(self, address: int) -> int:
        """Return the index of the first memory segment that begins above an address, or 0."""
        position = bisect_right(self._sorted, address)
        if position == self.loads:
            return 0
        return self.order[position] if self.order else position + 1

    def span(self, index: int) -> tuple[int, int]:
        """Return start and end of the memory that the core holds of a segment."""
        return self.addresses[index], self.addresses[index] + self.sizes[index]

    def walk_notes(self, limit: int) -> Iterator[tuple[int, memoryview]]:
        """Yield kind and content of each note, at most `limit`."""
        head, notes, at = Struct("=III"), memoryview(self.notes), 0
        while at + head.size <= len(notes) and limit:
            name_bytes, size, kind = head.unpack_from(notes, at)
            at += head.size + _padded(name_bytes)
            if at + size > len(notes):
                return
            yield kind, notes[at : at + size]
            at += _padded(size)
            limit -= 1


def front_bytes(head: bytes | bytearray) -> int:
    """Return how many leading bytes of the core hold its front, or how many tell; raises UnsupportedError.

    The caller reads so many bytes and asks again, until the answer is no more than what it has.
    """
    if len(head) < IDENT_BYTES:
        return IDENT_BYTES
    layout, fields = _read_header(head)
    start, row = layout.header.size, layout.row
    if len(head) < start + row.size:
        return start + row.size
    words = layout.cast(bytes(head[start : start + row.size]))
    notes_at, notes_bytes = words[1], words[4]
    count, rest = divmod(notes_at - start, row.size)
    if rest or not 1 < count <= MAX_SEGMENTS:
        raise UnsupportedError("its first segment does not lie behind 2 to %d program headers" % MAX_SEGMENTS)
    if fields[10] not in (count, PN_XNUM) or (fields[10] == PN_XNUM) != (count >= PN_XNUM):
        raise UnsupportedError("its header counts %d segments, not %d" % (fields[10], count))
    if notes_bytes > MAX_NOTES_BYTES:
        raise UnsupportedError("%d bytes of notes" % notes_bytes)
    return int(notes_at + notes_bytes)


def read_front(head: bytes | bytearray) -> Front:
    """Return the front of a core from at least `front_bytes` leading bytes; raises UnsupportedError."""
    end = front_bytes(head)
    layout, fields = _read_header(head)
    start = layout.header.size
    words = layout.cast(bytes(head[start : start + layout.row.size]))
    front = Front(layout, fields, bytes(head[start : words[1]]), bytes(head[words[1] : end]))
    sections = front.length if front.sections_bytes else 0
    if fields[6] != sections or (sections and (fields[11:13] != [layout.section.size, 1])):
        raise UnsupportedError("it has section headers of another kind")
    return front


def _read_header(head: bytes | bytearray) -> tuple[Layout, list[int]]:
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] != _BYTE_ORDER:
        raise UnsupportedError("it is not an ELF file of this machine")
    layout = Layout(64 if head[4] == 2 else 32)
    fields = list(layout.header.unpack_from(head))
    sizes = [fields[5], fields[8], fields[9]]
    if fields[1] != ET_CORE or sizes != [layout.header.size, layout.header.size, layout.row.size]:
        raise UnsupportedError("it is not a core, or its program headers do not follow its header")
    return layout, fields


def column(values: Iterable[int]) -> memoryview:
    """Return numbers as 64-bit words; raises struct.error if one does not fit."""
    rest, parts = iter(values), []
    block = list(islice(rest, BLOCK_VALUES))
    while block:
        parts.append(pack("=%dQ" % len(block), *block))
        block = list(islice(rest, BLOCK_VALUES))
    return memoryview(b"".join(parts)).cast("Q")


def _padded(size: int) -> int:
    return size + 3 & ~3

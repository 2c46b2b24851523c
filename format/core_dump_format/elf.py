"""Owns the layout of ELF cores: header, segments, where notes and memory lie. Pure; no byte is trusted.

A core is read once, from front to back. Every count and length in it may lie, so each is compared with a limit before
it is used. Both classes and both byte orders are read. Sources: elf(5), core(5), fs/binfmt_elf.c in the kernel.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from core_dump_format.stream import EndError, Forward

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
MOST_SEGMENTS = 1 << 21
"""Of 25 bytes each in memory. The kernel writes one for each mapping: `vm.max_map_count`, 65,530 by default."""
MOST_NOTES_BYTES = 16 * 1024 * 1024
"""Kernels allow 4 to 16 MiB (`kernel.core_file_note_size_limit`)."""
_ROWS_AT_A_TIME = 4096
_BLOCK_BYTES = 1 << 20

_ET_CORE, _PT_NULL, _PT_LOAD, _PT_NOTE, _PF_X = 4, 0, 1, 4, 1
_PN_XNUM = 0xFFFF
"""e_phnum of a core with more segments than its 16 bits can count (elf(5))."""
_NT_GNU_BUILD_ID = 3
_BUILD_ID_BYTES = range(4, 65)
_MOST_ROWS_OF_A_FILE = 64


class NotACoreError(ValueError):
    """The bytes are not an ELF core that can be read; the message says why."""


class Form:
    """The class and byte order of an ELF file, and the structures that follow from them."""

    def __init__(self, identity: bytes) -> None:
        """Read the first six bytes.

        Raises:
            NotACoreError: they do not begin an ELF file.
        """
        if (
            identity[:4] != b"\x7fELF"
            or identity[4:5] not in (b"\1", b"\2")
            or identity[5:6] not in (b"\1", b"\2")
        ):
            raise NotACoreError("not an ELF file")
        self.bits = 64 if identity[4] == 2 else 32
        self.order = "<" if identity[5] == 1 else ">"
        self.word = "Q" if self.bits == 64 else "I"
        self.word_bytes = self.bits // 8
        self.header = struct.Struct(f"{self.order}16xHHI3{self.word}IHHHHHH")
        self.row = struct.Struct(self.order + ("IIQQQQQQ" if self.bits == 64 else "IIIIIIII"))
        self.note = struct.Struct(self.order + "III")

    def segment(self, row: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """Return type, flags, offset, address and length in the file of a program header."""
        if self.bits == 64:
            return row[0], row[1], row[2], row[3], row[5]
        return row[0], row[6], row[1], row[2], row[4]

    def words(self, content: bytes, at: int, count: int) -> tuple[int, ...]:
        """Return words of the core's own size and byte order."""
        return struct.unpack_from(f"{self.order}{count}{self.word}", content, at)


class Header(NamedTuple):
    """The ELF header of a core."""

    form: Form
    machine: int
    """EM_ number of elf.h."""
    table: int
    """Offset of the program headers."""
    row_count: int
    """Their number; _PN_XNUM if it lies elsewhere."""
    sections_end: int
    """End of the section headers; 0 where there are none."""


class Segments:
    """The PT_LOAD headers, by address, in arrays: a million take 25 MB."""

    def __init__(self) -> None:
        """Start empty."""
        self._addresses, self._offsets, self._sizes = array("Q"), array("Q"), array("Q")
        self._executable = bytearray()
        self.came_sorted = True
        """Whether their headers are in the order of their addresses."""

    def __len__(self) -> int:
        """Return their number."""
        return len(self._addresses)

    def add(self, address: int, offset: int, file_bytes: int, *, executable: bool) -> None:
        """Add one; call `sort` after the last."""
        self._addresses.append(address)
        self._offsets.append(offset)
        self._sizes.append(file_bytes)
        self._executable.append(executable)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and the length of each in the file."""
        return zip(self._offsets, self._sizes)

    def sort(self) -> None:
        """Order them by address; the kernel writes them so unless `kernel.core_sort_vma` is set."""
        addresses = self._addresses
        self.came_sorted = all(addresses[at] <= addresses[at + 1] for at in range(len(addresses) - 1))
        if not self.came_sorted:
            order = sorted(range(len(addresses)), key=addresses.__getitem__)
            self._addresses = array("Q", (addresses[at] for at in order))
            self._offsets = array("Q", (self._offsets[at] for at in order))
            self._sizes = array("Q", (self._sizes[at] for at in order))
            self._executable = bytearray(self._executable[at] for at in order)

    def is_code(self, address: int) -> bool:
        """Tell whether the segment that begins at or below an address is executable."""
        at = bisect_right(self._addresses, address) - 1
        return at >= 0 and bool(self._executable[at])

    def where(self, address: int, size: int) -> tuple[int, int] | None:
        """Return offset and length of the memory at an address, at most `size`; None if the core lacks it."""
        at = bisect_right(self._addresses, address) - 1
        inside = address - self._addresses[at] if at >= 0 else 0
        if at < 0 or inside >= self._sizes[at]:
            return None
        return self._offsets[at] + inside, min(size, self._sizes[at] - inside)


class Layout(NamedTuple):
    """Where everything lies in a core."""

    header: Header
    segments: Segments
    notes: tuple[int, int] | None
    """Offset and length of the notes."""
    expected_bytes: int
    """Length of the whole core: the end of its last segment or section header."""

    @property
    def headers_end(self) -> int:
        """Return the end of program headers and notes."""
        header, (offset, size) = self.header, self.notes or (0, 0)
        return max(header.table + header.row_count * header.form.row.size, offset + size)


def read_header(source: Forward) -> Header:
    """Read the ELF header of a core.

    Raises:
        NotACoreError: it is not one, or it is impossible.
        EndError: it ends before.
    """
    form = Form(source.take(0, 6))
    kind, machine, _, _, table, sections, _, own_bytes, row_bytes, count, section_bytes, section_count, _ = (
        form.header.unpack(source.take(0, form.header.size))
    )
    if kind != _ET_CORE:
        raise NotACoreError("an ELF file, but not a core")
    if own_bytes != form.header.size or row_bytes != form.row.size or table < form.header.size or not count:
        raise NotACoreError("impossible program headers")
    if table > MOST_NOTES_BYTES:
        raise NotACoreError("its program headers begin too far from its front")
    return Header(form, machine, table, count, sections + section_bytes * section_count if sections else 0)


def read_layout(source: Forward) -> Layout:
    """Read the header and the program headers of a core.

    Raises:
        NotACoreError: it is not one, it ends within them, or they are impossible.
    """
    try:
        header = read_header(source)
        segments, notes, end = Segments(), None, header.sections_end
        for row in _rows(source, header):
            kind, flags, offset, address, file_bytes = header.form.segment(row)
            end = max(end, offset + file_bytes)
            if kind == _PT_LOAD:
                segments.add(address, offset, file_bytes, executable=bool(flags & _PF_X))
            elif kind == _PT_NOTE and notes is None:
                notes = (offset, file_bytes)
    except EndError:
        raise NotACoreError("it ends within its headers") from None
    segments.sort()
    return Layout(header, segments, notes, end)


def drop_segments_beyond(core: bytearray) -> int:
    """Make a core of the front of one: drop the headers of segments that lie beyond it; return their number.

    A dropped header becomes PT_NULL, so that a debugger reports the memory as missing instead of reading zeros.

    Raises:
        NotACoreError: it is not the front of a core.
    """
    source = Forward.over([bytes(core[: MOST_NOTES_BYTES + 56 * MOST_SEGMENTS])], len(core))
    dropped = 0
    try:
        header = read_header(source)
        form = header.form
        for number, row in enumerate(_rows(source, header)):
            kind, _, offset, _, file_bytes = form.segment(row)
            if kind == _PT_LOAD and file_bytes and offset + file_bytes > len(core):
                struct.pack_into(form.order + "I", core, header.table + number * form.row.size, _PT_NULL)
                dropped += 1
    except EndError:
        raise NotACoreError("it ends within its headers") from None
    return dropped


def new_offsets(source: Forward, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the place of each field that holds a segment's offset, and the field's new content.

    In the new layout, memory begins at `start` and follows the order of the headers without gaps.

    Raises:
        NotACoreError: it is not the front of a core.
        EndError: it ends within its headers.
    """
    header, at = read_header(source), start
    form = header.form
    for number, row in enumerate(_rows(source, header)):
        kind, _, _, _, file_bytes = form.segment(row)
        if kind == _PT_LOAD:
            place = header.table + number * form.row.size + (8 if form.bits == 64 else 4)
            yield place, struct.pack(form.order + form.word, at)
            at += file_bytes


def _rows(source: Forward, header: Header) -> Iterator[tuple[int, ...]]:
    row, count = header.form.row, header.row_count
    if count == _PN_XNUM:
        count = _count_beyond(source, header)
    for first in range(0, count, _ROWS_AT_A_TIME):
        some = min(_ROWS_AT_A_TIME, count - first)
        yield from row.iter_unpack(source.take(header.table + first * row.size, some * row.size))
        source.check_deadline()


def _count_beyond(source: Forward, header: Header) -> int:
    """Return the number of program headers where 16 bits cannot hold it.

    It is written in a section header at the end of the file, but the notes come right behind the program headers
    and their own header comes first (elf_core_dump in fs/binfmt_elf.c).
    """
    form = header.form
    kind, _, offset, _, _ = form.segment(form.row.unpack(source.take(header.table, form.row.size)))
    count, rest = divmod(offset - header.table, form.row.size)
    if kind != _PT_NOTE or rest or not _PN_XNUM <= count <= MOST_SEGMENTS:
        raise NotACoreError("the number of its segments is not known")
    return count


def read_notes(source: Forward, form: Form, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of each note, as far as the source reaches; at most a block is in memory."""
    at, end = offset, offset + min(size, MOST_NOTES_BYTES)
    while at < end:
        block = source.reach(at, min(_BLOCK_BYTES, end - at))
        done = 0
        for kind, start, length in walk_notes(block, form.note):
            yield kind, block[start : start + length]
            done = start + _padded(length)
        if not done:  # the note is longer than a block
            needed = _length(block, form.note)
            block = source.reach(at, needed) if len(block) < needed <= end - at else b""
            note = next(walk_notes(block, form.note), None)
            if note is None:
                return
            yield note[0], block[note[1] : note[1] + note[2]]
            done = needed
        at += done
        try:
            source.check_deadline()
        except EndError:
            return


def walk_notes(block: bytes, note: struct.Struct) -> Iterator[tuple[int, int, int]]:
    """Yield kind, start and length of the content of each note that is whole in a block."""
    at = 0
    while at + note.size <= len(block):
        name_bytes, length, kind = note.unpack_from(block, at)
        start = at + note.size + _padded(name_bytes)
        if start + length > len(block):
            return
        yield kind, start, length
        at = start + _padded(length)


def _length(block: bytes, note: struct.Struct) -> int:
    if len(block) < note.size:
        return 0
    name_bytes, length, _ = note.unpack_from(block)
    return note.size + _padded(name_bytes) + _padded(length)


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def build_id_of(page: bytes) -> str | None:
    """Return the build ID in the first page of an ELF file, in hexadecimal."""
    try:
        form = Form(page[:6])
        _, _, _, _, table, _, _, _, _, count, _, _, _ = form.header.unpack_from(page)
        for number in range(min(count, _MOST_ROWS_OF_A_FILE) if table < len(page) else 0):
            row = form.row.unpack_from(page, table + number * form.row.size)
            kind, _, offset, _, size = form.segment(row)
            if kind != _PT_NOTE:
                continue
            for note, start, length in walk_notes(page[offset : offset + size], form.note):
                if note == _NT_GNU_BUILD_ID and length in _BUILD_ID_BYTES:
                    return page[offset + start : offset + start + length].hex()
    except (NotACoreError, struct.error):
        pass
    return None

"""Owns the length of a core that its ELF headers promise."""

from __future__ import annotations

from _struct import calcsize, iter_unpack, unpack_from

LARGE_BYTES = 8 << 20
"""From this length on, the vital part of a core comes first."""
IDENT_BYTES = 64
"""Bytes that hold the ELF header of either class: elf(5)."""
HEADER_LIMIT = 64 << 20
"""More than a million program headers."""
PN_XNUM = 0xFFFF
"""Number of segments in the ELF header when the real number does not fit."""


class ElfHeader:
    """The fields of an ELF header, of either class and byte order, that tell how long a core is."""

    def __init__(self, head: bytes | bytearray | memoryview) -> None:
        """Read the first IDENT_BYTES of an ELF file."""
        order = "<" if head[5] == 1 else ">"
        wide = head[4] == 2
        self.row = order + ("8xQ16xQ16x" if wide else "4xI8xI12x")
        """Layout of a program header: offset and size in the file."""
        self.table, self._sections = unpack_from(order + ("QQ" if wide else "II"), head, 32 if wide else 28)
        counts = unpack_from(order + "HHHH", head, 54 if wide else 42)
        self.row_bytes, self.rows, self._section_bytes, self._section_count = counts

    def is_valid(self) -> bool:
        """Return whether the table has the usual layout and starts within the limit."""
        return bool(self.row_bytes == calcsize(self.row) and self.table <= HEADER_LIMIT)

    def table_end(self, head: bytes | bytearray | memoryview) -> int:
        """Return where the program headers end, as far as `head` tells.

        From 65,535 segments on, the first segment tells their number, because it lies right behind the table.
        """
        rows = self.rows
        if rows == PN_XNUM and len(head) >= self.table + self.row_bytes:
            rows = max(0, unpack_from(self.row, head, self.table)[0] - self.table) // self.row_bytes
        elif len(head) < self.table + self.row_bytes:
            rows = 1
        return int(self.table + rows * self.row_bytes)

    def sections_end(self) -> int:
        """Return where the section headers end, or 0 if there are none."""
        return self._sections + self._section_bytes * self._section_count if self._sections else 0


def elf_length(head: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Return how many leading bytes must be known, and the length that the headers in `head` promise.

    The length is 0 as long as `head` is too short; both are 0 if it is not an ELF file. Only this length reveals a
    dump that ended early because its process was killed: the kernel does not report it.
    """
    if len(head) < IDENT_BYTES:
        return IDENT_BYTES, 0
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return 0, 0
    header = ElfHeader(head)
    if not header.is_valid():
        return 0, 0
    end = header.table_end(head)
    if end > HEADER_LIMIT:
        return 0, 0
    if len(head) < end:
        return end, 0
    rows = iter_unpack(header.row, head[header.table : end])
    length = max((offset + held for offset, held in rows), default=0)
    return end, max(length, end, header.sections_end())


class LengthCheck:
    """Learns from the first pieces of a core how long the whole core must be."""

    def __init__(self, expected: int = 0) -> None:
        """Start without a byte, or with a known length."""
        self.expected = expected
        """Bytes that the headers promise; 0 while unknown."""
        self._head, self._needed = bytearray(), IDENT_BYTES

    def feed(self, piece: memoryview) -> None:
        """Look at the next piece."""
        if not self.expected and len(self._head) < self._needed:
            self._head += piece
            self._needed, self.expected = elf_length(self._head)

    def verdict(self, size: int) -> str:
        """Return why a core of `size` bytes is incomplete, or an empty string."""
        if self.expected and size >= self.expected:
            return ""
        return "killed" if self._needed else "not_elf"

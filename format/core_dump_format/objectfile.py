"""Owns reading a program or library: its segments, its unwind information, the names of its functions. Pure.

The file may be hostile. Little of it is read, at places that it names itself: each length is limited, each table is
searched in a limited number of steps. Sources: elf(5); Linux Standard Base, "Exception Frames" (`.eh_frame_hdr`).
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct

from core_dump_format.cfi import Common, Function
from core_dump_format.cursor import UnwindError
from core_dump_format.front import PT_LOAD, PT_NOTE, Layout

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    ReadFile = Callable[[int, int], bytes]

MAX_HEADERS = 64
MAX_SECTIONS = 4096
MAX_ENTRY_BYTES = 1 << 16
MAX_SYMBOL_BYTES = 32 << 20
"""Node has 6 MB of them. A larger table is not read."""
MAX_SORTED_BYTES = 8 << 20
MAX_SAME = 64
"""Entries of a symbol table that have one address."""
MAX_NAME_BYTES = 256
PT_GNU_EH_FRAME = 0x6474E550
NT_GNU_BUILD_ID = 3
MAX_NOTES_BYTES = 4096
SHT_SYMTAB, SHT_DYNSYM = 2, 11
FUNCTION_KINDS = (2, 10)
"""STT_FUNC, STT_GNU_IFUNC."""
EH_FRAME_HEADER = b"\x01\x1b\x03\x3b"
"""Version 1; a relative pointer to .eh_frame; 4 bytes for the count; a table relative to this header, sorted."""
_WORD, _PAIR, _NOTE = Struct("<I"), Struct("<ii"), Struct("<III")


class Budget:
    """Memory that the symbols of several files may take together."""

    def __init__(self, size: int = MAX_SYMBOL_BYTES) -> None:
        """Start with so many bytes."""
        self.left = size

    def take(self, size: int) -> bool:
        """Tell whether so many bytes are left, and take them."""
        if size > self.left:
            return False
        self.left -= size
        return True


class ObjectFile:
    """One ELF file. Addresses are those of its program headers."""

    def __init__(self, read: ReadFile, budget: Budget | None = None) -> None:
        """Read the header and the program headers.

        Args:
            read: returns up to so many bytes at an offset of the file; raises OSError.
            budget: of the memory for symbols.

        Raises:
            ValueError: it is not an ELF file of a known layout.
        """
        self._read, self._budget = read, budget or Budget()
        head = read(0, 64)
        if head[:4] != b"\x7fELF" or head[4:5] not in (b"\1", b"\2") or head[5:6] != b"\1" or len(head) < 64:
            raise ValueError("not an ELF file")
        self._wide = head[4] == 2
        self._layout = Layout(64 if self._wide else 32)
        self._symbol = Struct("<IBBHQQ" if self._wide else "<IIIBBH")
        self._header = self._layout.header.unpack_from(head)
        self._loads: list[tuple[int, int, int]] = []
        """Address, offset and length of each segment."""
        self._notes: list[tuple[int, int]] = []
        self._table: tuple[int, int] | None = None
        """Address and number of the entries of the search table for functions."""
        self._frames_at = 0
        self._symbols: tuple[bytes, int, int] | None = None
        """A symbol table, and offset and length of its strings."""
        self._starts: list[int] | None = None
        self._read_headers()

    def _read_headers(self) -> None:
        table, row_bytes, count = self._header[5], self._header[9], min(self._header[10], MAX_HEADERS)
        if row_bytes != self._layout.row.size:
            raise ValueError("program headers of an unknown kind")
        rows = self._read(table, count * row_bytes)
        for row in self._layout.row.iter_unpack(rows[: len(rows) // row_bytes * row_bytes]):
            kind, offset, address, size = (
                (row[0], row[2], row[3], row[5]) if self._wide else (row[0], row[1], row[2], row[4])
            )
            if kind == PT_LOAD:
                self._loads.append((address, offset, size))
            elif kind == PT_GNU_EH_FRAME and size >= 12:
                self._frames_at = address
            elif kind == PT_NOTE:
                self._notes.append((offset, min(size, MAX_NOTES_BYTES)))

    def build_id(self) -> bytes:
        """Return the build ID, or nothing."""
        for start, size in self._notes:
            content, at = self._read(start, size), 0
            while at + 12 <= len(content):
                owner, length, kind = _NOTE.unpack_from(content, at)
                at += 12 + ((owner + 3) & ~3)
                if kind == NT_GNU_BUILD_ID and content[at - 4 : at] == b"GNU\0" and 4 <= length <= 64:
                    return content[at : at + length]
                at += (length + 3) & ~3
        return b""

    def address_of(self, offset: int) -> int | None:
        """Return the address at which a byte of the file is loaded."""
        for address, start, size in self._loads:
            if start <= offset < start + size:
                return address + offset - start
        return None

    def code(self, address: int, size: int) -> bytes:
        """Return the bytes at an address, as far as its segment has them in the file."""
        for start, offset, length in self._loads:
            if start <= address < start + length:
                return self._read(offset + address - start, min(size, start + length - address))
        return b""

    def function_at(self, address: int) -> Function:
        """Return the unwind information of the function at an address; raises UnwindError."""
        where = self._find_entry(address)
        function = self._read_function(where)
        if not function.start <= address < function.end:
            raise UnwindError("no function lies there")
        return function

    def _find_entry(self, address: int) -> int:
        """Return the address of the entry of the last function that begins at or before an address."""
        start = self._frames_at
        if self._table is None:
            head = self.code(start, 12) if start else b""
            if head[:4] != EH_FRAME_HEADER or len(head) < 12:
                raise UnwindError("no table of functions")
            self._table = start + 12, _WORD.unpack_from(head, 8)[0]
        table, high = self._table
        low = 0
        while low < high:  # at most 32 steps
            middle = (low + high) // 2
            if self._pair(table, middle)[0] + start <= address:
                low = middle + 1
            else:
                high = middle
        if not low:
            raise UnwindError("no function lies there")
        return start + self._pair(table, low - 1)[1]

    def _pair(self, table: int, number: int) -> tuple[int, int]:
        content = self.code(table + 8 * number, 8)
        if len(content) < 8:
            raise UnwindError("its table of functions ends early")
        function, entry = _PAIR.unpack(content)
        return function, entry

    def _entry(self, address: int) -> tuple[int, int, bytes]:
        """Return the id of an entry of .eh_frame, the address of that id, and the bytes behind it."""
        content = self.code(address, 8)
        if len(content) < 8:
            raise UnwindError("an entry lies outside the file")
        size, number = _WORD.unpack_from(content)[0], _WORD.unpack_from(content, 4)[0]
        if not 4 <= size <= MAX_ENTRY_BYTES:
            raise UnwindError("an entry of %d bytes" % size)
        return number, address + 4, self.code(address + 8, size - 4)

    def _read_function(self, address: int) -> Function:
        distance, at, content = self._entry(address)
        number, _, common = self._entry(at - distance)
        if not distance or number:
            raise UnwindError("an entry of another kind")
        return Function(Common(common), content, at + 4)

    def function_start(self, address: int) -> int | None:
        """Return where the function at an address begins, from the unwind information or the symbols."""
        try:
            return self.function_at(address).start
        except UnwindError:
            return self._symbol_start(address)

    def _symbol_start(self, address: int) -> int | None:
        if self._starts is None:
            table = self._load_symbols()[0]
            size, self._starts = self._symbol.size, []
            if len(table) <= MAX_SORTED_BYTES and self._budget.take(2 * len(table)):
                entries = self._symbol.iter_unpack(table[: len(table) // size * size])
                at, info = (4, 1) if self._wide else (1, 3)
                self._starts = sorted(entry[at] for entry in entries if entry[info] & 15 in FUNCTION_KINDS)
        place = bisect_right(self._starts, address)
        return self._starts[place - 1] if place else None

    def name_at(self, address: int) -> bytes:
        """Return the name of the function at an address, or nothing."""
        start = self.function_start(address)
        if not start:
            return b""
        table, strings, size = self._load_symbols()
        at = self._find_symbol(table, start)
        if at is None:
            return b""
        (offset,) = _WORD.unpack_from(table, at)
        if offset >= size:
            return b""
        return self._read(strings + offset, min(MAX_NAME_BYTES, size - offset)).partition(b"\0")[0]

    def _find_symbol(self, table: bytes, start: int) -> int | None:
        """Return the offset of the entry of a function's symbol."""
        size = self._symbol.size
        value_at, info_at = (8, 4) if self._wide else (4, 12)
        wanted = start.to_bytes(8 if self._wide else 4, "little")
        at = -1
        for _ in range(MAX_SAME):
            at = table.find(wanted, at + 1)
            entry = at - value_at
            if at < 0 or entry + size > len(table):
                return None
            if entry >= 0 and not entry % size and table[entry + info_at] & 15 in FUNCTION_KINDS:
                return entry
        return None

    def _load_symbols(self) -> tuple[bytes, int, int]:
        """Return the symbol table, or that of the dynamic loader if it was stripped, and the place of its strings."""
        if self._symbols is None:
            self._symbols = b"", 0, 0
            self._symbols = self._read_symbols()
        return self._symbols

    def _read_symbols(self) -> tuple[bytes, int, int]:
        sections, row_bytes, count = self._header[6], self._header[11], min(self._header[12], MAX_SECTIONS)
        row = self._layout.section
        if row_bytes != row.size or not count:
            return b"", 0, 0
        content = self._read(sections, count * row.size)
        rows = list(row.iter_unpack(content[: len(content) // row.size * row.size]))
        for kind in (SHT_SYMTAB, SHT_DYNSYM):
            for entry in rows:
                if entry[1] == kind and entry[6] < len(rows) and entry[5] <= MAX_SYMBOL_BYTES:
                    strings = rows[entry[6]]
                    if not self._budget.take(entry[5]):
                        return b"", 0, 0
                    return self._read(entry[4], entry[5]), strings[4], strings[5]
        return b"", 0, 0

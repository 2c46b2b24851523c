"""Owns comparing two cores of one crash: as the kernel wrote it, and with its vital part first."""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

PT_LOAD, PT_NOTE, PN_XNUM = 1, 4, 0xFFFF
OWNER = b"core-dump-handler\0"


@dataclass(frozen=True)
class Row:
    """One program header."""

    kind: int
    flags: int
    offset: int
    address: int
    size: int
    memory: int


class CoreFile:
    """An ELF core, read without the code that is tested."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.wide = self.data[4] == 2
        if self.wide:
            table, sections = struct.unpack_from("<QQ", self.data, 32)
            size, count = struct.unpack_from("<HH", self.data, 54)
        else:
            table, sections = struct.unpack_from("<II", self.data, 28)
            size, count = struct.unpack_from("<HH", self.data, 42)
        if count == PN_XNUM:
            (count,) = struct.unpack_from("<I", self.data, sections + (44 if self.wide else 28))
        self.rows = [self._row(table + number * size) for number in range(count)]
        self.loads = [row for row in self.rows if row.kind == PT_LOAD]

    def _row(self, at: int) -> Row:
        if self.wide:
            kind, flags, offset, address, _, size, memory, _ = struct.unpack_from("<IIQQQQQQ", self.data, at)
        else:
            kind, offset, address, _, size, memory, flags, _ = struct.unpack_from("<8I", self.data, at)
        return Row(kind, flags, offset, address, size, memory)

    def raw_notes(self) -> bytes:
        """Return the content of PT_NOTE."""
        row = next(row for row in self.rows if row.kind == PT_NOTE)
        return self.data[row.offset : row.offset + row.size]

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Yield owner, kind and content of each note."""
        row = next(row for row in self.rows if row.kind == PT_NOTE)
        at, end = row.offset, row.offset + row.size
        while at < end:
            name, size, kind = struct.unpack_from("<III", self.data, at)
            start = at + 12 + -(-name // 4) * 4
            yield self.data[at + 12 : at + 12 + name], kind, self.data[start : start + size]
            at = start + -(-size // 4) * 4

    def vital_end(self) -> int:
        """Return what the note of this project says."""
        (content,) = [content for owner, _, content in self.notes() if owner == OWNER]
        version, dropped, end = struct.unpack("<IIQ", content)
        assert (version, dropped) == (1, 0)
        return int(end)


def assert_by_address(path: Path) -> None:
    """Check that the memory of a core is in the order of its addresses, without gaps, and that its note says so."""
    core = CoreFile(path)
    assert core.loads == sorted(core.loads, key=lambda row: row.address)
    assert all(row.offset + row.size == after.offset for row, after in itertools.pairwise(core.loads))
    (end,) = [struct.unpack_from("<Q", content, 8)[0] for owner, _, content in core.notes() if owner == OWNER]
    assert end == 0, "no vital part comes first"


def assert_only_order_differs(dump: Path, other: Path) -> None:
    """Compare two cores: headers but for offsets, notes but for the end of the vital part, every byte of memory."""
    old, new = CoreFile(dump), CoreFile(other)
    assert len(old.data) == len(new.data)
    for before, after in zip(old.rows, new.rows, strict=True):
        assert replace(before, offset=after.offset) == after
        if before.kind == PT_NOTE:
            continue
        content = old.data[before.offset : before.offset + before.size]
        assert content == new.data[after.offset : after.offset + after.size], f"{after.address:x}"
    for (owner, kind, content), found in zip(old.notes(), new.notes(), strict=True):
        expected = content[:8] + bytes(8) + content[16:] if owner == OWNER else content
        assert (owner, kind, expected) == found


def assert_same_memory(kernel: Path, dump: Path) -> None:
    """Compare every byte of memory, all notes and the headers of two cores; nothing is missing and nothing twice."""
    assert not differing_segments(kernel, dump)


def differing_segments(kernel: Path, dump: Path) -> list[Row]:
    """Return the kernel's segments whose memory differs in the dump, after comparing notes and headers."""
    differing = []
    old, new = CoreFile(kernel), CoreFile(dump)
    assert new.raw_notes().startswith(old.raw_notes())
    addresses = [row.address for row in new.loads]
    assert addresses == sorted(addresses)
    pieces = iter(sorted(new.loads, key=lambda row: (row.address, row.memory)))
    for row in sorted(old.loads, key=lambda row: (row.address, row.memory)):
        at = row.address
        piece = next(pieces)
        while True:
            assert (piece.address, piece.flags) == (at, row.flags)
            place = row.offset + at - row.address
            size = max(0, min(row.size - (at - row.address), piece.size))
            assert size == piece.size
            if old.data[place : place + size] != new.data[piece.offset : piece.offset + size]:
                differing.append(row)
            at += piece.memory
            if at >= row.address + row.memory:
                break
            assert piece.memory == piece.size
            piece = next(pieces)
        assert at == row.address + row.memory
    assert next(pieces, None) is None
    spans = sorted((row.offset, row.offset + row.size) for row in new.loads if row.size)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == os.path.getsize(dump)
    return differing

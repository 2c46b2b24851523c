"""Owns comparing a trimmed dump with the kernel's own core of the same crash."""

from __future__ import annotations

import struct
from bisect import bisect_right
from pathlib import Path

from tests.support.corepair import OWNER, CoreFile, Row


def dropped_ranges(core: CoreFile) -> list[tuple[int, int]]:
    """Return what the note of this project says is missing."""
    (content,) = [content for owner, _, content in core.notes() if owner == OWNER]
    return list(struct.iter_unpack("<QQ", content[16:]))


def read(core: CoreFile, address: int, size: int) -> bytes | None:
    """Return the memory in a core at an address; a header without content stands for zeros; None if it is missing."""
    found = b""
    while len(found) < size:
        at = address + len(found)
        row = _row_at(core, at)
        if row is None:
            return None
        inside, left = at - row.address, size - len(found)
        if inside < row.size:
            place = row.offset + inside
            found += core.data[place : place + min(left, row.size - inside)]
        else:
            found += bytes(min(left, row.memory - inside))
    return found


def _row_at(core: CoreFile, address: int) -> Row | None:
    at = bisect_right([row.address for row in core.loads], address) - 1
    row = core.loads[at] if at >= 0 else None
    return row if row and address < row.address + row.memory else None


def assert_trimmed(kernel: Path, dump: Path) -> int:
    """Compare each byte of memory: it is the kernel's, or it is in a range that is said to be dropped.

    Returns:
        How many bytes of the dump are memory.
    """
    old, new = CoreFile(kernel), CoreFile(dump)
    assert new.raw_notes().startswith(old.raw_notes())
    dropped = dropped_ranges(new)
    assert dropped == sorted(dropped)
    rows = [(row.address, row.address + row.memory, row) for row in new.loads if row.memory]
    spans = sorted(
        [*((start, end, row) for start, end, row in rows), *((*span, None) for span in dropped)],
        key=lambda s: s[0],
    )
    at = 0
    for row in sorted(old.loads, key=lambda row: row.address):
        here, end = row.address, row.address + row.memory
        while here < end:
            start, stop, piece = spans[at]
            assert start == here, f"{here:x}: nothing says what is here"
            assert stop <= end or piece is None
            if piece is not None:
                _compare(old, row, new, piece)
            here = min(stop, end)
            if stop <= end:
                at += 1
            else:
                spans[at] = (end, stop, None)  # a dropped range that goes on in the next segment
    assert at == len(spans)
    return sum(row.size for row in new.loads)


def _compare(old: CoreFile, row: Row, new: CoreFile, piece: Row) -> None:
    inside = piece.address - row.address
    content = new.data[piece.offset : piece.offset + piece.size]
    assert old.data[row.offset + inside : row.offset + inside + piece.size] == content, f"{piece.address:x}"
    beyond = max(0, min(row.size - inside, piece.memory) - piece.size)
    first = row.offset + inside + piece.size
    assert old.data[first : first + beyond] == bytes(beyond), f"{piece.address:x} is not zeros"

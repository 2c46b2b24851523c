"""Builds ELF cores of any class, byte order and machine, as fs/binfmt_elf.c lays them out. Also shared by fuzzers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

PT_LOAD, PT_NOTE = 1, 4
PRSTATUS, PRPSINFO, AUXV, FILE, SIGINFO = 1, 3, 6, 0x46494C45, 0x53494749
X86_64, I386, AARCH64 = 62, 3, 183


@dataclass(frozen=True)
class Shape:
    """Class, byte order and machine of a core."""

    bits: int = 64
    order: str = "<"
    machine: int = X86_64

    @property
    def word(self) -> str:
        return "Q" if self.bits == 64 else "I"

    def words(self, *values: int) -> bytes:
        return struct.pack(f"{self.order}{len(values)}{self.word}", *values)

    def ints(self, *values: int) -> bytes:
        return struct.pack(f"{self.order}{len(values)}I", *values)

    def header(
        self,
        *,
        count: int,
        sections: tuple[int, int, int] = (0, 0, 0),
        kind: int = 4,
        table: int | None = None,
    ) -> bytes:
        size, row = (64, 56) if self.bits == 64 else (52, 32)
        identity = b"\x7fELF" + bytes([self.bits // 32, 1 if self.order == "<" else 2, 1])
        return struct.pack(
            f"{self.order}16sHHI3{self.word}IHHHHHH", identity, kind, self.machine, 1, 0,
            size if table is None else table, sections[0], 0, size, row, count, *sections[1:], 0,
        )  # fmt: skip

    def row(
        self, kind: int, flags: int, offset: int, address: int, size: int, memory: int | None = None
    ) -> bytes:
        memory, align = size if memory is None else memory, 4 if kind == PT_NOTE else 4096
        if self.bits == 64:
            return struct.pack(self.order + "IIQQQQQQ", kind, flags, offset, address, 0, size, memory, align)
        return struct.pack(self.order + "8I", kind, offset, address, 0, size, memory, flags, align)

    def note(self, kind: int, content: bytes, owner: bytes = b"CORE\0") -> bytes:
        name = owner.ljust(-(-len(owner) // 4) * 4, b"\0")
        return (
            self.ints(len(owner), len(content), kind) + name + content.ljust(-(-len(content) // 4) * 4, b"\0")
        )

    def status(self, tid: int, signal: int = 11, registers: Sequence[tuple[int, int]] = ()) -> bytes:
        """NT_PRSTATUS; `registers` are (number, value)."""
        at = 112 if self.bits == 64 else 72
        content = bytearray(at + 40 * self.bits // 8)
        struct.pack_into(self.order + "H", content, 12, signal)
        struct.pack_into(self.order + "I", content, 32 if self.bits == 64 else 24, tid)
        for number, value in registers:
            struct.pack_into(self.order + self.word, content, at + number * self.bits // 8, value)
        return self.note(PRSTATUS, bytes(content))

    def files(self, *mapped: tuple[int, int, int, bytes]) -> bytes:
        """NT_FILE of (start, end, page, path)."""
        content = self.words(len(mapped), 4096) + b"".join(self.words(*each[:3]) for each in mapped)
        return self.note(FILE, content + b"".join(each[3] + b"\0" for each in mapped))


def build(
    shape: Shape, notes: bytes, segments: Sequence[tuple[int, bytes, bool]], *, extended: bool = False
) -> bytes:
    """Return a core of (address, content, executable) segments; `extended` counts them as PN_XNUM does."""
    head, row = (64, 56) if shape.bits == 64 else (52, 32)
    at = head + row * (1 + len(segments))
    rows = [shape.row(PT_NOTE, 0, at, 0, len(notes))]
    offset = -(-(at + len(notes)) // 4096) * 4096
    body = [bytes(offset - at - len(notes))]
    for address, content, executable in segments:
        rows.append(shape.row(PT_LOAD, 5 if executable else 6, offset, address, len(content)))
        body.append(content)
        offset += len(content)
    end = b""
    sections = (0, 0, 0)
    if extended:
        end = bytes(64 if shape.bits == 64 else 40)
        sections = (offset, len(end), 1)
    count = 0xFFFF if extended else 1 + len(segments)
    return shape.header(count=count, sections=sections) + b"".join([*rows, notes, *body, end])


def simple(
    memory: bytes = b"", *, shape: Shape | None = None, promised: int | None = None, segments: int = 1
) -> bytes:
    """Return a core of writable segments without notes, whose headers promise its length, or another one.

    Args:
        memory: the content of each segment's file range, which is one and the same.
        shape: x86-64 by default.
        promised: length by the headers.
        segments: number of program headers.
    """
    shape = shape or Shape()
    head, row = (64, 56) if shape.bits == 64 else (52, 32)
    start = head + row * segments
    filler = (
        b"" if shape.bits == 64 else bytes(12)
    )  # an ELF32 header and its shortest table are under 64 bytes
    held = len(filler + memory) if promised is None else promised - start
    rows = [shape.row(PT_LOAD, 6, start, 0, held)] * segments
    return shape.header(count=min(segments, 0xFFFF)) + b"".join(rows) + filler + memory

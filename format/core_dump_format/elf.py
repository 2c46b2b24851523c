"""Owns what the bytes of an ELF core say: its length, notes, mapped files, registers. Pure; nothing is trusted.

A core is read from its front to its back, once, so that it can come out of a decompressor. Every count and length in
it may lie: each is held against a bound before it is used. 64-bit little-endian cores of x86-64 and AArch64 are
understood whole, others as far as their length. Sources: elf(5), core(5), include/uapi/linux/elf.h and
fs/binfmt_elf.c in the kernel.
"""

from __future__ import annotations

import struct
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

X86_64, AARCH64 = 62, 183
MOST_NOTES_BYTES = 16 * 1024 * 1024
"""Kernels allow 4 to 16 MiB (`kernel.core_file_note_size_limit`)."""
MOST_THREADS = 4096
MOST_FILES = 65_536
MOST_FIRST_PAGES = 2048
PAGE = 4096

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_EHDR = struct.Struct("<16xHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
_ET_CORE, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 1, 4, 0xFFFF
_NT_PRSTATUS, _NT_PRPSINFO, _NT_AUXV, _NT_SIGINFO, _NT_FILE = 1, 3, 6, 0x53494749, 0x46494C45
_NT_GNU_BUILD_ID = 3
_AT_ENTRY = 9
_REGISTERS_AT = 112
_REGISTERS = {X86_64: (16, 19, 4), AARCH64: (32, 31, 29)}
"""Of each machine: which registers in NT_PRSTATUS are program counter, stack pointer and frame pointer."""
_FAULTS = frozenset({4, 5, 7, 8, 11})
"""Signals whose siginfo holds an address: ILL, TRAP, BUS, FPE, SEGV (sigaction(2))."""


class NotACoreError(ValueError):
    """These bytes are no core that can be read; the message says why."""


class EndError(Exception):
    """What is asked for lies behind the end, the bound or the deadline."""


class Forward:
    """Bytes taken by ascending offset from a stream that only goes forward, up to a bound and a deadline."""

    def __init__(self, read: Callable[[int], bytes], most_bytes: int, seconds: float = float("inf")) -> None:
        """Read by `read(n)`, which returns up to n bytes and none at the end."""
        self._read = read
        self._most_bytes = most_bytes
        self._deadline = time.monotonic() + seconds
        self._kept = b""
        self._position = 0
        """Offset of the first kept byte."""

    @classmethod
    def over(cls, pieces: Iterable[bytes], most_bytes: int, seconds: float = float("inf")) -> Forward:
        """Read from pieces of any length."""
        coming = iter(pieces)
        return cls(lambda _: next(coming, b""), most_bytes, seconds)

    def take(self, offset: int, size: int) -> bytes:
        """Return bytes at an offset not before what was taken last; the same offset may be taken again.

        Raises:
            EndError: not all of them can be had.
        """
        found = self.reach(offset, size)
        if len(found) < size:
            raise EndError
        return found

    def reach(self, offset: int, size: int) -> bytes:
        """Return as many of the bytes at an offset as can be had."""
        size = min(size, self._most_bytes - offset)
        if offset < self._position or size <= 0:
            return b""
        while self._position + len(self._kept) <= offset:
            self._position += len(self._kept)
            self._kept = self._more()
            if not self._kept:
                return b""
        self._kept = self._kept[offset - self._position :]
        self._position = offset
        pieces, have = [self._kept], len(self._kept)
        while have < size:
            piece = self._more()
            if not piece:
                break
            pieces.append(piece)
            have += len(piece)
        self._kept = b"".join(pieces)
        return self._kept[:size]

    def _more(self) -> bytes:
        return self._read(256 * 1024) if time.monotonic() < self._deadline else b""


class Segment(NamedTuple):
    """A PT_LOAD header."""

    address: int
    offset: int
    file_bytes: int
    executable: bool


class MappedFile(NamedTuple):
    """One entry of NT_FILE."""

    start: int
    end: int
    offset_bytes: int
    path: str


class Thread(NamedTuple):
    """One NT_PRSTATUS."""

    tid: int
    signal: int
    pc: int
    sp: int
    fp: int


@dataclass
class Core:
    """What the headers and notes of a core say. The first thread is the one that crashed."""

    machine: int
    expected_bytes: int
    """The end of the last segment: the length of a whole core."""
    segments: list[Segment]
    """By address."""
    threads: list[Thread] = field(default_factory=list)
    files: list[MappedFile] = field(default_factory=list)
    """By address."""
    comm: str | None = None
    arguments: str | None = None
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    signal: int | None = None
    code: int | None = None
    fault_address: int | None = None
    sender_pid: int | None = None
    entry: int | None = None

    def file_at(self, address: int) -> MappedFile | None:
        """Return the mapped file that holds an address."""
        below = bisect_left(self.files, (address + 1,))
        found = self.files[below - 1] if below else None
        return found if found and address < found.end else None

    def executable(self) -> str | None:
        """Return the path of the program: the file that its entry point lies in, else the first one mapped."""
        found = self.file_at(self.entry) if self.entry is not None else None
        return found.path if found else self.files[0].path if self.files else None

    def is_code(self, address: int) -> bool:
        """Tell whether an address was executable."""
        segment = self._segment_below(address)
        return segment is not None and segment.executable

    def where(self, address: int, size: int) -> tuple[int, int] | None:
        """Return file offset and number of the bytes at an address that are in the core, at most `size`."""
        segment = self._segment_below(address)
        inside = address - segment.address if segment else 0
        if segment is None or inside >= segment.file_bytes:
            return None
        return segment.offset + inside, min(size, segment.file_bytes - inside)

    def _segment_below(self, address: int) -> Segment | None:
        below = bisect_left(self.segments, (address + 1,))
        return self.segments[below - 1] if below else None


def read_core(source: Forward) -> Core:
    """Read the headers and notes at the front of a core.

    Raises:
        NotACoreError: no ELF core, or one whose headers cannot be.
    """
    try:
        header = source.take(0, 64)
        if header[:6] != _ELF64_LITTLE:
            raise NotACoreError("not a 64-bit little-endian ELF file")
        kind, machine, _, _, table, sections, _, _, entry_bytes, count, row_bytes, rows_count, _ = (
            _EHDR.unpack(header)
        )
        if kind != _ET_CORE:
            raise NotACoreError("an ELF file, but not a core")
        if count == _PN_XNUM:
            raise NotACoreError("more than 65,534 segments")
        if entry_bytes != _PHDR.size or not _EHDR.size <= table <= MOST_NOTES_BYTES or not count:
            raise NotACoreError("its program headers cannot be where it says")
        rows = list(_PHDR.iter_unpack(source.take(table, count * _PHDR.size)))
    except EndError:
        raise NotACoreError("it ends within its headers") from None
    end = sections + row_bytes * rows_count if sections else 0  # the kernel writes none, gdb's gcore does
    return _with_notes(source, machine, rows, end)


def _with_notes(source: Forward, machine: int, rows: list[tuple[int, ...]], end: int) -> Core:
    segments = sorted(Segment(r[3], r[2], r[5], bool(r[1] & 1)) for r in rows if r[0] == _PT_LOAD)
    core = Core(machine, max(end, *(r[2] + r[5] for r in rows)), segments)
    notes = next((r for r in rows if r[0] == _PT_NOTE), None)
    if notes is None:
        return core
    for kind, content in _notes(source.reach(notes[2], min(notes[5], MOST_NOTES_BYTES))):
        try:
            _read_note(core, kind, content)
        except struct.error:
            continue  # shorter than its kind: worth nothing
    return core


def _notes(block: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _NHDR.size <= len(block):
        name_bytes, size, kind = _NHDR.unpack_from(block, at)
        content = at + _NHDR.size + -(-name_bytes // 4) * 4
        if content + size > len(block):
            return
        yield kind, block[content : content + size]
        at = content + -(-size // 4) * 4


def _read_note(core: Core, kind: int, content: bytes) -> None:
    if kind == _NT_PRSTATUS and len(core.threads) < MOST_THREADS and core.machine in _REGISTERS:
        core.threads.append(_thread(core.machine, content))
    elif kind == _NT_PRPSINFO:
        core.uid, core.gid, core.pid = struct.unpack_from("<III", content, 16)
        core.comm, core.arguments = _text(content[40:56]), _text(content[56:136])
    elif kind == _NT_AUXV:
        for key, value in struct.iter_unpack("<QQ", content[: len(content) // 16 * 16]):
            if key == _AT_ENTRY:
                core.entry = value
    elif kind == _NT_SIGINFO:
        core.signal, _, core.code = struct.unpack_from("<iii", content)
        (value,) = struct.unpack_from("<Q", content, 16)
        if core.code <= 0:
            core.sender_pid = value & 0xFFFFFFFF
        elif core.signal in _FAULTS:
            core.fault_address = value
    elif kind == _NT_FILE:
        core.files = sorted(_mapped(content))


def _thread(machine: int, content: bytes) -> Thread:
    (signal,) = struct.unpack_from("<H", content, 12)
    (tid,) = struct.unpack_from("<I", content, 32)
    pc, sp, fp = (
        struct.unpack_from("<Q", content, _REGISTERS_AT + 8 * register)[0] for register in _REGISTERS[machine]
    )
    return Thread(tid, signal, pc, sp, fp)


def _mapped(content: bytes) -> Iterator[MappedFile]:
    count, unit = struct.unpack_from("<QQ", content)
    if count > min(MOST_FILES, len(content) // 25):
        return
    names = content[16 + 24 * count :].split(b"\0")
    for number, name in zip(range(count), names):
        start, end, offset = struct.unpack_from("<QQQ", content, 16 + 24 * number)
        yield MappedFile(start, end, offset * unit, _text(name))


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace").rstrip(" ")


def take_memory(core: Core, source: Forward, wanted: Iterable[tuple[int, int]]) -> dict[int, bytes]:
    """Return what the core holds of some (address, size) ranges, as far as the source reaches."""
    found: dict[int, bytes] = {}
    places = [(core.where(address, size), address) for address, size in set(wanted)]
    for (offset, size), address in sorted((place, address) for place, address in places if place):
        try:
            found[address] = source.take(offset, size)
        except EndError:
            continue
    return found


def build_ids(
    core: Core, source: Forward, also: Iterable[tuple[int, int]] = ()
) -> tuple[dict[str, str], dict[int, bytes]]:
    """Return the build ID of each mapped ELF file by path, and the memory asked for beside them.

    The kernel keeps the first page of a mapped ELF file in the core (bit 4 of /proc/PID/coredump_filter).
    """
    firsts = {file.start: file.path for file in core.files if file.offset_bytes == 0}
    firsts = dict(list(firsts.items())[:MOST_FIRST_PAGES])
    memory = take_memory(core, source, [*((start, PAGE) for start in firsts), *also])
    found: dict[str, str] = {}
    for start, path in firsts.items():
        build_id = build_id_of(memory.get(start, b""))
        if build_id is not None:
            found.setdefault(path, build_id)
    return found, memory


def build_id_of(page: bytes) -> str | None:
    """Return the build ID that the first page of an ELF file holds, in hexadecimal."""
    if len(page) < 64 or page[:6] != _ELF64_LITTLE:  # noqa: PLR2004  the ELF header's length
        return None
    table, count = struct.unpack_from("<Q", page, 32)[0], struct.unpack_from("<H", page, 56)[0]
    for number in range(min(count, 64)):
        at = table + number * _PHDR.size
        if at + _PHDR.size > len(page):
            return None
        kind, _, offset, _, _, size, _, _ = _PHDR.unpack_from(page, at)
        if kind != _PT_NOTE:
            continue
        for note, content in _notes(page[offset : offset + size]):
            if note == _NT_GNU_BUILD_ID and 4 <= len(content) <= 64:  # noqa: PLR2004  any hash there is
                return content.hex()
    return None

"""Owns what a core says: its threads, mapped files, signal and program. Pure; nothing in it is trusted.

Registers are known for x86-64, i386 and AArch64; everything else is read from any core that Linux writes. Sources:
core(5), include/uapi/linux/elfcore.h, compat structures in include/linux/elfcore-compat.h.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from core_dump_format.elf import PAGE, Form, Layout, build_id_of, read_layout, read_notes
from core_dump_format.reorder import NOTE_KIND, ORDER_VERSION
from core_dump_format.state import (
    AARCH64,
    AT_ENTRY,
    AT_PHDR,
    AT_PHNUM,
    I386,
    MACHINE_NAMES,
    NT_AUXV,
    NT_FILE,
    NT_PRSTATUS,
    X86_64,
)
from core_dump_format.stream import EndError, Forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MOST_THREADS = 32_768
"""Kept with their registers; more are counted."""
MOST_FILES = 65_536
MOST_FIRST_PAGES = 2048
MOST_DROPPED = 1 << 20
DELETED = " (deleted)"
"""The kernel appends it to the path of a file that was deleted or replaced (d_path in fs/d_path.c)."""

_MACHINES = {
    **MACHINE_NAMES,
    40: "arm",
    8: "mips",
    20: "ppc",
    21: "ppc64",
    22: "s390",
    243: "riscv",
    258: "loongarch",
}
_NT_PRPSINFO, _NT_SIGINFO = 3, 0x53494749
_FAULTS = frozenset({4, 5, 7, 8, 11})
"""Signals whose siginfo holds an address: ILL, TRAP, BUS, FPE, SEGV (sigaction(2))."""


class _Status(NamedTuple):
    """Where NT_PRSTATUS holds a thread's id and registers."""

    tid_at: int
    registers_at: int
    register_bytes: int
    pc: int
    sp: int
    fp: int


_STATUS = {
    (64, X86_64): _Status(32, 112, 8, 16, 19, 4),
    (64, AARCH64): _Status(32, 112, 8, 32, 31, 29),
    (32, I386): _Status(24, 72, 4, 12, 15, 5),
    (32, X86_64): _Status(24, 72, 8, 16, 19, 4),  # the x32 ABI
}
_UNKNOWN_STATUS = {64: _Status(32, 112, 0, 0, 0, 0), 32: _Status(24, 72, 0, 0, 0, 0)}


class MappedFile(NamedTuple):
    """One entry of NT_FILE."""

    start: int
    end: int
    offset_bytes: int
    path: str
    """Without the kernel's `(deleted)`."""
    deleted: bool = False


class Thread(NamedTuple):
    """One NT_PRSTATUS; registers are 0 where the machine is not known."""

    tid: int
    signal: int
    pc: int
    sp: int
    fp: int


@dataclass
class Core:
    """The headers and notes of a core. The first thread is the one that crashed."""

    layout: Layout
    threads: list[Thread] = field(default_factory=list)
    thread_count: int = 0
    """All threads, those beyond MOST_THREADS included."""
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
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of the ranges of memory that were dropped from a trimmed dump."""
    vital_end: int = 0
    """Length of headers, notes and vital part; 0 if no vital part comes first."""
    entry: int | None = None
    """Address of the program's first instruction."""
    header_table: int = 0
    """Address of the program's own program headers; 0 if unknown."""
    header_count: int = 0
    """Their number."""

    @property
    def form(self) -> Form:
        """Return class and byte order."""
        return self.layout.header.form

    @property
    def machine(self) -> str:
        """Return the name of the processor's architecture, e.g. `x86-64`."""
        number = self.layout.header.machine
        return _MACHINES.get(number, f"machine {number}")

    @property
    def expected_bytes(self) -> int:
        """Return the length of the whole core."""
        return self.layout.expected_bytes

    def file_at(self, address: int) -> MappedFile | None:
        """Return the mapped file at an address."""
        below = bisect_left(self.files, (address + 1,))
        found = self.files[below - 1] if below else None
        return found if found and address < found.end else None

    def executable(self) -> str | None:
        """Return the program's path: the file at its entry point, else the first mapped file."""
        found = self.file_at(self.entry) if self.entry is not None else None
        return found.path if found else self.files[0].path if self.files else None

    def is_code(self, address: int) -> bool:
        """Tell whether an address was executable."""
        return self.layout.segments.is_code(address)

    def where(self, address: int, size: int) -> tuple[int, int] | None:
        """Return offset and length of the memory at an address, at most `size`; None if the core lacks it."""
        return self.layout.segments.where(address, size)


def read_core(source: Forward) -> Core:
    """Read the headers and notes at the front of a core.

    Raises:
        NotACoreError: it is not an ELF core, or its headers are impossible.
    """
    core = Core(read_layout(source))
    if core.layout.notes is None:
        return core
    seen: set[int] = set()
    for kind, content in read_notes(source, core.form, *core.layout.notes):
        read = _READERS.get(kind)
        if read is None or kind in seen:
            continue
        if kind != NT_PRSTATUS:
            seen.add(kind)  # the kernel writes one of each; parsing a thousand copies would only cost time
        try:
            read(core, content)
        except struct.error:
            continue  # shorter than its kind requires
    return core


def _read_status(core: Core, content: bytes) -> None:
    core.thread_count += 1
    if len(core.threads) >= MOST_THREADS:
        return
    form = core.form
    status = _STATUS.get((form.bits, core.layout.header.machine), _UNKNOWN_STATUS[form.bits])
    (signal,) = struct.unpack_from(form.order + "H", content, 12)
    (tid,) = struct.unpack_from(form.order + "I", content, status.tid_at)
    registers = [0, 0, 0]
    if status.register_bytes:
        one = struct.Struct(form.order + ("Q" if status.register_bytes > 4 else "I"))
        at = [
            status.registers_at + number * status.register_bytes
            for number in (status.pc, status.sp, status.fp)
        ]
        registers = [one.unpack_from(content, place)[0] for place in at]
    core.threads.append(Thread(tid, signal, *registers))


def _read_process(core: Core, content: bytes) -> None:
    order = core.form.order
    if core.form.bits == 64:
        core.uid, core.gid, core.pid = struct.unpack_from(order + "III", content, 16)
        names = 40
    else:
        core.uid, core.gid, core.pid = struct.unpack_from(order + "HHI", content, 8)
        names = 28
    core.comm, core.arguments = _text(content[names : names + 16]), _text(content[names + 16 : names + 96])


def _read_auxiliary(core: Core, content: bytes) -> None:
    step = 2 * core.form.word_bytes
    for at in range(0, len(content) - step + 1, step):
        key, value = core.form.words(content, at, 2)
        if key == AT_ENTRY:
            core.entry = value
        elif key == AT_PHDR:
            core.header_table = value
        elif key == AT_PHNUM:
            core.header_count = value


def _read_signal(core: Core, content: bytes) -> None:
    core.signal, _, core.code = struct.unpack_from(core.form.order + "iii", content)
    (value,) = core.form.words(content, 8 + core.form.word_bytes, 1)
    if core.code <= 0:
        core.sender_pid = value & 0xFFFFFFFF
    elif core.signal in _FAULTS:
        core.fault_address = value


def _read_files(core: Core, content: bytes) -> None:
    core.files = sorted(_mapped(core.form, content))


def _read_order(core: Core, content: bytes) -> None:
    """Read the note of this project: docs/contracts.md, "Order of a large dump"."""
    order = core.form.order
    version, count, vital_end = struct.unpack_from(order + "IIQ", content)
    if version != ORDER_VERSION:
        return
    core.vital_end = vital_end
    if count <= min(MOST_DROPPED, (len(content) - 16) // 16):
        core.dropped = list(struct.iter_unpack(order + "QQ", content[16 : 16 + 16 * count]))


_READERS: dict[int, Callable[[Core, bytes], None]] = {
    NT_PRSTATUS: _read_status,
    _NT_PRPSINFO: _read_process,
    NT_AUXV: _read_auxiliary,
    _NT_SIGINFO: _read_signal,
    NT_FILE: _read_files,
    NOTE_KIND: _read_order,
}
"""The NT_ numbers of elf.h, and that of this project's note."""


def _mapped(form: Form, content: bytes) -> Iterator[MappedFile]:
    count, unit = form.words(content, 0, 2)
    row_bytes, first = 3 * form.word_bytes, 2 * form.word_bytes
    if count > min(MOST_FILES, len(content) // (row_bytes + 1)):
        return
    at = first + row_bytes * count
    for number in range(count):
        end = content.find(b"\0", at)
        if end < 0:
            return
        start, stop, offset = form.words(content, first + row_bytes * number, 3)
        path = _text(content[at : min(end, at + PAGE)])  # a path has at most PATH_MAX bytes
        deleted = path.endswith(DELETED)
        yield MappedFile(start, stop, offset * unit, path[: -len(DELETED)] if deleted else path, deleted)
        at = end + 1


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace").rstrip(" ")


def read_memory(core: Core, source: Forward, address: int, size: int) -> bytes:
    """Return as many of the bytes at an address as lie in its segment and as the source reaches."""
    place = core.where(address, size)
    return source.reach(*place) if place else b""


def take_memory(core: Core, source: Forward, wanted: Iterable[tuple[int, int]]) -> dict[int, bytes]:
    """Return the memory in some (address, size) ranges, as far as the core has it and the source reaches."""
    found: dict[int, bytes] = {}
    places = [(core.where(address, size), address) for address, size in set(wanted)]
    for (offset, size), address in sorted((place, address) for place, address in places if place):
        try:
            found[address] = source.take(offset, size)
        except EndError:
            continue
    return found


def read_build_ids(
    core: Core, source: Forward, also: Iterable[tuple[int, int]] = ()
) -> tuple[dict[str, str], dict[int, bytes]]:
    """Return the build IDs of mapped ELF files by path, and the memory in the ranges of `also`.

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

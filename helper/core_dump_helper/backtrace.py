"""Owns computing the frames of the crashing thread, after its process was released. A failure costs the frames only.

The stack comes from the core, which is in memory; code, unwind information and symbols come from the files that
were opened while the process was held. They are read only on file systems of the kernel itself: one that a process
serves (FUSE) or a network serves may never answer.
"""

from __future__ import annotations

import os
import stat
from _queue import Empty, SimpleQueue
from _thread import start_new_thread
from bisect import bisect_right

from core_dump_format.frames import choose, encode, find_places
from core_dump_format.front import UnsupportedError, front_bytes, read_front
from core_dump_format.machine import MACHINES
from core_dump_format.objectfile import Budget, ObjectFile
from core_dump_format.state import AT_ENTRY, MACHINE_NAMES, ProcessState
from core_dump_format.walk import Mapping, Process
from core_dump_helper.mounts import LOCAL, parse_mounts
from core_dump_helper.system import log, read_all

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.front import Front
    from core_dump_helper.crash import Crash, OpenedFiles

    Origin = tuple[Front, ProcessState, list[tuple[int, bytes]]]

SECONDS = 5
MAX_MOUNTINFO_BYTES = 8 << 20
MAX_SYMBOL_BYTES = 64 << 20
"""Of all files together."""
DELETED = b" (deleted)"
IDENT_BYTES = 64
PF_X = 1
STACKED = frozenset([b"overlay", b"aufs"])
"""Whoever has a user namespace of its own may stack one on a file system that it serves."""


class CoreMemory:
    """The memory of the crashed process, as far as it was copied."""

    def __init__(self, pieces: list[tuple[int, bytes]]) -> None:
        """Take addresses and contents."""
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        self._starts = [start for start, _ in self._pieces]

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, as far as it is known; successive pieces are joined."""
        found = b""
        while size > len(found):
            at = address + len(found)
            place = bisect_right(self._starts, at)
            start, content = self._pieces[place - 1] if place else (at, b"")
            more = content[at - start : at - start + size - len(found)]
            if not more:
                break
            found += more
        return found


class CrashedProcess(Process):
    """The crashed process: its memory from the core, its code from the files that were mapped."""

    def __init__(self, front: Front, state: ProcessState, memory: CoreMemory, opened: OpenedFiles) -> None:
        """Store them; raises KeyError if the machine is not known."""
        mappings = [
            Mapping(start, end, offset, base_name(path))
            for (start, end, path), offset in zip(state.files, state.offsets)  # noqa: B905 - Python 3.7
        ]
        super().__init__(MACHINES[front.layout.bits, front.machine], mappings)
        self.read = memory.read  # type: ignore[method-assign]
        self._front, self._opened = front, opened
        self._types: dict[bytes, bytes] = {}
        self._objects: dict[int, ObjectFile | None] = {}
        self._readers: list[int] = []
        self._budget = Budget(MAX_SYMBOL_BYTES)
        if opened.mounts >= 0:
            self._types = mount_types(opened.mounts)

    def is_code(self, address: int) -> bool:
        """Tell whether an address is in executable memory."""
        index = self._front.at(address) if address >= 0 else 0
        is_executable = bool(index) and bool(self._front.flags[index] & PF_X)
        return is_executable and (self.mapping_at(address) is not None or self._front.find(address) == index)

    def object_of(self, mapping: Mapping) -> ObjectFile | None:
        """Return the file of a mapping, or None if it cannot be read, or is not that of the process."""
        if mapping.start not in self._objects:
            self._objects[mapping.start] = None
            try:
                self._objects[mapping.start] = self._open(mapping)
            except (OSError, ValueError):
                pass
        return self._objects[mapping.start]

    def close(self) -> None:
        """Close the files that were read."""
        for descriptor in self._readers:
            os.close(descriptor)
        self._readers = []

    def _open(self, mapping: Mapping) -> ObjectFile | None:
        handle = self._opened.files.get(mapping.start)
        if handle is None or not self._is_safe(handle):
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None  # opening a device may have an effect
        path = "/proc/self/fd/%d" % handle
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._readers.append(reader)
        first = self.mapping_at(mapping.start - mapping.offset)
        head = self.read(first.start, IDENT_BYTES) if first and not first.offset else b""
        if len(head) == IDENT_BYTES and head != os.pread(reader, IDENT_BYTES, 0):
            return None
        return ObjectFile(lambda offset, size: pread(reader, offset, size), self._budget)

    def _is_safe(self, handle: int) -> bool:
        """Tell whether the kernel itself answers for a file; its mount is known from numbers alone."""
        with open("/proc/self/fdinfo/%d" % handle, "rb") as file:
            fields = dict(line.split(b":", 1) for line in file.read(4096).splitlines() if b":" in line)
        kind = self._types.get(fields.get(b"mnt_id", b"").strip(), b"")
        return kind in LOCAL and (kind not in STACKED or self._opened.is_ours)


def pread(descriptor: int, offset: int, size: int) -> bytes:
    """Return the bytes at an offset; none at one that is impossible."""
    try:
        return os.pread(descriptor, size, offset)
    except OverflowError:
        return b""


def base_name(path: bytes) -> str:
    """Return the name of a mapped file without its directory and the kernel's ` (deleted)`."""
    path = path[: -len(DELETED)] if path.endswith(DELETED) else path
    return path.rpartition(b"/")[2].decode("utf-8", "backslashreplace")


def mount_types(descriptor: int) -> dict[bytes, bytes]:
    """Return the type of file system of each mount, by its id."""
    mounts = parse_mounts(read_all(descriptor, MAX_MOUNTINFO_BYTES))
    return {number: kind for number, _, kind in mounts}


def frames_of(front: Front, state: ProcessState, memory: CoreMemory, opened: OpenedFiles) -> dict[str, bytes]:
    """Return the attributes that say where the crashing thread was."""
    found = {"machine": MACHINE_NAMES.get(front.machine, "").encode()}
    if (front.layout.bits, front.machine) not in MACHINES or not state.threads:
        return {}
    process = CrashedProcess(front, state, memory, opened)
    try:
        registers = process.machine.from_notes(state.threads[0].registers)
        places, is_deep = find_places(process, registers, has_files=bool(opened.files))
        text = encode(choose(places, is_deep=is_deep), is_deep=is_deep)
        found["frames"] = text.encode("ascii", "replace")
        found["build_id"] = build_id(process, state).hex().encode()
    finally:
        process.close()
    return {name: value for name, value in found.items() if value}


def build_id(process: Process, state: ProcessState) -> bytes:
    """Return the build ID of the program, from its first page in memory."""
    entry = process.mapping_at(state.auxv.get(AT_ENTRY, 0))
    first = process.mapping_at(entry.start - entry.offset) if entry else None
    if first is None:
        return b""
    start = first.start
    try:
        return ObjectFile(lambda offset, size: process.read(start + offset, size)).build_id()
    except ValueError:
        return b""


def find_frames(crash: Crash, core: Origin | bytes | bytearray, opened: OpenedFiles) -> dict[str, bytes]:
    """Compute the frames in a thread of its own, for SECONDS at most; return attributes, or none after a failure.

    Args:
        crash: for the log.
        core: the whole core if it is small, else its front, state and vital memory.
        opened: the files behind its code, which are closed at the end.
    """
    done: SimpleQueue[dict[str, bytes] | str] = SimpleQueue()
    start_new_thread(_run, (core, opened, done))
    try:
        found = done.get(True, SECONDS)
    except Empty:
        found = "they took longer than %d s" % SECONDS
    if isinstance(found, str):
        log("%s: its frames are not known: %s" % (crash, found))
        return {}
    return found


def _run(
    core: Origin | bytes | bytearray, opened: OpenedFiles, done: SimpleQueue[dict[str, bytes] | str]
) -> None:
    try:
        front, state, pieces = core if isinstance(core, tuple) else read_core(core)
        done.put(frames_of(front, state, CoreMemory(pieces), opened))
    except Exception as error:  # noqa: BLE001 - hostile input costs the frames only
        done.put("%s: %s" % (type(error).__name__, error))
    finally:
        opened.close()


def read_core(content: bytes | bytearray) -> Origin:
    """Return front, state and memory of a small core that is in memory; raises UnsupportedError."""
    if front_bytes(content) > len(content):
        raise UnsupportedError("it ends within its headers")
    front = read_front(content)
    view = memoryview(content)
    pieces = []
    for index in range(1, 1 + front.loads):
        offset, size = front.offsets[index], front.sizes[index]
        if size:
            pieces.append((front.addresses[index], bytes(view[offset : offset + size])))
    return front, ProcessState(front), pieces

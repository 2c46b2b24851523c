"""Owns the fingerprint of a crash: equal for the same bug, whatever the node, the pid or the address layout.

It hashes its own version, the executable's build ID (its name if it has none), the signal, and the program's own frames
(`core_dump_format.frames`). The helper finds these while the files of the process are there, and writes them into the
attributes of the dump, so no byte of the dump itself is read. A dump without them, written by an older helper, by the
kernel or by `dd`, is read: its front, or the parts of a raw core that matter. It holds no code, so its frames are
evidence for grouping, not a backtrace.

Nothing that a core contains makes the functions here raise.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from core_dump_collector.s3 import sources
from core_dump_format.core import DELETED, read_build_ids, read_core, read_memory
from core_dump_format.elf import NotACoreError
from core_dump_format.frames import RECURSION, choose, decode, find_places, own_places
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.machine import MACHINES
from core_dump_format.stream import Forward, Seekable
from core_dump_format.walk import Mapping, Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Mapping as Facts

    from core_dump_format.core import Core
    from core_dump_format.frames import Place

VERSION = 2
"""Part of the hash. Version 1, which no field names, hashed five frames of a dump's first 256 MiB."""
MOST_BYTES = 256 * 1024 * 1024
SECONDS = 2.0
STACK_BYTES = 64 * 1024
BLOCK_BYTES = 64 * 1024
PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What distinguishes one crash from another."""

    id: str
    """16 hexadecimal digits."""
    build_id: str | None
    """Build ID of the executable."""
    frames: str
    """As the metadata object has them; empty if none is known."""
    machine: str
    """Architecture of the core, such as `x86-64`."""

    def fields(self) -> dict[str, str | int]:
        """Return the fields of the metadata object."""
        fields: dict[str, str | int] = {"fingerprint": self.id, "fingerprint_version": VERSION}
        known = {"frames": self.frames, "machine": self.machine, "build_id": self.build_id}
        return fields | {name: value for name, value in known.items() if value}


class _Known(NamedTuple):
    """Facts about a crash other than its frames."""

    program: str
    build_id: str | None
    signal: str | int | None
    machine: str


def fingerprint_of_attributes(attributes: Facts[str, str | int]) -> Fingerprint | None:
    """Compute the fingerprint of a dump whose helper has found its frames; None if it has not."""
    text = attributes.get("frames")
    if not text:
        return None
    places, is_deep = decode(str(text))
    if not places:
        return None
    build_id = str(attributes["build_id"]) if "build_id" in attributes else None
    program = str(attributes.get("exe") or attributes.get("comm") or "")
    known = _Known(program, build_id, attributes.get("signal"), str(attributes.get("machine", "")))
    return _make(known, places, is_deep=is_deep)


def fingerprint(
    read: Callable[[int], bytes], *, most_bytes: int = MOST_BYTES, seconds: float = SECONDS
) -> Fingerprint | None:
    """Compute the fingerprint of a core; return None if the data is not a core or has no thread notes.

    Args:
        read: `read(n)` returns up to n of the next bytes of the uncompressed core, and none at its end. Its
            errors pass through.
        most_bytes: limit of the bytes read.
        seconds: limit of the time spent.
    """
    return _of_core(Forward(read, most_bytes, seconds))


def fingerprint_of_file(
    descriptor: int, *, most_bytes: int = MOST_BYTES, seconds: float = SECONDS
) -> Fingerprint | None:
    """Compute the fingerprint of a dump on disk, gzip or raw. An OSError while reading it passes through."""
    if not sources.is_gzip(descriptor):
        return _of_core(Seekable(descriptor, seconds))
    pieces = inflate_until_damage(_read(descriptor, time.monotonic() + seconds), PIECE_BYTES)
    return _of_core(Forward.over(pieces, most_bytes, seconds))


def _make(known: _Known, places: list[Place], *, is_deep: bool) -> Fingerprint:
    program = (known.build_id or known.program).removesuffix(DELETED).rpartition("/")[2]
    own = own_places(places, is_deep=is_deep)
    text = "\n".join([f"version {VERSION}", program, str(known.signal), *own])
    words = [place.text() for place in places] + [RECURSION] * is_deep
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Fingerprint(identity, known.build_id, " ".join(words), known.machine)


class _CoreProcess(Process):
    """The process of a core: headers, notes and some of its memory."""

    def __init__(self, core: Core, read: Callable[[int, int], bytes]) -> None:
        mappings = [
            Mapping(file.start, file.end, file.offset_bytes, file.path.rpartition("/")[2])
            for file in core.files
        ]
        super().__init__(MACHINES[core.form.bits, core.layout.header.machine], mappings)
        self.is_code = core.is_code  # type: ignore[method-assign]
        self._read = read

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, as far as the core contains it."""
        return self._read(address, size)


def _of_core(source: Forward) -> Fingerprint | None:
    try:
        core = read_core(source)
    except NotACoreError:
        return None
    if not core.threads:
        return None
    crashed = core.threads[0]
    build_ids, memory = read_build_ids(core, source, [(crashed.sp, STACK_BYTES)])

    def read(address: int, size: int) -> bytes:
        if isinstance(source, Seekable):
            return read_memory(core, source, address, size)
        stack, at = memory.get(crashed.sp, b""), address - crashed.sp
        return stack[at : at + size] if at >= 0 else b""

    executable = core.executable() or ""
    signal = core.signal if core.signal is not None else crashed.signal
    known = _Known(executable or core.comm or "", build_ids.get(executable), signal, core.machine)
    return _make(known, _places(core, read), is_deep=False)


def _places(core: Core, read: Callable[[int, int], bytes]) -> list[Place]:
    crashed = core.threads[0]
    machine = MACHINES.get((core.form.bits, core.layout.header.machine))
    if machine is None or core.form.order != "<":
        return []
    registers = {machine.pc: crashed.pc, machine.sp: crashed.sp, machine.fp: crashed.fp}
    places, is_deep = find_places(_CoreProcess(core, read), registers, has_files=False)
    return choose(places, is_deep=is_deep)


def _read(descriptor: int, until: float) -> Iterator[bytes]:
    """Yield the file in blocks until a deadline, which also holds for blocks that decompress to nothing."""
    at = 0
    while time.monotonic() < until and (block := os.pread(descriptor, BLOCK_BYTES, at)):
        at += len(block)
        yield block

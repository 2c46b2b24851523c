"""Owns the fingerprint of a crash: equal for the same bug, whatever the node, the pid or the address layout.

It hashes the executable's build ID (its name if it has none), the signal, and the places of the crashing thread: file
and offset of the program counter and of the callers found on its stack. Callers come from the chain of frame pointers
if there is one, else from stack words that point into code. A core holds neither code nor unwind tables, so the places
are evidence for grouping, not a backtrace.

`fingerprint_of_file(descriptor)` reads a dump on disk, gzip or raw, and leaves the descriptor's position unchanged;
`fingerprint(read)` reads any uncompressed core from its start. Both read forward only and stop at `most_bytes` and
`seconds` (a raw core on disk is read only where it matters); no content of a core makes them raise.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from core_dump_collector.s3 import parts
from core_dump_format.core import read_build_ids, read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.stream import Forward, Seekable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dump_format.core import Core, Thread

MOST_BYTES = 256 * 1024 * 1024
SECONDS = 2.0
FRAMES = 5
STACK_BYTES = 16 * 1024
BLOCK_BYTES = 64 * 1024
PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What distinguishes one crash from another."""

    id: str
    """16 hexadecimal digits."""
    build_id: str | None
    """Build ID of the executable."""
    frames: tuple[str, ...]
    """`file+0xoffset`, the crashing program counter first."""
    machine: str
    """Architecture of the core, such as `x86-64`."""

    def fields(self) -> dict[str, str]:
        """Return the fields of the metadata object."""
        fields = {"fingerprint": self.id, "frames": " ".join(self.frames), "machine": self.machine}
        return fields | ({"build_id": self.build_id} if self.build_id else {})


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
    if not parts.is_gzip(descriptor):
        return _of_core(Seekable(descriptor, seconds))
    pieces = inflate_until_damage(_read(descriptor, time.monotonic() + seconds), PIECE_BYTES)
    return _of_core(Forward.over(pieces, most_bytes, seconds))


def _of_core(source: Forward) -> Fingerprint | None:
    try:
        core = read_core(source)
    except NotACoreError:
        return None
    if not core.threads:
        return None
    crashed = core.threads[0]
    stack_at = (crashed.sp, STACK_BYTES)
    build_ids, memory = read_build_ids(core, source, [stack_at])
    frames = tuple(_frames(core, crashed, memory.get(crashed.sp, b"")))
    executable = core.executable()
    build_id = build_ids.get(executable) if executable else None
    program = build_id or (executable or core.comm or "").rpartition("/")[2]
    signal = core.signal if core.signal is not None else crashed.signal
    text = "\n".join([program, str(signal), *frames])
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest()[:16], build_id, frames, core.machine)


def _read(descriptor: int, until: float) -> Iterator[bytes]:
    """Yield the file in blocks until a deadline, which also holds for blocks that decompress to nothing."""
    at = 0
    while time.monotonic() < until and (block := os.pread(descriptor, BLOCK_BYTES, at)):
        at += len(block)
        yield block


def _frames(core: Core, thread: Thread, stack: bytes) -> Iterator[str]:
    yield _place(core, thread.pc)
    callers = _chain(core, thread, stack) or _scan(core, stack)
    for address in callers[: FRAMES - 1]:
        yield _place(core, address)


def _place(core: Core, address: int) -> str:
    """Name an address in a way that does not depend on where the kernel put the file."""
    file = core.file_at(address)
    if file is None:
        return "?"
    name = file.path.rpartition("/")[2].replace(" ", "_")[:64]
    return f"{name}+{address - file.start + file.offset_bytes:#x}"


def _chain(core: Core, thread: Thread, stack: bytes) -> list[int]:
    """Follow saved frame pointers: each points to the next one, followed by the return address."""
    found: list[int] = []
    at, word = thread.fp, core.form.word_bytes
    while len(found) < FRAMES and thread.sp <= at <= thread.sp + len(stack) - 2 * word and at % word == 0:
        following, address = core.form.words(stack, at - thread.sp, 2)
        if not _in_file_code(core, address):
            break
        found.append(address)
        if following <= at:
            break
        at = following
    return found


def _scan(core: Core, stack: bytes) -> list[int]:
    """Return the first words of a stack that point into the code of a mapped file."""
    words = core.form.words(stack, 0, len(stack) // core.form.word_bytes)
    return list(islice((word for word in words if _in_file_code(core, word)), FRAMES))


def _in_file_code(core: Core, address: int) -> bool:
    return core.file_at(address) is not None and core.is_code(address)

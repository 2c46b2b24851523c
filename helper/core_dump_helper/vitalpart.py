"""Owns putting the vital part of a large core first (docs/contracts.md). A small core never gets here.

Whatever fails here costs the order, never the dump: the caller then passes on the core as the kernel writes it.
"""

from __future__ import annotations

import os
import time
from _queue import Empty, SimpleQueue
from _thread import start_new_thread

from core_dump_format.front import UnsupportedError, front_bytes, read_front
from core_dump_format.reorder import Reordered
from core_dump_format.state import ProcessState
from core_dump_format.vital import PF_X, POINTING_BYTES, AbandonedError, Selection, is_known
from core_dump_helper.memory import open_memory
from core_dump_helper.system import CHUNK, log

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_format.front import Front
    from core_dump_helper.crash import Crash

    Origin = tuple[Front, ProcessState, list[tuple[int, bytes]]]

PREPARE_SECONDS = 3
"""Reading memory may wait for a file server or for a swap device; the process is held for no longer than this."""

FIRST_CHUNK = 4 << 10
POINTING_PIECES = 3
"""Of the vital part: the stacks of the crashing thread come first."""
MAX_KEPT_BYTES = 8 << 20
"""Of memory, until the process is released."""
MAX_FRONT_BYTES = 16 << 20
"""Of headers and notes. The first CHUNK is always allowed, because it was read already."""
FRONT_FACTOR = 6
"""Bytes of memory that a byte of headers and notes takes."""


class VitalPart:
    """The new front of a dump, and what of the kernel's stream follows it."""

    def __init__(self, order: Reordered, pieces: list[memoryview], state: str, origin: Origin) -> None:
        """Store what `prepare` found; `state` is `whole` or `partial`."""
        self.length, self.end, self.state = order.length, order.vital_end, state
        self.pieces, self.runs = pieces, order.runs()
        self.origin = origin
        """Front, state and memory of the process, from which its frames are computed."""

    def code_spans(self) -> list[tuple[int, int]]:
        """Return start and end of executable memory, first of that to which the newest frames point."""
        front, state, memory = self.origin
        layout, step = front.layout, front.layout.words
        pointers = list(state.threads[0].registers) if state.threads else []
        for _, content in memory[:POINTING_PIECES]:
            pointers += layout.cast(content[:POINTING_BYTES]).tolist()
        code = [index for index, flag in enumerate(front.flags) if flag & PF_X and index]
        order = dict.fromkeys([*map(front.at, pointers), *code])
        sizes = layout.cast(front.table)[5::step]
        return [
            (front.addresses[index], front.addresses[index] + sizes[index])
            for index in order
            if front.flags[index] & PF_X
        ]

    def cut(self, limit: int) -> int:
        """Cut the pieces to `limit` bytes in all; return how many bytes they are now."""
        if self.end > limit:
            self.state = "partial"
        left = limit
        for number, piece in enumerate(self.pieces):
            self.pieces[number] = piece[:left]
            left -= len(self.pieces[number])
        return limit - left


def prepare(
    head: bytearray, read: Callable[[int], bool], crash: Crash, limit: int, share: int
) -> VitalPart | None:
    """Return the front of the reordered dump, or None if its order cannot be changed.

    Args:
        head: the bytes read so far, from the first one on.
        read: appends up to so many bytes to `head`; returns False at the end of the core or a deadline.
        crash: the crash.
        limit: bytes of memory that the vital part may hold.
        share: bytes of memory that this process may use for headers and notes.
    """
    started = time.monotonic()
    try:
        front = _read_front(head, read, max(CHUNK, min(MAX_FRONT_BYTES, share // FRONT_FACTOR)))
        if front is None or not is_known(front):
            return None
        process = ProcessState(front)
        selection = _select(front, process, crash, limit)
        pieces = list(selection.pieces)
        if not pieces:
            raise UnsupportedError("none of its memory could be read")
        order = Reordered(front, pieces, selection.memory.page)
        state = "whole" if selection.is_whole and len(pieces) == len(selection.pieces) else "partial"
        vital = VitalPart(order, _chunks(order.head, pieces), state, (front, process, _keep(pieces)))
        took_ms = (time.monotonic() - started) * 1000
        log("%s: vital part of %d bytes, %s, prepared in %.1f ms" % (crash, vital.end, state, took_ms), 6)
        return vital
    except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
        log("%s: its vital part does not come first: %s: %s" % (crash, type(error).__name__, error))
        return None


def _read_front(head: bytearray, read: Callable[[int], bool], limit: int) -> Front | None:
    """Read header, program headers and notes; return None if the core ends before.

    Raises:
        UnsupportedError: they have more than `limit` bytes.
    """
    needed = front_bytes(head)
    while needed > len(head):
        if needed > limit:
            raise UnsupportedError("%d bytes of headers and notes, %d allowed" % (needed, limit))
        if not read(needed - len(head)):
            return None
        needed = max(needed, front_bytes(head))
    return read_front(head)


def _select(front: Front, state: ProcessState, crash: Crash, limit: int) -> Selection:
    """Copy the vital memory in a thread of its own; return what it has after PREPARE_SECONDS at the latest."""
    selection = Selection(front, open_memory(crash, state.raw_auxv), limit)
    done: SimpleQueue[str] = SimpleQueue()
    start_new_thread(_run, (selection, state, done))
    try:
        failure = done.get(True, PREPARE_SECONDS)
    except Empty:
        failure = "reading its memory took longer than %d s" % PREPARE_SECONDS
    selection.is_abandoned = True
    if not failure and selection.memory.refused:
        failure = "%d pages belong to a file system that may never answer" % selection.memory.refused
    if failure:
        log("%s: its vital part is not whole: %s" % (crash, failure))
    return selection


def _run(selection: Selection, state: ProcessState, done: SimpleQueue[str]) -> None:
    try:
        selection.run(state)
        done.put("")
    except AbandonedError:
        pass
    except Exception as error:  # noqa: BLE001 - whatever was copied is of use
        done.put("%s: %s" % (type(error).__name__, error))


def _keep(pieces: list[tuple[int, int, bytes]]) -> list[tuple[int, bytes]]:
    """Return address and content of the memory that may hold frames, at most MAX_KEPT_BYTES of it."""
    kept, left = [], MAX_KEPT_BYTES
    for _, address, content in pieces:
        if len(content) <= left:
            kept.append((address, content))
            left -= len(content)
    return kept


def _chunks(head: bytes, pieces: list[tuple[int, int, bytes]]) -> list[memoryview]:
    """Return head and memory in chunks, because the compressor flushes after each, and a full disk costs a whole one.

    The first chunk of memory holds the newest frames of the crashing thread; each is four times as long as the last.
    """
    view = memoryview(head)
    chunks = [view[start : start + CHUNK] for start in range(0, len(head), CHUNK)]
    pending: list[memoryview] = []
    length = room = FIRST_CHUNK
    for _, _, content in pieces:
        rest = memoryview(content)
        while rest:
            pending.append(rest[:room])
            room -= len(pending[-1])
            rest = rest[len(pending[-1]) :]
            if not room:
                chunks.append(memoryview(b"".join(pending)))
                length = room = min(CHUNK, 4 * length)
                pending = []
    return chunks + ([memoryview(b"".join(pending))] if pending else [])


def file_crc32(descriptor: int, size: int) -> int:
    """Return the CRC-32 of the first `size` bytes of a file."""
    from zlib import crc32

    crc = at = 0
    while at < size:
        block = os.pread(descriptor, min(CHUNK, size - at), at)
        if not block:
            raise EOFError("the dump is shorter than what was written")
        crc = crc32(block, crc)
        at += len(block)
    return crc

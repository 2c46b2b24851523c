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
from core_dump_format.vital import PF_X, AbandonedError, Selection, is_known
from core_dump_helper.memory import open_memory
from core_dump_helper.system import CHUNK, log

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from core_dump_format.front import Front
    from core_dump_format.nearby import Nearby
    from core_dump_format.trim import Trimmed
    from core_dump_helper.crash import Crash
    from core_dump_helper.keep import Keep, Trim

    Origin = tuple[Front, ProcessState, list[tuple[int, bytes]]]

PREPARE_SECONDS = 3
"""Reading memory may wait for a file server or for a swap device; the process is held for no longer than this."""

FIRST_CHUNK = 4 << 10
POINTING_PIECES = 3
"""Of the vital part: the stacks of the crashing thread come first."""
NEWEST_BYTES = 4 << 10
"""Of a stack, in which words point to the code that is needed first."""
MAX_KEPT_BYTES = 8 << 20
"""Of memory, until the process is released."""
MAX_FRONT_BYTES = 16 << 20
"""Of headers and notes. The first CHUNK is always allowed, because it was read already."""
FRONT_FACTOR = 6
"""Bytes of memory that a byte of headers and notes takes."""


class VitalPart:
    """The new front of a dump, and the rest: from the kernel's stream, or from memory if the dump is trimmed."""

    def __init__(self, order: Reordered | Trimmed, pieces: list[memoryview], state: str) -> None:
        """Store the layout, the front in chunks, and `whole`, `partial` or `none`."""
        self.length, self.end, self.state = order.length, order.vital_end, state
        self.pieces = pieces
        self.runs: list[list[int]] = []
        """[length, is kept] of successive ranges of the kernel's stream."""
        self.trimmed, self.dropped_bytes = "", 0
        """Why the dump is trimmed, and how many bytes of memory are missing."""
        self.was_killed = False
        """Whether memory may be missing in a trimmed dump because the process was killed while it was read."""
        self.rest: Iterable[memoryview] = ()
        """The memory after the front of a trimmed dump, copied into chunks once the process is released."""
        self.origin: Origin | None = None
        """Front, state and memory of the process, from which its frames are computed."""

    def code_spans(self) -> list[tuple[int, int]]:
        """Return start and end of executable memory, first of that to which the newest frames point."""
        if not self.origin:
            return []
        front, state, memory = self.origin
        layout, step = front.layout, front.layout.words
        pointers = list(state.threads[0].registers) if state.threads else []
        for _, content in memory[:POINTING_PIECES]:
            pointers += layout.cast(content[:NEWEST_BYTES]).tolist()
        code = [index for index, flag in enumerate(front.flags) if flag & PF_X and index]
        order = dict.fromkeys([*map(front.at, dict.fromkeys(pointers)), *code])
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
            self.rest = ()
        left = limit
        for number, piece in enumerate(self.pieces):
            self.pieces[number] = piece[:left]
            left -= len(self.pieces[number])
        return limit - left


def prepare(
    head: bytearray, read: Callable[[int], bool], crash: Crash, limit: int, keep: Keep
) -> VitalPart | None:
    """Return the front of the dump, or None if it has to be in the kernel's order.

    Args:
        head: the bytes read so far, from the first one on.
        read: appends up to so many bytes to `head`; returns False at the end of the core or a deadline.
        crash: the crash.
        limit: bytes of memory that the vital part may hold; 0 means that the core must not be reordered.
        keep: how much of the core is kept, and the memory that this process may use.
    """
    started = time.monotonic()
    try:
        front = _read_front(head, read, max(CHUNK, min(MAX_FRONT_BYTES, keep.memory_bytes // FRONT_FACTOR)))
        if front is None:
            return None
        trim = keep.choose(front.length)
        if trim and trim.budget_bytes:
            start_new_thread(keep.join_cgroup, ())
        if trim and not trim.has_memory:
            vital = _trim(front, trim, None)
        elif limit and is_known(front):
            vital = _prepare(front, crash, limit, trim)
        else:
            return None
        took_ms = (time.monotonic() - started) * 1000
        log(
            "%s: vital part of %d bytes, %s, prepared in %.1f ms" % (crash, vital.end, vital.state, took_ms),
            6,
        )
        if trim:
            dropped = (crash, trim.reason, vital.length, vital.dropped_bytes)
            log("%s: trimmed (%s) to %d bytes; %d bytes of memory are dropped" % dropped, 6)
        return vital
    except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
        log("%s: its vital part does not come first: %s: %s" % (crash, type(error).__name__, error))
        return None


def _prepare(front: Front, crash: Crash, limit: int, trim: Trim | None) -> VitalPart:
    """Read the memory that comes first, or all that a trimmed dump holds.

    Raises:
        UnsupportedError: none of it could be read, or the core is not laid out as expected.
    """
    if trim and trim.limit_bytes:
        limit = max(1, min(limit, trim.limit_bytes - front.data_offset))
    process = ProcessState(front)
    selected = _select(front, process, crash, limit, trim)
    if not selected.pieces:
        raise UnsupportedError("none of its memory could be read")
    if trim:
        vital = _trim(front, trim, selected)
    else:
        order = Reordered(front, selected.pieces, selected.page)
        vital = VitalPart(order, list(_chunks(order.head, selected.pieces)), "whole")
        vital.runs = order.runs()
    vital.origin = front, process, _keep(selected.pieces)
    if not selected.is_whole or vital.was_killed:
        vital.state = "partial"
    return vital


def _trim(front: Front, trim: Trim, selected: Selected | None) -> VitalPart:
    """Return a trimmed dump of what was selected, as far as it fits; of headers and notes alone if nothing was."""
    from core_dump_format.trim import Content
    from core_dump_helper.trimming import fit

    if not selected:
        order, _ = fit(front, Content([], 0, []), os.sysconf("SC_PAGESIZE"), 0)
        vital = VitalPart(order, list(_chunks(order.head, [])), "none")
    else:
        content = Content(selected.pieces, selected.vital_pieces, selected.untouched)
        order, kept = fit(front, content, selected.page, trim.limit_bytes)
        fits = kept.pieces[: kept.vital_pieces] == content.pieces[: content.vital_pieces]
        pieces = list(_chunks(order.head, kept.pieces[: kept.vital_pieces]))
        vital = VitalPart(order, pieces, "whole" if fits else "partial")
        vital.rest = _chunks(b"", kept.pieces[kept.vital_pieces :])
        vital.was_killed = selected.was_killed
    vital.trimmed, vital.dropped_bytes = trim.reason, order.dropped_bytes
    return vital


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


class Selected:
    """A selection as it was when the time for it was over."""

    def __init__(self, selection: Selection, nearby: Nearby | None) -> None:
        """Copy the selection as it is now; the thread that selects may still run."""
        self.is_whole, ended = selection.is_whole, selection.vital_pieces
        self.pieces, self.page = list(selection.pieces), selection.memory.page
        self.vital_pieces = len(self.pieces) if ended is None else ended
        self.untouched = list(nearby.untouched) if nearby else []
        self.was_killed = bool(nearby and nearby.was_killed)


def _select(front: Front, state: ProcessState, crash: Crash, limit: int, trim: Trim | None) -> Selected:
    """Copy memory in a thread of its own; return the selection after PREPARE_SECONDS at the latest."""
    selection = Selection(front, open_memory(crash, state.raw_auxv), limit)
    nearby = None
    if trim:
        from core_dump_format.nearby import Nearby

        nearby = Nearby(selection, state, trim.budget_bytes)
    done: SimpleQueue[str] = SimpleQueue()
    start_new_thread(_run, (selection, state, nearby, done))
    try:
        failure = done.get(True, PREPARE_SECONDS)
    except Empty:
        failure = "reading its memory took longer than %d s" % PREPARE_SECONDS
    selection.is_abandoned = True
    selected = Selected(selection, nearby)
    if not failure and not selected.is_whole and selection.memory.refused:
        failure = "%d pages belong to a file system that may never answer" % selection.memory.refused
    if failure:
        log("%s: its %s is not whole: %s" % (crash, "dump" if selected.is_whole else "vital part", failure))
    return selected


def _run(selection: Selection, state: ProcessState, nearby: Nearby | None, done: SimpleQueue[str]) -> None:
    try:
        selection.run(state)
        if nearby:
            nearby.run()
        done.put("")
    except AbandonedError:
        pass
    except Exception as error:  # noqa: BLE001 - the memory copied before is of use
        done.put("%s: %s" % (type(error).__name__, error))


def _keep(pieces: list[tuple[int, int, bytes]]) -> list[tuple[int, bytes]]:
    """Return address and content of the memory that may hold frames, at most MAX_KEPT_BYTES of it."""
    kept, left = [], MAX_KEPT_BYTES
    for _, address, content in pieces:
        if len(content) <= left:
            kept.append((address, content))
            left -= len(content)
    return kept


def _chunks(head: bytes, pieces: list[tuple[int, int, bytes]]) -> Iterator[memoryview]:
    """Yield head and memory in chunks, because the compressor flushes after each, and a full disk costs a whole one.

    The first chunk of memory holds the newest frames of the crashing thread; each is four times as long as the last.
    """
    view = memoryview(head)
    for start in range(0, len(head), CHUNK):
        yield view[start : start + CHUNK]
    pending: list[memoryview] = []
    length = room = FIRST_CHUNK
    for _, _, content in pieces:
        rest = memoryview(content)
        while rest:
            pending.append(rest[:room])
            room -= len(pending[-1])
            rest = rest[len(pending[-1]) :]
            if not room:
                yield memoryview(b"".join(pending))
                length = room = min(CHUNK, 4 * length)
                pending = []
    if pending:
        yield memoryview(b"".join(pending))


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

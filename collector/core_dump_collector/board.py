"""Owns the memory that the daemon and its workers share: progress of the jobs, bytes and requests sent, allowances.

Each number has one writer and is read and written as one aligned word. So nothing is locked, and a worker that dies or
is stopped at any point holds up nobody. The memory is anonymous (memfd_create(2)), or that of a deleted file; workers
get its descriptor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from multiprocessing.reduction import DupFd
from typing import Any

LIGHT_JOBS = 8
"""Small dumps that one worker has in hand at the same time; they wait for the network and not for the CPU."""
HEAVY = LIGHT_JOBS
"""The place of the one job of a worker that may be large."""
PRIVATE_CONNECTIONS = 8
"""Connections of a process that is not one of the workers."""
_WORDS = 32
"""Of each seat."""
_FIRST_BEAT = 16


class _Word:
    """One number of a seat: an unsigned integer of 64 bits."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, seat: Seat, _: object) -> int:
        return int(seat.integers[self._index])

    def __set__(self, seat: Seat, value: int) -> None:
        seat.integers[self._index] = value


class Seat:
    """One worker's part of the board."""

    moved_bytes = _Word(0)
    """Written by the worker: bytes that the store has acknowledged or sent."""
    requests = _Word(1)
    """Written by the worker: requests that have ended."""
    active = _Word(2)
    """Written by the worker: connections in use."""
    waiting = _Word(3)
    """Written by the worker: threads that wait until they may use one."""
    setbacks = _Word(4)
    """Written by the worker: requests that were throttled or timed out."""
    connections = _Word(8)
    """Written by the daemon: how many connections may be in use."""
    bytes_per_second = _Word(9)
    """Written by the daemon: how fast the worker may send; 0 for as fast as it can."""
    buffers = _Word(10)
    """Written by the daemon: buffers of one part each that a compressed stream may fill at the same time."""
    small_parts = _Word(11)
    """Written by the daemon: 1 if new multipart uploads are to have small parts."""

    sharers = _Word(12)
    """Written by the daemon: how many connections share the link."""

    def __init__(self, memory: memoryview) -> None:
        """Take memory of `SEAT_BYTES` bytes."""
        self.integers = memory.cast("Q")
        self._beats = memory.cast("d")

    @classmethod
    def private(cls, bytes_per_second: int = 0) -> Seat:
        """Return a seat that nobody shares: for a process that is not one of the workers."""
        seat = cls(memoryview(bytearray(SEAT_BYTES)))
        seat.connections = PRIVATE_CONNECTIONS
        seat.bytes_per_second = bytes_per_second
        return seat

    def clear(self) -> None:
        """Clear the numbers of an earlier worker."""
        for index in range(_WORDS):
            self.integers[index] = 0

    def beat(self, place: int) -> None:
        """Note that a job makes progress."""
        self._beats[_FIRST_BEAT + place] = time.monotonic()

    def beaten_at(self, place: int) -> float:
        """Return when a job last made progress, in monotonic seconds."""
        return float(self._beats[_FIRST_BEAT + place])


SEAT_BYTES = 8 * _WORDS


class Board:
    """The seats of all workers; given to a process that starts, it is the same memory there."""

    def __init__(self, seats: int) -> None:
        """Make the memory.

        Raises:
            OSError: there is none.
        """
        try:
            fd = os.memfd_create("core-dump-collector", os.MFD_CLOEXEC)
        except OSError:  # a sandbox that does not know the call
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, seats * SEAT_BYTES)
        self._open(fd)

    def _open(self, fd: int) -> None:
        self._fd = fd
        self._memory = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))

    def seat(self, index: int) -> Seat:
        """Return one worker's part."""
        return Seat(self._memory[index * SEAT_BYTES : (index + 1) * SEAT_BYTES])

    def close(self) -> None:
        """Close the descriptor; the memory lives as long as somebody uses it."""
        os.close(self._fd)

    def __getstate__(self) -> Any:  # noqa: ANN401  multiprocessing's form of a descriptor
        """Give the descriptor to the process that starts."""
        return DupFd(self._fd)

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        """Take the descriptor in the process that starts."""
        self._open(state.detach())

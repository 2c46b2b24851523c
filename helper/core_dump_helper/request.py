"""Owns the kernel's request for a receiver, and our answer to it: struct coredump_req in linux/coredump.h.

A pattern that begins with `@@` lets the kernel ask first, and send the core once it has the answer. With `@` it sends
the core at once.
"""

from __future__ import annotations

import select
import time
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
from _struct import calcsize, pack, unpack

from core_dump_helper.system import Refused

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from _socket import socket

REQUEST, ACK, MARK = "=IIQ", "=IIQ", "=I"
"""Size, size of the largest answer, features; size, spare, features; the kernel's verdict."""
KERNEL, WAIT = 1, 8
"""Features: the kernel sends the core; it holds the process until the connection is closed."""
ACCEPTED = 0
MAX_REQUEST_BYTES = 4096
"""Later kernels may send more than this one."""
ELF_MAGIC = b"\x7fELF"
SECONDS = 10
"""The kernel sends its request before the connection is accepted, and its verdict at once."""


def ask_for_core(connection: socket) -> None:
    """Answer the kernel's request, so that the core comes next; raises Refused, OSError."""
    stream = Stream(connection)
    if stream.peek(len(ELF_MAGIC)) == ELF_MAGIC:  # the pattern has one @
        return
    size, ack_bytes, features = unpack(REQUEST, stream.read(calcsize(REQUEST)))
    if not calcsize(REQUEST) <= size <= MAX_REQUEST_BYTES or ack_bytes < calcsize(ACK):
        raise Refused("", "the kernel's request has %d bytes and takes %d" % (size, ack_bytes))
    if not features & KERNEL:
        raise Refused("", "the kernel's request offers no core: %#x" % features)
    stream.read(size - calcsize(REQUEST))
    connection.send(pack(ACK, calcsize(ACK), 0, KERNEL | features & WAIT), MSG_DONTWAIT | MSG_NOSIGNAL)
    (mark,) = unpack(MARK, stream.read(calcsize(MARK)))
    if mark != ACCEPTED:
        raise Refused("", "the kernel rejects the answer to its request: %d" % mark)


class Stream:
    """Reads a connection until a deadline."""

    def __init__(self, connection: socket) -> None:
        """Start the time."""
        self._connection = connection
        self._end = time.monotonic() + SECONDS
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def peek(self, size: int) -> bytes:
        """Return the first bytes that arrive, at most `size`, without consuming them."""
        return self._receive(size, MSG_PEEK)

    def read(self, size: int) -> bytes:
        """Return the next bytes, all of them."""
        found = b""
        while len(found) < size:
            found += self._receive(size - len(found))
        return found

    def _receive(self, size: int, flags: int = 0) -> bytes:
        """Return at least one byte; raises Refused if none comes, OSError."""
        if not self._poll.poll(max(0, self._end - time.monotonic()) * 1000):
            raise Refused("", "the kernel sent nothing within %d s" % SECONDS)
        part = self._connection.recv(size, flags | MSG_DONTWAIT)
        if not part:
            raise Refused("", "the process was killed before its core began")
        return part

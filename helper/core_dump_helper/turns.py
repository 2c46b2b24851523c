"""Owns whose turn it is: which of the connections that wait gets a child, as `slots` shares out the pipe's helpers.

A child is a process, so connections wait in the listener instead: two descriptors each. The child still takes its slot
as every helper does, because another listener, or the pipe, may hold some.
"""

from __future__ import annotations

from core_dump_helper.limits import SLOT_SECONDS, VITAL_SLOTS

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Iterator

    from core_dump_helper.peer import Peer

NORMAL, LATE = "normal", "late"
"""Kinds of children: late ones exist for crashes that got no slot in SLOT_SECONDS and may keep their vital part."""
ENDING = 2
"""Times as many children may exist as may dump: those that have let go of their slot wait for the disk."""


class Waiting:
    """A connection whose crash has no child yet."""

    def __init__(self, connection: socket, peer: Peer, origin: bytes, since: float) -> None:
        """Store the connection, who is behind it, who pays for it, and since when it waits (monotonic)."""
        self.connection, self.peer, self.origin, self.since = connection, peer, origin, since

    def close(self) -> None:
        """Close the descriptors."""
        self.connection.close()
        self.peer.close()


class Child:
    """A process that dumps one crash."""

    def __init__(self, origin: bytes, kind: str) -> None:
        """Store who pays for the crash, and NORMAL or LATE."""
        self.origin, self.kind = origin, kind
        self.holds_slot = True


class Turns:
    """The connections that wait and the children that run, by the descriptor that tells of their end."""

    def __init__(self) -> None:
        """Start without any."""
        self.waiting: list[Waiting] = []
        self.children: dict[int, Child] = {}
        self.limits = {NORMAL: 0, LATE: 0}
        """How many children of each kind may dump at one time."""
        self.deadline_seconds = 0

    def set_limits(self, most: int, deadline_seconds: int, *, has_vital: bool) -> None:
        """Store how many children may dump, after which time a crash is refused, and whether vital parts are kept."""
        self.limits = {NORMAL: most, LATE: VITAL_SLOTS if has_vital else 0}
        self.deadline_seconds = deadline_seconds

    def ready(self, now: float) -> Iterator[tuple[Waiting, Child]]:
        """Yield connections whose turn it is, and their children, the oldest first; they no longer wait."""
        for waiting in list(self.waiting):
            if len(self.children) >= ENDING * sum(self.limits.values()):
                return
            kind = self._kind(waiting, now)
            if kind:
                self.waiting.remove(waiting)
                yield waiting, Child(waiting.origin, kind)

    def _kind(self, waiting: Waiting, now: float) -> str:
        """Return the kind of child that a connection gets now, or an empty string."""
        if self._has_turn(waiting.origin, NORMAL):
            return NORMAL
        age = now - waiting.since
        if age >= self.deadline_seconds or (age >= SLOT_SECONDS and self._has_turn(waiting.origin, LATE)):
            return LATE  # beyond the deadline it ends at once, and is counted
        return ""

    def _has_turn(self, origin: bytes, kind: str) -> bool:
        """Return whether an origin has fewer children of a kind than are free."""
        holders = [
            child.origin for child in self.children.values() if child.kind == kind and child.holds_slot
        ]
        return holders.count(origin) < self.limits[kind] - len(holders)

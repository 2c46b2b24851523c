"""Owns turns: chooses the waiting connections that get a child, as `slots` shares out the pipe's helpers.

A child is a process, so connections wait in the listener instead: two descriptors each. A child has its turn until the
crashed process is released, which is soon for a small core. It still takes its slot as every helper does.
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


class Waiting:
    """A connection whose crash has no child yet."""

    def __init__(self, connection: socket, peer: Peer, origin: bytes, since: float) -> None:
        """Store the connection, its peer, the origin of the crash, and the beginning of the wait (monotonic)."""
        self.connection, self.peer, self.origin, self.since = connection, peer, origin, since

    def close(self) -> None:
        """Close the descriptors."""
        self.connection.close()
        self.peer.close()


class Child:
    """A process that dumps one crash."""

    def __init__(self, origin: bytes, kind: str) -> None:
        """Store the origin of the crash, and NORMAL or LATE."""
        self.origin, self.kind = origin, kind
        self.has_turn = True
        """Whether the crashed process waits for it."""


class Turns:
    """The connections that wait, and the running children by the descriptor that shows their end."""

    def __init__(self) -> None:
        """Start without any."""
        self.waiting: list[Waiting] = []
        self.children: dict[int, Child] = {}
        self.limits = {NORMAL: 0, LATE: 0}
        """How many children of each kind may have their turn at one time."""
        self.most, self.deadline_seconds = 0, 0

    def set_limits(self, turns: int, most: int, deadline_seconds: int, *, has_vital: bool) -> None:
        """Store how many children may have their turn, how many may exist, and when a crash is refused.

        `has_vital` says that vital parts are kept of crashes that wait for long.
        """
        self.limits = {NORMAL: turns, LATE: VITAL_SLOTS if has_vital else 0}
        self.most, self.deadline_seconds = max(most, sum(self.limits.values())), deadline_seconds

    def add(self, waiting: Waiting, room: int) -> None:
        """Let a connection wait; beyond its origin's share of the `room` for connections, its crash is refused soon.

        An origin may have as many as it leaves free.
        """
        own = sum(other.origin == waiting.origin for other in self.waiting)
        if own >= room - len(self.waiting):
            waiting.since -= self.deadline_seconds
        self.waiting.append(waiting)

    def ready(self, now: float) -> Iterator[tuple[Waiting, Child]]:
        """Yield connections whose turn it is, and their children, the oldest first; they no longer wait."""
        full: set[tuple[bytes, str]] = set()
        for waiting in list(self.waiting):
            if len(self.children) >= self.most:
                return
            kind = self._kind(waiting, now, full)
            if kind:
                self.waiting.remove(waiting)
                yield waiting, Child(waiting.origin, kind)

    def _kind(self, waiting: Waiting, now: float, full: set[tuple[bytes, str]]) -> str:
        """Return the kind of child that a connection gets now, or an empty string.

        `full` collects origins and kinds without a turn: a storm has many connections of one origin.
        """
        age = now - waiting.since
        for kind in (NORMAL, LATE) if age >= SLOT_SECONDS else (NORMAL,):
            turn = waiting.origin, kind
            if turn not in full:
                if self._has_turn(*turn):
                    return kind
                full.add(turn)
        return LATE if age >= self.deadline_seconds else ""  # it ends at once, and is counted

    def _has_turn(self, origin: bytes, kind: str) -> bool:
        """Return whether an origin has fewer children of a kind than are free, and fewer than are free of all."""
        children = self.children.values()
        own = sum(child.origin == origin for child in children)
        holders = [child.origin for child in children if child.kind == kind and child.has_turn]
        has_room = own < self.most - len(children) or kind == LATE
        return has_room and holders.count(origin) < self.limits[kind] - len(holders)

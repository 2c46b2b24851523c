"""Owns the turns of the waiting files: lanes, owners, small and large files. Pure, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter

OTHERS_TURN = 4
"""Every so many turns, the files go first that could otherwise wait for ever."""


class Lane(IntEnum):
    """Where an entry waits, in the order in which the lanes of an owner are served."""

    NEW = 0
    OLD = 1
    AGAIN = 2
    """A failed file whose pause is over."""
    PAUSED = 3
    IN_FLIGHT = 4


READY = (Lane.NEW, Lane.OLD, Lane.AGAIN)
UNTRIED = (Lane.NEW, Lane.OLD)
TRIED = (Lane.PAUSED, Lane.AGAIN)


@dataclass(slots=True)
class Owner:
    """The waiting names of one owner, either small or large ones, by lane; oldest first, with their arrivals."""

    lanes: tuple[OrderedDict[str, int], ...] = field(
        default_factory=lambda: tuple(OrderedDict() for _ in Lane)
    )
    turns: int = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(map(len, self.lanes))

    @property
    def is_ready(self) -> bool:
        """Tell whether a name is due."""
        return any(self.lanes[lane] for lane in READY)

    def take(self) -> str:
        """Return the name whose turn it is: of the first lane, or at times the one that waits longest."""
        self.turns += 1
        heads = [next(iter(self.lanes[lane].items())) for lane in READY if self.lanes[lane]]
        return (heads[0] if self.turns % OTHERS_TURN else min(heads, key=itemgetter(1)))[0]


@dataclass(slots=True)
class SizeClass:
    """The small files, or the large ones."""

    owners: dict[int, Owner] = field(default_factory=dict)
    ready: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Owners with a name that is due, next turn first."""

    def add(self, key: int, lane: Lane, name: str, number: int) -> None:
        """Add a name of an owner, with the number of its arrival."""
        self.owners.setdefault(key, Owner()).lanes[lane][name] = number
        self._note(key)

    def remove(self, key: int, lane: Lane, name: str) -> None:
        """Remove a name."""
        del self.owners[key].lanes[lane][name]
        self._note(key)

    def names(self, key: int, lane: Lane) -> OrderedDict[str, int]:
        """Return an owner's names in a lane."""
        owner = self.owners.get(key)
        return owner.lanes[lane] if owner else OrderedDict()

    def _note(self, key: int) -> None:
        owner = self.owners[key]
        if owner.is_ready:
            self.ready.setdefault(key, None)
        else:
            self.ready.pop(key, None)
        if not owner:
            del self.owners[key]

    def take(self) -> str:
        """Return the name whose turn it is; there is one."""
        key, _ = self.ready.popitem(last=False)
        return self.owners[key].take()

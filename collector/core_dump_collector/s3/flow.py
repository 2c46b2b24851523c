"""Owns the number of requests that a worker makes at once, and their rate: both follow the daemon's allowance.

A request holds a permit. The daemon raises and lowers the number of permits while requests are under way; those that
have one keep it. A thread that sends a part takes its permit before it reads the part, so that only parts that are
being sent need the page cache. Parts of a large dump leave half of the permits to small dumps that wait. Threads report
the progress of their job here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from core_dump_collector.board import HEAVY, Seat
from core_dump_collector.options import UNPROVEN_CONNECTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOK_SECONDS = 0.05
"""While threads wait for permits, one of them checks this often how many the daemon allows."""
LONGEST_WAIT_SECONDS = 0.5
"""Every waiting thread reports progress this often, and checks whether its request is still wanted."""
LONGEST_TURN_SECONDS = 5.0
"""Longest time that a request waits for one that goes alone."""
SLICE_SECONDS = 0.25
"""Bytes are sent in slices of at most so long where a rate is set."""
SLICE_BYTES = 256 * 1024
_LEAST_SLICE_BYTES = 1024

_PLACE: ContextVar[int] = ContextVar("place", default=HEAVY)
"""The place of the job that this thread works for."""


class FirstAlone:
    """Lets requests go one at a time until one has succeeded.

    The first response shows the bucket's region and the target of a redirect; all later requests then use them. No
    request waits long for that: if requests to a store that hangs went one after another, jobs would run out of time.
    """

    def __init__(self, flow: Flow) -> None:
        """Start without a success."""
        self._flow = flow
        self._lock = threading.Lock()
        self._succeeded = False

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Wait until the request may go; one that raises nothing has succeeded.

        A thread that holds a permit does not wait: the request that goes alone may wait for that permit.
        """
        is_alone = self._wait_for_turn()
        try:
            yield
            self._succeeded = True
        finally:
            if is_alone:
                self._lock.release()

    def _wait_for_turn(self) -> bool:
        """Return True once the request may go alone, False if it may go while others are under way."""
        until = time.monotonic() + LONGEST_TURN_SECONDS
        while not self._succeeded and not self._flow.has_permit and time.monotonic() < until:
            if self._lock.acquire(timeout=LOOK_SECONDS):
                return True
            self._flow.beat()
        return False


class GivenUpError(Exception):
    """The upload to which a part belongs has failed."""


class Flow:
    """The permits, the pace and the progress of one worker."""

    def __init__(self, seat: Seat | None = None) -> None:
        """Use a seat of the daemon's board; without one, nobody limits anything."""
        self._seat = seat or Seat.private()
        self._lock = threading.Condition()
        self._held = threading.local()
        self._heavy_active = self._light_waiting = 0
        self._is_watched = False
        """One waiting thread checks the number of permits; the others rely on it."""
        self._seen = self._seat.connections
        """The number that it found last."""
        self._free_at = 0.0

    @property
    def connections(self) -> int:
        """Return how many requests may be under way now."""
        return self._seat.connections

    @property
    def buffers(self) -> int:
        """Return how many buffers of one part a compressed stream may fill."""
        return self._seat.buffers

    @property
    def wants_small_parts(self) -> bool:
        """Tell whether parts should be small: the link is thin, or memory is short."""
        return bool(self._seat.small_parts)

    @property
    def share(self) -> float:
        """Return the factor for the least rate of a connection: 1, or less if more connections share the link."""
        return UNPROVEN_CONNECTIONS / max(UNPROVEN_CONNECTIONS, self._seat.sharers)

    @contextlib.contextmanager
    def job(self, place: int) -> Iterator[None]:
        """Count what this thread does, and the threads that it starts, as progress of a job."""
        token = _PLACE.set(place)
        self.beat()
        try:
            yield
        finally:
            _PLACE.reset(token)

    @property
    def place(self) -> int:
        """Return the place of the job that this thread works for."""
        return _PLACE.get()

    def beat(self, place: int | None = None) -> None:
        """Note progress of a job, of this thread's if no place is given."""
        self._seat.beat(_PLACE.get() if place is None else place)

    @property
    def has_permit(self) -> bool:
        """Tell whether this thread holds a permit."""
        return bool(getattr(self._held, "permit", False))

    @contextlib.contextmanager
    def permit(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold a permit for a request; a thread that has one takes no second.

        Raises:
            GivenUpError: nobody wants the request any more.
        """
        if self.has_permit:
            yield
            return
        self._take(given_up)
        self._held.permit = True
        try:
            yield
        finally:
            self._held.permit = False
            with self._lock:
                self._seat.active -= 1
                self._heavy_active -= self.place == HEAVY
                self._lock.notify_all()

    def _take(self, given_up: Callable[[], bool]) -> None:
        is_heavy = self.place == HEAVY
        with self._lock:
            self._seat.waiting += 1
            self._light_waiting += not is_heavy
            try:
                while not self._may_go(is_heavy=is_heavy):
                    self._wait_for_change()
                    self.beat()
                    if given_up():
                        raise GivenUpError
                self._seat.active += 1
                self._heavy_active += is_heavy
            finally:
                self._seat.waiting -= 1
                self._light_waiting -= not is_heavy
                if not self._is_watched:  # the next one looks
                    self._lock.notify()

    def _wait_for_change(self) -> None:
        """Wait until there may be a permit; the lock is held."""
        if self._is_watched:
            self._lock.wait(LONGEST_WAIT_SECONDS)
            return
        self._is_watched = True
        try:
            self._lock.wait(LOOK_SECONDS)
        finally:
            self._is_watched = False

    def _may_go(self, *, is_heavy: bool) -> bool:
        """Tell whether there is a permit; a large dump leaves half of them to small ones that wait.

        Every waiting thread has asked with the number that was found last, so all ask again when it changes.
        """
        connections = self._seat.connections
        if connections != self._seen:
            self._seen = connections
            self._lock.notify_all()
        if is_heavy and self._light_waiting and self._heavy_active >= max(1, connections // 2):
            return False
        return self._seat.active < connections

    def slices(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """Yield the data in slices, each when the rate allows it."""
        view, at = memoryview(data).cast("B"), 0
        while at < len(view):
            rate = self._seat.bytes_per_second
            size = max(_LEAST_SLICE_BYTES, min(SLICE_BYTES, int(rate * SLICE_SECONDS))) if rate else len(view)
            piece = view[at : at + size]
            if rate:
                self._wait_for(len(piece) / rate)
            self.beat()
            yield piece
            at += len(piece)

    def _wait_for(self, seconds: float) -> None:
        """Wait until bytes that take so long may be sent."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + seconds
            until = self._free_at
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self.beat()

    def note_moved(self, size: int) -> None:
        """Count bytes that the store has acknowledged or sent."""
        with self._lock:
            self._seat.moved_bytes += size

    def note_request(self, *, setback: bool) -> None:
        """Count a request that has ended; a setback is one that was throttled or timed out."""
        with self._lock:
            self._seat.requests += 1
            self._seat.setbacks += setback

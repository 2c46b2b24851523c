"""Connections grow while throughput grows with them, and fall back before anything is given up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector.allowance import TICK_SECONDS, share
from core_dump_collector.governor import FEW, FIRST, LAST_REST_SECONDS, MOST, REQUEST_BYTES, Governor, Sample


@dataclass
class Link:
    """A link that gives each connection a rate, up to one of all; new connections carry nothing at first."""

    per_connection: float
    capacity: float
    handshake_seconds: float = 0.0
    threads: int = 16
    moved: float = 0.0
    setbacks: int = 0
    memory_share: float = 0.0
    ready: list[float] = field(default_factory=list)
    """When each connection carries something."""

    def run(self, governor: Governor, seconds: float, now: float = 0.0) -> list[int]:
        """Upload without a pause; return the numbers of connections."""
        seen = []
        for _ in range(round(seconds / TICK_SECONDS)):
            active = min(governor.connections, self.threads)
            self.ready = self.ready[:active] + [now + self.handshake_seconds] * (active - len(self.ready))
            carrying = sum(at <= now for at in self.ready)
            self.moved += min(carrying * self.per_connection, self.capacity) * TICK_SECONDS
            now += TICK_SECONDS
            sample = Sample(int(self.moved), active, self.threads - active, self.setbacks, self.memory_share)
            seen.append(governor.take(sample, now))
        return seen


@pytest.mark.parametrize("handshake_seconds", [0.0, 0.1, 0.4])
def test_connections_grow_to_all_that_are_wanted_where_each_has_a_rate_of_its_own(handshake_seconds):
    link, governor = Link(8e6, 1e9, handshake_seconds), Governor()
    assert link.run(governor, 3)[-1] >= link.threads


def test_connections_stay_few_where_more_of_them_bring_nothing():
    link, governor = Link(60e6, 120e6), Governor()
    seen = link.run(governor, 60)
    assert sum(seen) / len(seen) < 1.5 * FIRST


def test_thin_link_is_left_to_one_request_at_a_time():
    link, governor = Link(40e3, 40e3), Governor()
    assert link.run(governor, 12)[-1] == 1
    assert max(link.run(governor, 300, now=12)) <= 2


def test_link_that_recovers_gets_its_connections_back():
    link, governor = Link(40e3, 40e3), Governor()
    link.run(governor, 30)
    link.per_connection, link.capacity = 8e6, 1e9
    assert link.run(governor, 120, now=30)[-1] >= link.threads


def test_throttling_halves_the_connections_and_they_come_back_slowly():
    link, governor = Link(8e6, 1e9, threads=64), Governor()
    before = link.run(governor, 10)[-1]
    assert before == MOST
    link.setbacks += 3
    after = link.run(governor, 0.1, now=10)[-1]
    assert after == before // 2
    assert link.run(governor, 2, now=10.1)[-1] <= after + 4
    link.setbacks += 1
    assert link.run(governor, 0.1, now=13)[-1] <= after // 2 + 3


@pytest.mark.parametrize(("every", "is_kept"), [(20, True), (4, False)])
def test_few_requests_that_fail_among_many_change_nothing(every, is_kept):
    """One of 20 is refused whatever is done: two connections that rest after each would store a dump a second."""
    governor, now, requests = Governor(), 0.0, 0
    for _ in range(600):
        active = min(governor.connections, 32)
        requests += 3 * active
        now += TICK_SECONDS
        work = requests * REQUEST_BYTES
        governor.take(Sample(work, active, 32 - active, requests // every, requests=requests), now)
    assert (governor.connections >= 32) == is_kept
    assert is_kept or governor.connections <= 2 * FEW


def test_short_memory_takes_connections_away_until_few_are_left_and_nothing_ever_rests():
    link, governor = Link(8e6, 1e9), Governor()
    assert link.run(governor, 3)[-1] >= 16
    link.memory_share = 0.95
    allowed = link.run(governor, 20, now=3)
    assert allowed[-1] == min(allowed) == FEW


def test_connections_do_not_grow_while_memory_is_in_use():
    link, governor = Link(8e6, 1e9, memory_share=0.75), Governor()
    assert set(link.run(governor, 20)) == {FIRST}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**12),
            st.integers(0, 200),
            st.integers(0, 200),
            st.integers(0, 9),
            st.floats(0, 2),
        ),
        max_size=200,
    ),
    st.floats(0.01, 30),
)
def test_there_is_a_connection_after_each_rest_and_never_more_than_allowed(samples, pause):
    governor, now, calm = Governor(), 0.0, Sample(0, 0, 0, 0)
    for work, active, waiting, setbacks, short in samples:
        sample = Sample(work, active, waiting, setbacks, short)
        assert 0 <= governor.take(sample, now) <= MOST
        now += pause
        calm = Sample(work, 0, 0, setbacks)
    governor.take(calm, now)
    assert governor.take(calm, now + 2 * LAST_REST_SECONDS) >= 1


def test_store_that_throttles_a_single_connection_gets_longer_and_longer_rests():
    governor, rests, setbacks, now = Governor(jitter=lambda: 1.0), [], 0, 0.0
    while len(rests) < 6:
        setbacks += 1
        began = now
        while governor.take(Sample(0, 0, 0, setbacks), now) == 0:
            now += 0.05
        if now > began:
            rests.append(round(now - began, 1))
        now += 0.1
    assert rests == sorted(rests)
    assert rests[-1] > 4 * rests[0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=64), st.integers(1, 64))
def test_shares_are_all_that_there_is_and_nobody_gets_two_before_another_has_one(wanted, most):
    shares = share(wanted, most)
    assert sum(shares) == most
    assert min(shares) >= 1 or max(shares) <= 1

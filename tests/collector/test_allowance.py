"""The allowance of each worker."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.support.uploads import options

from core_dump_collector.allowance import TURN_SECONDS, Allowance
from core_dump_collector.board import SEAT_BYTES, Seat
from core_dump_collector.budget import Budget

RATE = 100_000


@pytest.fixture
def workers():
    """Four workers that each have one job."""
    seats = [Seat(memoryview(bytearray(SEAT_BYTES))) for _ in range(4)]
    return [SimpleNamespace(index=n, seat=seat, tasks={0: None}) for n, seat in enumerate(seats)]


@pytest.fixture
def allowance():
    """An allowance of one connection."""
    made = Allowance(options(max_upload_bytes_per_second=RATE), Budget(4, 2), None)
    made._allowed = 1
    return made


def sent_by(workers):
    """Return the rate of all workers that have a connection or still use one."""
    return sum(w.seat.bytes_per_second for w in workers if w.seat.connections or w.seat.active)


def test_workers_that_finish_what_they_have_begun_keep_the_rate_together_with_the_one_whose_turn_it_is(
    workers, allowance
):
    for worker in workers[:3]:
        worker.seat.active = 1
    allowance.spread(workers, 3.5 * TURN_SECONDS)
    assert [worker.seat.connections for worker in workers] == [0, 0, 0, 1]
    assert RATE <= sent_by(workers) <= RATE + len(workers)


def test_worker_that_sends_alone_has_all_of_the_rate(workers, allowance):
    allowance.spread(workers, 0.0)
    assert sent_by(workers) == RATE


def test_dumps_and_modules_share_the_rate_while_both_are_sent(workers, allowance):
    allowance.is_shared = True
    allowance.spread(workers, 0.0)
    together = sent_by(workers) + options(max_upload_bytes_per_second=RATE).shared_bytes_per_second
    assert together == RATE

"""A worker sends as much at once, and as fast, as the daemon allows at that moment."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
from tests.support.collector import wait_until

from core_dump_collector.board import HEAVY, SEAT_BYTES, Board, Seat
from core_dump_collector.s3 import flow as flow_module
from core_dump_collector.s3 import multipart
from core_dump_collector.s3.flow import FirstAlone, Flow, GivenUpError
from core_dump_collector.s3.parts import BufferPart
from core_dump_collector.s3.verdict import Found
from core_dump_format.crc32 import encode_crc32


@pytest.fixture
def seat():
    seat = Seat(memoryview(bytearray(SEAT_BYTES)))
    seat.connections = 2
    return seat


class Holder:
    """Holds permits in several threads until the test releases them."""

    def __init__(self, seat):
        self.flow, self.release = Flow(seat), threading.Event()
        self.held = []
        """The place of each job that has got a permit, in that order."""

    def hold(self, place=HEAVY, given_up=lambda: False):
        """Take a permit unless the request is given up."""
        with contextlib.suppress(GivenUpError), self.flow.job(place), self.flow.permit(given_up):
            self.held.append(place)
            self.release.wait(60)


@pytest.fixture
def holder(seat):
    return Holder(seat)


def test_no_more_permits_are_held_than_allowed_and_the_daemon_sees_who_waits(seat, holder):
    with ThreadPoolExecutor(5) as threads:
        for _ in range(5):
            threads.submit(holder.hold)
        wait_until(lambda: (seat.active, seat.waiting) == (2, 3), 10)
        seat.connections = 4
        wait_until(lambda: (seat.active, seat.waiting) == (4, 1), 10)
        assert len(holder.held) == 4
        seat.connections = 0  # those that have one keep it
        holder.release.set()
        wait_until(lambda: (seat.active, seat.waiting) == (0, 1), 10)
        seat.connections = 1
    assert (seat.active, seat.waiting, len(holder.held)) == (0, 0, 5)


def test_large_dump_leaves_half_of_the_permits_to_small_ones_that_wait(seat, holder):
    seat.connections = 4
    with ThreadPoolExecutor(16) as threads:
        for _ in range(8):
            threads.submit(holder.hold, HEAVY)
        wait_until(lambda: holder.held == [HEAVY] * 4, 10)
        for place in range(4):
            threads.submit(holder.hold, place)
        wait_until(lambda: seat.waiting == 8, 10)
        seat.connections = 8
        wait_until(lambda: len(holder.held) == 8, 10)
        assert sorted(holder.held) == [0, 1, 2, 3, *[HEAVY] * 4]
        holder.release.set()
    assert (seat.active, seat.waiting, len(holder.held)) == (0, 0, 12)


class Store:
    """A store that answers when the test says so."""

    def __init__(self, flow):
        self.flow, self.release, self.signs_bodies = flow, threading.Event(), True

    def put_part(self, key, upload_id, part, crc32):
        self.release.wait(10)
        return Found(None, encode_crc32(crc32), '"etag"')


def test_threads_that_wait_with_parts_of_a_dump_are_as_many_as_connections(seat):
    """Each has a part in memory or about to be read; more of them would send nothing sooner."""
    store = Store(Flow(seat))
    parts = [BufferPart(n, memoryview(b"part"), last=n == 40, give_back=list) for n in range(1, 41)]
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(multipart.send_parts, store, "key", "id", iter(parts), {})
        wait_until(lambda: seat.active == 2 and seat.waiting == 2, 10)
        seat.connections = 4
        wait_until(lambda: seat.active == 4 and seat.waiting == 4, 10)
        seat.connections = 8
        wait_until(lambda: seat.active == 8 and seat.waiting == 8, 10)
        store.release.set()
        assert [part.number for part in whole.result(10).parts] == list(range(1, 41))


def test_thread_with_a_permit_needs_no_second_one(seat):
    seat.connections = 1
    flow = Flow(seat)
    with flow.permit(), flow.permit():
        assert seat.active == 1
    assert seat.active == 0


@pytest.fixture
def patient(monkeypatch):
    """Make waiting threads rely on the one that checks the number of permits."""
    monkeypatch.setattr(flow_module, "LONGEST_WAIT_SECONDS", 60)


@pytest.mark.usefixtures("patient")
def test_one_thread_looks_at_what_the_daemon_allows_and_another_follows_it(seat, holder):
    seat.connections = 0
    unwanted = threading.Event()
    with ThreadPoolExecutor(16) as threads:
        threads.submit(holder.hold, HEAVY, unwanted.is_set)  # the one that looks
        wait_until(lambda: seat.waiting == 1, 10)
        for _ in range(9):
            threads.submit(holder.hold)
        wait_until(lambda: seat.waiting == 10, 10)
        unwanted.set()
        wait_until(lambda: seat.waiting == 9, 10)
        for connections in (1, 2, 6):
            seat.connections = connections
            wait_until(lambda: seat.active == connections, 10)  # noqa: B023  it is called at once
        seat.connections = 0
        holder.release.set()
        wait_until(lambda: (seat.active, seat.waiting) == (0, 3), 10)
        seat.connections = 3
    assert (seat.active, seat.waiting) == (0, 0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("look_seconds", [0.02, 1])
def test_small_dump_gets_a_new_permit_though_a_thread_of_a_large_one_looks(
    seat, holder, monkeypatch, look_seconds
):
    """Also if the number was the same before they waited, and has fallen and risen between two looks."""
    monkeypatch.setattr(flow_module, "LOOK_SECONDS", look_seconds)
    seat.connections = 1
    with ThreadPoolExecutor(4) as threads:
        for waiting, place in enumerate((HEAVY, HEAVY, 0)):
            threads.submit(holder.hold, place)
            wait_until(lambda: seat.active + seat.waiting == waiting + 1, 10)  # noqa: B023  it is called at once
        seat.connections = 2
        wait_until(lambda: len(holder.held) == 2, 10)
        holder.release.set()
    assert holder.held == [HEAVY, 0, HEAVY]


def test_threads_that_wait_look_no_more_often_than_one(seat):
    class Counting(Seat):
        looks = 0

        @property
        def connections(self):
            Counting.looks += 1
            return 0

    counting, wanted = Counting(memoryview(bytearray(SEAT_BYTES))), threading.Event()
    flow = Flow(counting)

    def wait():
        with contextlib.suppress(GivenUpError), flow.permit(wanted.is_set):
            pass

    with ThreadPoolExecutor(16) as threads:
        for _ in range(16):
            threads.submit(wait)
        wait_until(lambda: counting.waiting == 16, 10)
        before, began = Counting.looks, time.monotonic()
        time.sleep(1)
        looks, took = Counting.looks - before, time.monotonic() - began
        wanted.set()
    assert looks < 110 * took + 16, "20 times a second each would be 320"


def test_permit_that_nobody_wants_any_more_is_not_waited_for(seat):
    seat.connections = 0
    with pytest.raises(GivenUpError), Flow(seat).permit(lambda: True):
        pass
    assert (seat.active, seat.waiting) == (0, 0)


def test_rate_is_kept_and_no_byte_is_lost(seat):
    seat.bytes_per_second = 200_000
    data, began = bytes(range(256)) * 400, time.monotonic()
    assert b"".join(Flow(seat).slices(data)) == data
    assert time.monotonic() - began > 0.9 * len(data) / 200_000


def test_threads_of_a_worker_share_its_rate(seat):
    seat.bytes_per_second = 400_000
    flow, began = Flow(seat), time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: list(flow.slices(bytes(50_000))), range(4)))
    assert time.monotonic() - began > 0.45


def test_without_a_rate_bytes_are_sent_as_they_are(seat):
    data = bytes(1_000_000)
    assert [len(piece) for piece in Flow(seat).slices(data)] == [len(data)]


def test_progress_is_that_of_the_job_whose_thread_makes_it(seat):
    flow = Flow(seat)
    with flow.job(3):
        flow.beat()
    assert seat.beaten_at(3) > time.monotonic() - 10
    assert seat.beaten_at(HEAVY) == 0


def test_requests_go_one_at_a_time_until_one_has_succeeded(seat):
    flow, running, most = Flow(seat), [], []
    first = FirstAlone(flow)

    def ask():
        with first.request():
            running.append(1)
            most.append(len(running))
            running.pop()
            raise OSError

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask) for _ in range(50)]
    assert all(future.exception() for future in asked)
    assert max(most) == 1
    with first.request(), flow.permit(), first.request():
        pass  # one that holds a permit never waits for one that may wait for the permit
    with first.request(), first.request():
        pass


def no_such_call(*_):
    raise OSError(38, "Function not implemented")


def beat_there(board):
    seat = board.seat(1)
    seat.moved_bytes = 7
    seat.beat(0)


@pytest.mark.parametrize("sandboxed", [False, True])
def test_board_is_the_same_memory_in_another_process(monkeypatch, sandboxed):
    if sandboxed:
        monkeypatch.setattr("os.memfd_create", no_such_call)
    board = Board(2)
    context = get_context("spawn")
    process = context.Process(target=beat_there, args=(board,))
    process.start()
    process.join(30)
    assert board.seat(1).moved_bytes == 7
    assert board.seat(1).beaten_at(0) > 0
    assert board.seat(0).moved_bytes == 0
    board.seat(1).clear()
    assert (board.seat(1).moved_bytes, board.seat(1).beaten_at(0)) == (0, 0)
    board.close()


def test_all_that_waited_go_side_by_side_once_one_has_succeeded(seat):
    first, together, begun, succeed = FirstAlone(Flow(seat)), threading.Barrier(8), [], threading.Event()

    def ask(wait):
        begun.append(1)
        with first.request():
            wait(10)

    with ThreadPoolExecutor(9) as threads:
        alone = threads.submit(ask, succeed.wait)
        wait_until(first._lock.locked, 10)
        others = [threads.submit(ask, together.wait) for _ in range(8)]
        wait_until(lambda: len(begun) == 9, 10)
        succeed.set()
        assert [future.exception() for future in [alone, *others]] == [None] * 9


def test_no_request_waits_long_for_one_that_hangs(seat, monkeypatch):
    monkeypatch.setattr(flow_module, "LONGEST_TURN_SECONDS", 0.1)
    first, hang, answered = FirstAlone(Flow(seat)), threading.Event(), threading.Event()

    def ask(wait):
        with first.request():
            wait()

    with ThreadPoolExecutor(2) as threads:
        threads.submit(ask, lambda: hang.wait(20))
        wait_until(first._lock.locked, 10)
        threads.submit(ask, answered.set)
        went = answered.wait(5)
        hang.set()
    assert went

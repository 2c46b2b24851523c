"""Each loss is counted once, whoever tells of it; a fault that nothing explains is one."""

import time

import pytest

from core_dump_collector.losses.explanations import MOST_KEPT
from core_dump_collector.losses.ledger import MOST_JUDGED, Kind, Ledger, Loss
from core_dump_collector.losses.messages import (
    Drop,
    Dropped,
    Fault,
    HelperCannotCount,
    HelperFailed,
    HelperRefused,
    HelperTold,
    Suppressed,
)

T = 1_790_000_000.0
GRACE = 360.0


@pytest.fixture
def ledger():
    return Ledger(GRACE)


def total(losses):
    return sum(loss.number for loss in losses)


def test_dropped_dump_is_lost_at_once_and_explains_its_fault(ledger):
    assert ledger.add(Fault(b"app", 12, 11), T) == []
    drop = Dropped(Drop.PIPE_LIMIT, b"app", 1)
    assert ledger.add(drop, T + 0.1) == [Loss(Kind.KERNEL, "pipe_limit", T + 0.1, b"app", 1)]
    assert ledger.settle(T + GRACE + 1) == []


def test_fault_that_nothing_explains_is_lost_after_the_grace(ledger):
    ledger.add(Fault(b"app", 12, 11), T)
    assert ledger.settle(T + GRACE - 1) == []
    assert ledger.settle(T + GRACE) == [Loss(Kind.NO_TRACE, "no_trace", T, b"app", 12, 11)]
    assert ledger.settle(T + 2 * GRACE) == []


@pytest.mark.parametrize(
    "told", [HelperTold(b"worker", 12, 11), HelperFailed("directory", b"worker", 12, 11)]
)
def test_line_of_the_helper_explains_the_fault_of_a_thread_even_after_a_wait_for_a_slot(ledger, told):
    ledger.add(Fault(b"worker", 15, 11), T)
    lost = ledger.add(told, T + 320)
    assert total(lost) == (1 if isinstance(told, HelperFailed) else 0)
    assert ledger.settle(T + GRACE) == []


def test_dump_explains_one_fault_however_often_it_is_seen(ledger):
    for tid in (12, 13):
        ledger.add(Fault(b"my app", tid, 11), T)
    ledger.explain_by_dump(b"my_app", int(T), 11)
    assert ledger.must_look_for_dumps(T + GRACE)
    assert [loss.pid for loss in ledger.settle(T + GRACE)] == [13]


def test_helper_line_and_dump_of_one_crash_explain_one_fault(ledger):
    ledger.add(Fault(b"app", 12, 11), T)
    ledger.add(Fault(b"app", 99, 11), T + 1)
    ledger.add(HelperTold(b"app", 12, 11), T)
    ledger.explain_by_dump(b"app", int(T), 11)
    assert [loss.pid for loss in ledger.settle(T + GRACE + 1)] == [99]


def test_the_process_that_is_named_is_explained_rather_than_its_namesake(ledger):
    ledger.add(Fault(b"app", 99, 11), T)
    ledger.add(Fault(b"app", 12, 11), T + 1)
    ledger.add(HelperTold(b"app", 12, 11), T + 1)
    assert [loss.pid for loss in ledger.settle(T + GRACE + 1)] == [99]


def test_dump_of_another_signal_time_or_name_explains_nothing(ledger):
    ledger.add(Fault(b"app", 12, 11), T)
    ledger.explain_by_dump(b"app", int(T), 6)
    ledger.explain_by_dump(b"app", int(T) + 60, 11)
    ledger.explain_by_dump(b"other", int(T), 11)
    assert total(ledger.settle(T + GRACE)) == 1


def test_recorded_refusals_explain_as_many_faults(ledger):
    for tid in range(5):
        ledger.add(Fault(b"app", tid + 1, 11), T + tid)
    ledger.explain_by_record(T, T + 5, 11, 3)
    assert total(ledger.settle(T + GRACE + 10)) == 2


def test_refusal_is_lost_only_if_the_helper_cannot_record_it(ledger):
    assert ledger.add(HelperRefused(7, "directory", b"app", 12, 11), T) == []
    ledger.add(HelperCannotCount(8), T)
    lost = ledger.add(HelperRefused(8, "directory", b"app", 13, 11), T)
    assert lost == [Loss(Kind.HELPER, "directory", T, b"app", 13, 11)]
    assert ledger.add(HelperRefused(8, "directory", b"app", 14, 11), T) == [], "another helper with that pid"


def test_suppressed_lines_are_lost_for_the_reason_of_the_line_that_follows(ledger):
    ledger.add(Dropped(Drop.PIPE_LIMIT, b"a", 1), T)
    assert ledger.add(Suppressed(15, faults=False), T + 6) == []
    lost = ledger.add(Dropped(Drop.PIPE_LIMIT, b"b", 2), T + 6)
    assert [(loss.reason, loss.number) for loss in lost] == [("pipe_limit", 15), ("pipe_limit", 1)]


def test_suppressed_lines_without_a_line_after_them_are_lost_without_a_reason(ledger):
    ledger.add(Suppressed(15, faults=False), T)
    assert [(loss.reason, loss.number) for loss in ledger.settle(T + 3)] == [("unnamed", 15)]
    assert ledger.settle(T + 10) == []


def test_fault_whose_dropped_dump_was_suppressed_is_counted_once(ledger):
    ledger.add(Dropped(Drop.PIPE_LIMIT, b"a", 1), T)
    ledger.add(Fault(b"b", 2, 11), T + 1)
    ledger.add(Suppressed(4, faults=False), T + 20)
    assert total(ledger.add(Dropped(Drop.PIPE_LIMIT, b"c", 3), T + 20)) == 5
    assert ledger.settle(T + 2 * GRACE) == []


def test_fault_counted_before_its_suppressed_line_is_told_is_counted_once(ledger):
    ledger.add(Dropped(Drop.PIPE_LIMIT, b"a", 1), T)
    ledger.add(Fault(b"b", 2, 11), T + 1)
    assert total(ledger.settle(T + GRACE + 2)) == 1
    ledger.add(Suppressed(4, faults=False), T + 400)
    assert total(ledger.add(Dropped(Drop.PIPE_LIMIT, b"c", 3), T + 400)) == 4


def test_flood_of_faults_is_bounded(ledger):
    for tid in range(5000):
        ledger.add(Fault(b"x", tid + 1, 11), T)
    assert [total(ledger.settle(T)) for _ in range(3)] == [MOST_JUDGED, 1000 - MOST_JUDGED, 0]


def test_log_full_of_faults_is_judged_in_pieces_and_each_is_explained(ledger):
    number = 2 * MOST_JUDGED + 1
    for tid in range(1, number + 1):
        ledger.add(Fault(b"app", tid, 11), T)
        ledger.add(HelperTold(b"app", tid, 11), T)
    ledger.add(Fault(b"app", number + 1, 11), T)
    much_later = T + 10 * GRACE
    assert [ledger.settle(much_later), ledger.settle(much_later)] == [[], []]
    assert ledger.oldest_fault == T
    assert [loss.pid for loss in ledger.settle(much_later)] == [number + 1]


def test_dump_explains_a_fault_after_a_flood_has_displaced_the_line_of_its_helper(ledger):
    ledger.add(HelperTold(b"app", 12, 11), T)
    for number in range(5000):
        ledger.explain_by_dump(b"other%d" % number, int(T), 11)
    ledger.add(Fault(b"app", 99, 11), T)
    ledger.explain_by_dump(b"app", int(T), 11)
    assert ledger.settle(T + GRACE) == []


@pytest.mark.parametrize("name", ["app", "app%d"])
def test_twenty_thousand_dumps_and_as_many_explanations_as_are_kept_cost_no_heartbeat(ledger, name):
    """A heartbeat comes every 5 s; a search through all explanations for each dump took 13 s of CPU time."""
    comms = [(name % n if "%" in name else name).encode() for n in range(20_000)]
    for tid in range(1, 2 * MOST_JUDGED):
        ledger.add(Fault(b"other", tid, 11), T)
    for number in range(MOST_KEPT):
        ledger.add(HelperTold(comms[number], 100_000 + number, 11), T)
    began = time.process_time()
    for comm in comms:
        ledger.explain_by_dump(comm, int(T) + 3600, 11)
    assert total(ledger.settle(T + GRACE)) == MOST_JUDGED
    assert time.process_time() - began < 0.6


def test_dumps_are_matched_with_the_crashes_of_their_time_and_signal_in_any_order(ledger):
    for number in range(3):
        ledger.add(HelperTold(b"app", 12 + number, 11), T + 1000 * number)
        ledger.add(HelperTold(b"app", 22 + number, 6), T + 1000 * number)
    for number in (2, 0, 1):
        ledger.explain_by_dump(b"app", int(T) + 1000 * number, 11)
    ledger.add(Fault(b"app", 99, 11), T + 2000)
    ledger.add(Fault(b"app", 14, 11), T + 2000)
    assert [loss.pid for loss in ledger.settle(T + 2000 + GRACE)] == [99], "no dump explains a second fault"

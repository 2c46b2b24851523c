import time

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core_dump_collector.backlog import (
    BUSY_PAUSE_SECONDS,
    GIVE_WAY_PAUSE_SECONDS,
    LIGHT_BYTES,
    OTHERS_TURN,
    Backlog,
    Candidate,
)
from core_dump_collector.node.dumpfile import QUIET_SECONDS

NAMES = st.sampled_from([f"core-{n}" for n in range(6)])
ATTACKER, VICTIM = 1000, 2000


def exact(**arguments):
    return Backlog(jitter=lambda: 1.0, **arguments)


def filled(*names, now=0.0, backlog=None, **facts):
    """Return a backlog with these names added."""
    backlog = exact() if backlog is None else backlog
    for name in names:
        backlog.add(Candidate(name, **facts), now)
    return backlog


def drained(backlog, now=0.0):
    """Take and finish everything that is due; return the names in their order."""
    names = []
    while (name := backlog.take(now)) is not None:
        backlog.finish(name)
        names.append(name)
    return names


def fail(backlog, *names, now=0.0):
    """Let names fail; they have to be those that are due."""
    taken = [backlog.take(now) for _ in names]
    assert sorted(taken) == sorted(names)
    for name in taken:
        backlog.retry(name, now)


def test_oldest_arrival_goes_first_and_each_only_once():
    backlog = filled("a", "b", "a")
    assert [backlog.take(1.0), backlog.take(1.0), backlog.take(1.0)] == ["a", "b", None]


def test_new_dump_goes_before_all_that_waited():
    backlog = filled(*(f"old-{n}" for n in range(1000)))
    filled("new", backlog=backlog, new=True)
    assert backlog.take(0.0) == "new"


def test_new_dumps_never_stop_the_others():
    backlog = filled("old")
    filled(*(f"new-{n}" for n in range(100)), backlog=backlog, new=True)
    assert drained(backlog).index("old") < OTHERS_TURN


def test_small_dumps_go_first_and_every_fourth_turn_is_a_large_ones():
    backlog = filled(*(f"large-{n}" for n in range(8)), size_bytes=LIGHT_BYTES + 1, new=True)
    filled(*(f"small-{n}" for n in range(8)), backlog=backlog, size_bytes=LIGHT_BYTES)
    assert "".join(name[0] for name in drained(backlog)) == "ssslssslssllllll"


def test_every_fourth_turn_of_an_owner_goes_to_what_has_waited_longest():
    backlog = filled("old-1", "old-2", "old-3")
    filled(*(f"new-{n}" for n in range(9)), backlog=backlog, new=True)
    order = drained(backlog)
    assert [n for n, name in enumerate(order, start=1) if name.startswith("old")] == [4, 8, 12]
    assert order[3::4] == ["old-1", "old-2", "old-3"]


def test_origins_of_roots_dumps_take_turns():
    backlog = filled(*(f"storm-{n}" for n in range(1000)), origin=b"loop.service", new=True)
    filled("other-1", "other-2", backlog=backlog, origin=b"shop/api")
    assert drained(backlog)[:4] == ["storm-0", "other-1", "storm-1", "other-2"]


def test_nobody_but_root_gets_more_turns_by_naming_origins():
    backlog = exact()
    for number in range(100):
        filled(f"theirs-{number}", backlog=backlog, owner=ATTACKER, origin=b"%d" % number, new=True)
    filled("mine", backlog=backlog, owner=VICTIM)
    assert drained(backlog).index("mine") == 1


def test_file_not_tried_yet_goes_before_one_that_failed():
    backlog = filled("bad")
    fail(backlog, "bad")
    filled("good", now=5.0, backlog=backlog)
    assert backlog.take(5.0) == "good"
    assert backlog.take(5.0) == "bad"


def test_each_owner_gets_its_turn():
    backlog = filled(*(f"theirs-{n}" for n in range(1000)), owner=ATTACKER, new=True)
    filled("mine-1", "mine-2", backlog=backlog, owner=VICTIM)
    order = drained(backlog)
    assert max(order.index("mine-1"), order.index("mine-2")) < 5


def test_failures_of_one_owner_do_not_delay_anothers():
    planted = [f"theirs-{n}" for n in range(1000)]
    backlog = filled(*planted, owner=ATTACKER)
    fail(backlog, *planted)
    filled("mine", backlog=backlog, owner=VICTIM)
    fail(backlog, "mine")
    assert "mine" in [backlog.take(1000.0), backlog.take(1000.0)]


def test_failed_name_gives_way_to_one_that_was_not_tried():
    planted = [f"bad-{n}" for n in range(10)]
    backlog = filled(*planted, backlog=exact(capacity=10))
    fail(backlog, *planted)
    for name in ("a", "b"):
        assert backlog.add(Candidate(name), 0.0)
    assert len(backlog) == 10
    assert drained(backlog) == ["a", "b"]
    assert not backlog.turned_away


def test_owner_of_many_gives_way_to_an_owner_of_few():
    backlog = filled(
        *(f"theirs-{n}" for n in range(10)), backlog=exact(capacity=10), owner=ATTACKER, new=True
    )
    for number in range(20):
        backlog.add(Candidate(f"mine-{number}", owner=VICTIM), 0.0)
    order = drained(backlog)
    assert sum(name.startswith("mine") for name in order) == 5
    assert len(order) == 10


def test_many_owners_are_held_in_bounded_time():
    backlog = exact(capacity=4000)
    started = time.monotonic()
    for number in range(6000):
        backlog.add(Candidate(f"core-{number}", owner=number + 1), 0.0)
    assert len(drained(backlog)) == backlog.capacity
    assert time.monotonic() - started < 10


def test_file_seen_again_while_in_flight_is_looked_at_again():
    backlog = filled("a")
    backlog.take(0.0)
    filled("a", now=1.0, backlog=backlog)
    backlog.finish("a")
    assert backlog.take(2.0) == "a"
    backlog.finish("a")
    assert len(backlog) == 0


def test_file_seen_again_but_gone_is_finished():
    backlog = filled("a")
    backlog.take(0.0)
    filled("a", now=1.0, backlog=backlog)
    backlog.finish("a", gone=True)
    assert len(backlog) == 0
    assert backlog.add(Candidate("a"), 3.0)
    assert backlog.take(3.0) == "a"


def test_pauses_double_up_to_the_longest():
    backlog = filled("a", backlog=exact(longest_pause_seconds=5.0))
    pauses = []
    now = 0.0
    for _ in range(5):
        now = backlog.next_due()
        backlog.take(now)
        pauses.append(backlog.retry("a", now))
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_failure_that_only_an_operator_can_end_is_retried_slowly():
    backlog = filled("a")
    backlog.take(0.0)
    assert backlog.retry("a", 0.0, needs_operator=True) == 30.0
    assert backlog.take(29.0) is None
    assert backlog.take(30.0) == "a"


def test_new_event_does_not_cut_the_pause_of_a_failure_short():
    backlog = filled("a")
    fail(backlog, "a")
    filled("a", now=0.1, backlog=backlog, new=True)
    assert backlog.take(0.5) is None


def test_file_that_is_being_written_is_looked_at_until_it_was_quiet_and_at_once_after_its_writer():
    backlog = filled("a", modified_ns=5, size_bytes=7)
    now = 0.0
    while now <= 300:
        assert backlog.take(now) == "a"
        if backlog.sighting("a", now).unchanged_seconds > QUIET_SECONDS:
            break
        backlog.postpone("a", now)
        assert backlog.next_due() - now <= BUSY_PAUSE_SECONDS
        now = backlog.next_due()
    assert now < 2 * BUSY_PAUSE_SECONDS
    backlog.postpone("a", now)
    backlog.add(Candidate("a", new=True), now + 0.1)
    assert backlog.take(now + 0.1) == "a"


def test_file_that_changes_is_not_unchanged():
    backlog = filled("a", modified_ns=5)
    filled("a", now=50.0, backlog=backlog, modified_ns=6)
    assert backlog.sighting("a", 70.0).unchanged_seconds == 20.0
    filled("a", now=80.0, backlog=backlog, modified_ns=6)
    assert backlog.sighting("a", 90.0).unchanged_seconds == 40.0


def test_file_that_replaced_another_is_as_old_as_itself():
    backlog = filled("core")
    backlog.take(0.0)
    backlog.retry("core", 0.0)
    backlog.add(Candidate("core", 20, 2, new=True), 999.0)
    assert backlog.take_expired(1998.0, 1000.0, most=4, untried=True) == []
    assert backlog.take_expired(1999.0, 1000.0, most=4, untried=False) == ["core"]


def test_full_backlog_turns_names_away_and_asks_for_a_scan_once_there_is_room():
    backlog = exact(capacity=4)
    assert [backlog.add(Candidate(n), 0.0) for n in "abcdea"] == [True, True, True, True, False, True]
    assert backlog.turned_away
    assert len(backlog) == 4
    assert backlog.scan_pause() is None
    for _ in range(3):
        backlog.finish(backlog.take(0.0))
    assert backlog.scan_pause() == 0.0


def test_full_backlog_of_failed_names_asks_for_a_scan_now_and_then():
    backlog = filled(*"abcd", backlog=exact(capacity=4))
    backlog.add(Candidate("e"), 0.0)
    fail(backlog, *"abcd")
    assert backlog.scan_pause() == GIVE_WAY_PAUSE_SECONDS


def test_jitter_spreads_pauses_within_a_factor_of_two():
    pauses = set()
    for _ in range(50):
        backlog = filled("a", backlog=Backlog())
        backlog.take(0.0)
        pauses.add(backlog.retry("a", 0.0))
    assert all(0.5 <= p <= 1.0 for p in pauses)
    assert len(pauses) > 10


def test_result_for_a_file_not_in_flight_is_an_error():
    backlog = filled("a")
    with pytest.raises(ValueError, match="not in flight"):
        backlog.finish("a")


class BacklogMachine(RuleBasedStateMachine):
    """Against a plain model: what waits until when, what is in flight, and what was seen again."""

    CAPACITY = 4

    def __init__(self):
        super().__init__()
        self.backlog = exact(capacity=self.CAPACITY)
        self.now = 0.0
        self.waiting = {}
        self.failed = set()
        self.flying = {}

    @rule(name=NAMES, size=st.integers(0, 100), owner=st.integers(0, 2), new=st.booleans())
    def add(self, name, size, owner, new):
        known = name in self.waiting or name in self.flying
        full = len(self.waiting) + len(self.flying) >= self.CAPACITY
        accepted = self.backlog.add(Candidate(name, size, 1, owner, new), self.now)
        if known or not full:
            assert accepted
        if full and not known and self.failed:
            assert accepted, "a failed name gives way"
        if accepted and full and not known:
            (gone,) = [n for n in self.waiting if n not in self.backlog]
            assert gone in self.failed or not self.failed
            del self.waiting[gone]
            self.failed.discard(gone)
        if name in self.flying:
            self.flying[name] = (size, True)
        elif accepted:
            self.waiting[name] = (self.waiting[name][0] if known else self.now, size)

    @rule()
    def take(self):
        name = self.backlog.take(self.now)
        due = {n for n, (when, _) in self.waiting.items() if when <= self.now}
        assert (name is None) == (not due)
        if name is not None:
            assert name in due
            self.flying[name] = (self.waiting.pop(name)[1], False)
            self.failed.discard(name)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), retry=st.booleans())
    def land(self, data, retry):
        name = data.draw(st.sampled_from(sorted(self.flying)))
        size, again = self.flying.pop(name)
        if retry:
            pause = self.backlog.retry(name, self.now)
            assert 1.0 <= pause <= 300.0
            self.waiting[name] = (self.now + pause, size)
            self.failed.add(name)
        else:
            self.backlog.finish(name)
            if again:
                self.waiting[name] = (self.now, size)

    @rule(seconds=st.floats(0.1, 400.0))
    def pass_time(self, seconds):
        self.now += seconds

    @invariant()
    def counts_agree(self):
        assert (self.backlog.waiting, self.backlog.in_flight) == (len(self.waiting), len(self.flying))
        assert len(self.backlog) <= self.CAPACITY
        sizes = [s for _, s in self.waiting.values()] + [s for s, _ in self.flying.values()]
        assert self.backlog.size_bytes == sum(sizes)
        due = self.backlog.next_due()
        assert (due is None) == (not self.waiting)
        if due is not None:
            assert max(due, self.now) == max(min(when for when, _ in self.waiting.values()), self.now)


TestBacklogMachine = BacklogMachine.TestCase
TestBacklogMachine.settings = hypothesis_settings(max_examples=150, deadline=None)

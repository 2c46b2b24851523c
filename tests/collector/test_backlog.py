import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core_dump_collector.backlog import Backlog

NAMES = st.sampled_from([f"core-{n}" for n in range(6)])


def exact(**arguments):
    return Backlog(jitter=lambda: 1.0, **arguments)


def test_oldest_arrival_goes_first_and_each_only_once():
    backlog = exact()
    for name in ("a", "b", "a"):
        backlog.add(name, 0.0)
    assert [backlog.take(1.0), backlog.take(1.0), backlog.take(1.0)] == ["a", "b", None]


def test_file_seen_again_while_in_flight_is_looked_at_again():
    backlog = exact()
    backlog.add("a", 0.0)
    backlog.take(0.0)
    backlog.add("a", 1.0)
    backlog.finish("a", 2.0)
    assert backlog.take(2.0) == "a"
    backlog.finish("a", 3.0)
    assert len(backlog) == 0


def test_file_seen_again_but_gone_is_done_with():
    backlog = exact()
    backlog.add("a", 0.0)
    backlog.take(0.0)
    backlog.add("a", 1.0)
    backlog.finish("a", 2.0, gone=True)
    assert len(backlog) == 0
    assert backlog.add("a", 3.0)
    assert backlog.take(3.0) == "a"


def test_pauses_double_up_to_the_longest():
    backlog = exact(longest_pause_seconds=5.0)
    backlog.add("a", 0.0)
    pauses = []
    now = 0.0
    for _ in range(5):
        now = backlog.next_due()
        backlog.take(now)
        pauses.append(backlog.retry("a", now))
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_what_an_operator_must_mend_is_retried_slowly():
    backlog = exact()
    backlog.add("a", 0.0)
    backlog.take(0.0)
    assert backlog.retry("a", 0.0, needs_operator=True) == 30.0
    assert backlog.take(29.0) is None
    assert backlog.take(30.0) == "a"


def test_waiting_retry_does_not_block_other_files():
    backlog = exact()
    backlog.add("bad", 0.0)
    backlog.take(0.0)
    backlog.retry("bad", 0.0)
    backlog.add("good", 0.1)
    assert backlog.take(0.1) == "good"


def test_new_event_does_not_cut_a_pause_short():
    backlog = exact()
    backlog.add("a", 0.0)
    backlog.take(0.0)
    backlog.retry("a", 0.0)
    backlog.add("a", 0.1)
    assert backlog.take(0.5) is None


def test_full_backlog_turns_names_away_and_asks_for_a_scan():
    backlog = exact(capacity=2)
    assert [backlog.add(n, 0.0) for n in ("a", "b", "c", "a")] == [True, True, False, True]
    assert backlog.starved
    assert len(backlog) == 2


def test_jitter_spreads_pauses_within_a_factor_of_two():
    pauses = set()
    for _ in range(50):
        backlog = Backlog()
        backlog.add("a", 0.0)
        backlog.take(0.0)
        pauses.add(backlog.retry("a", 0.0))
    assert all(0.5 <= p <= 1.0 for p in pauses)
    assert len(pauses) > 10


def test_result_for_a_file_not_in_flight_is_an_error():
    backlog = exact()
    backlog.add("a", 0.0)
    with pytest.raises(ValueError, match="not in flight"):
        backlog.finish("a", 0.0)


class BacklogMachine(RuleBasedStateMachine):
    """Against a plain model: a dict of name to waiting or in flight, and which were seen again."""

    def __init__(self):
        super().__init__()
        self.backlog = exact(capacity=4)
        self.now = 0.0
        self.waiting = {}
        self.flying = {}

    @rule(name=NAMES, size=st.integers(0, 100))
    def add(self, name, size):
        known = name in self.waiting or name in self.flying
        full = len(self.waiting) + len(self.flying) >= 4
        accepted = self.backlog.add(name, self.now, size_bytes=size)
        assert accepted == (known or not full)
        if name in self.flying:
            self.flying[name] = (self.flying[name][0], True)
        elif not known and not full:
            self.waiting[name] = (self.now, size)

    @rule()
    def take(self):
        name = self.backlog.take(self.now)
        due = [d for d, _ in self.waiting.values()]
        assert (name is None) == (not due or min(due) > self.now)
        if name is not None:
            assert self.waiting[name][0] == min(due)
            self.flying[name] = (self.waiting.pop(name)[1], False)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), retry=st.booleans())
    def land(self, data, retry):
        name = data.draw(st.sampled_from(sorted(self.flying)))
        size, again = self.flying.pop(name)
        if retry:
            pause = self.backlog.retry(name, self.now)
            assert 1.0 <= pause <= 300.0
            self.waiting[name] = (self.now + pause, size)
        else:
            self.backlog.finish(name, self.now)
            if again:
                self.waiting[name] = (self.now, size)

    @rule(seconds=st.floats(0.1, 400.0))
    def pass_time(self, seconds):
        self.now += seconds

    @invariant()
    def counts_agree(self):
        assert (self.backlog.waiting, self.backlog.in_flight) == (len(self.waiting), len(self.flying))
        sizes = [s for _, s in self.waiting.values()] + [s for s, _ in self.flying.values()]
        assert self.backlog.size_bytes == sum(sizes)
        due = [d for d, _ in self.waiting.values()]
        assert self.backlog.next_due() == (min(due) if due else None)


TestBacklogMachine = BacklogMachine.TestCase
TestBacklogMachine.settings = hypothesis_settings(max_examples=60, deadline=None)

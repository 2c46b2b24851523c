from core_dump_collector.partials import ABANDONED_SECONDS, LONGEST_LOCKED_SECONDS, MOST_PARTIALS, Partials

NAME = "core-a-1700000000-1-11.gz.partial"
FUTURE = 32_503_680_000.0
"""A modification time in the year 3000: what a clock that jumped back leaves behind."""


def test_partial_is_due_once_it_was_unchanged_long_enough_whatever_its_time_says():
    for written_at in (0.0, 1_700_000_000.0, FUTURE):
        partials = Partials()
        partials.note(NAME, (10, written_at), 100.0)
        partials.note(NAME, (10, written_at), 105.0)
        assert partials.due(100.0 + ABANDONED_SECONDS - 0.1) is None
        assert partials.due(100.0 + ABANDONED_SECONDS) == NAME


def test_partial_that_changes_starts_to_wait_again():
    partials = Partials()
    partials.note(NAME, (10, 1.0), 0.0)
    partials.note(NAME, (11, 1.0), 9.0)
    assert partials.due(18.0) is None
    assert partials.next_due() == 9.0 + ABANDONED_SECONDS


def test_partial_that_was_left_alone_is_tried_ever_more_rarely():
    partials = Partials()
    partials.note(NAME, (10, 1.0), 0.0)
    pauses = []
    for _ in range(6):
        now = partials.next_due()
        assert partials.due(now) == NAME
        partials.start(NAME)
        assert partials.due(now) is None, "it is with a worker"
        partials.finish(NAME, now, left=True)
        pauses.append(partials.next_due() - now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_LOCKED_SECONDS


def test_salvaged_partial_is_forgotten_and_their_number_is_bounded():
    partials = Partials()
    for number in range(MOST_PARTIALS + 5):
        partials.note(f"{number}.partial", (1, 1.0), 0.0)
    assert len(partials) == MOST_PARTIALS
    partials.start("0.partial")
    partials.finish("0.partial", 1.0, left=False)
    assert len(partials) == MOST_PARTIALS - 1

"""Many collectors at a store that throttles them drain without coming back together."""

from tests.support.herd import simulate

PER_SECOND = 100


def test_fifty_collectors_at_a_store_of_a_hundred_requests_a_second_drain_without_a_thundering_herd():
    run = simulate(collectors=50, dumps=40, per_second=PER_SECOND)
    least = sum(run.taken) / PER_SECOND
    assert run.seconds < 2 * least
    first, rest = run.refused[:5], run.refused[5:]
    assert sum(rest) < 0.25 * sum(run.taken)
    assert max(rest) < 2 * PER_SECOND
    assert sum(first) < 20 * PER_SECOND


def test_one_collector_at_a_store_that_it_does_not_overload_is_never_refused():
    run = simulate(collectors=1, dumps=100, per_second=2000)
    assert sum(run.refused) == 0

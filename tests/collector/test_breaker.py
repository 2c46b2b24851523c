from core_dump_collector.breaker import FAILURES_TO_OPEN, LONGEST_OPEN_SECONDS, CircuitBreaker
from core_dump_collector.jobs import RetryReason


def failed(times, reason=RetryReason.NETWORK):
    """Return a circuit breaker after so many failures in a row, each as soon as it was allowed."""
    breaker = CircuitBreaker()
    for _ in range(times):
        breaker.fail(reason, breaker.until)
    return breaker


def test_few_failures_pause_nothing():
    assert failed(FAILURES_TO_OPEN - 1).allows(0.0, 100)


def test_store_that_is_down_is_tried_by_one_dump_at_a_time():
    breaker = failed(FAILURES_TO_OPEN)
    assert not breaker.allows(0.0, 0)
    assert breaker.allows(breaker.until, 0)
    assert not breaker.allows(breaker.until, 1)


def test_pauses_grow_to_a_limit():
    pauses = [
        failed(n + 1).until - failed(n).until for n in range(FAILURES_TO_OPEN - 1, FAILURES_TO_OPEN + 12)
    ]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < pauses[1] < pauses[-1] == LONGEST_OPEN_SECONDS


def test_attempts_that_started_before_the_pause_do_not_lengthen_it():
    breaker = failed(FAILURES_TO_OPEN)
    first = breaker.until
    for _ in range(20):
        breaker.fail(RetryReason.NETWORK, first / 2)
    assert breaker.until == first


def test_first_success_closes_the_circuit():
    breaker = failed(50)
    breaker.succeed()
    assert breaker.allows(0.0, 100)


def test_failure_of_one_dump_pauses_no_other():
    for reason in (RetryReason.SERVER, RetryReason.CHECKSUM, RetryReason.LOCAL_IO, RetryReason.FORBIDDEN):
        assert failed(50, reason).allows(0.0, 100)

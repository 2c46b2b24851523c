from core_dump_collector.breaker import LONGEST_PAUSE_SECONDS, PATIENCE, Brake
from core_dump_collector.jobs import RetryReason


def failed(times, reason=RetryReason.NETWORK):
    """Return a brake after so many failures in a row, each as soon as it was allowed."""
    brake = Brake()
    for _ in range(times):
        brake.fail(reason, brake.until)
    return brake


def test_few_failures_hold_nobody():
    assert failed(PATIENCE - 1).allows(0.0, 100)


def test_closed_store_is_tried_by_one_dump_at_a_time():
    brake = failed(PATIENCE)
    assert not brake.allows(0.0, 0)
    assert brake.allows(brake.until, 0)
    assert not brake.allows(brake.until, 1)


def test_pauses_grow_to_a_limit():
    pauses = [failed(n + 1).until - failed(n).until for n in range(PATIENCE - 1, PATIENCE + 12)]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < pauses[1] < pauses[-1] == LONGEST_PAUSE_SECONDS


def test_attempts_that_were_under_way_when_the_door_closed_do_not_lengthen_the_pause():
    brake = failed(PATIENCE)
    first = brake.until
    for _ in range(20):
        brake.fail(RetryReason.NETWORK, first / 2)
    assert brake.until == first


def test_first_success_lets_everything_go():
    brake = failed(50)
    brake.succeed()
    assert brake.allows(0.0, 100)


def test_failure_that_concerns_one_dump_holds_no_other():
    for reason in (RetryReason.SERVER, RetryReason.CHECKSUM, RetryReason.LOCAL_IO, RetryReason.FORBIDDEN):
        assert failed(50, reason).allows(0.0, 100)

import math

import pytest

from core_dump_collector.jobs import RetryReason
from core_dump_collector.reachability import (
    PROBE_PAUSE_SECONDS,
    REFUSED_SECONDS,
    SILENCE_SECONDS,
    Reachability,
)


def probed(reason, now=0.0, store=None):
    store = store or Reachability()
    store.start_probe()
    store.note_probe(reason, now)
    return store


def test_store_is_asked_at_start_and_after_long_quiet():
    store = Reachability()
    assert store.probe_due < 0
    assert not store.is_known
    store.start_probe()
    assert store.probe_due == math.inf, "one at a time"
    store.note_probe(None, 10.0)
    assert (store.is_known, store.reason) == (True, None)
    assert store.probe_due == 10.0 + SILENCE_SECONDS
    store.note_upload(None, 500.0)
    assert store.probe_due == 500.0 + SILENCE_SECONDS


@pytest.mark.parametrize(
    "reason", [RetryReason.NETWORK, RetryReason.CREDENTIALS, RetryReason.NO_SUCH_BUCKET, RetryReason.SERVER]
)
def test_store_that_is_not_reachable_is_asked_until_it_is(reason):
    store = probed(reason)
    assert store.reason is reason
    assert store.probe_due == PROBE_PAUSE_SECONDS
    assert probed(None, 30.0, store).reason is None


def test_one_failed_upload_makes_no_store_unreachable_but_has_it_asked():
    store = probed(None)
    store.note_upload(RetryReason.NETWORK, 5.0)
    assert store.reason is None
    assert store.probe_due == 5.0


def test_refused_upload_counts_although_a_probe_succeeds_until_none_is_refused_for_a_while():
    store = probed(None)
    store.note_upload(RetryReason.FORBIDDEN, 5.0)
    assert store.reason is RetryReason.FORBIDDEN
    assert probed(None, 10.0, store).reason is RetryReason.FORBIDDEN
    assert probed(None, 5.0 + REFUSED_SECONDS, store).reason is None
    store.note_upload(RetryReason.FORBIDDEN, 2000.0)
    store.note_upload(None, 2001.0)
    assert store.reason is None


@pytest.mark.parametrize("reason", [RetryReason.CHECKSUM, RetryReason.LOCAL_IO, RetryReason.WORKER_DIED])
def test_failure_of_one_dump_says_nothing_of_the_store(reason):
    store = probed(None)
    due = store.probe_due
    store.note_upload(reason, 5.0)
    assert (store.reason, store.probe_due) == (None, due)


def test_store_is_down_for_as_long_as_it_has_not_taken_dumps_and_no_longer():
    store = probed(None, 0.0)
    probed(RetryReason.SERVER, 901.0, store)
    assert not store.is_down_for(900.0, 902.0), "one probe failed just now"
    probed(RetryReason.NETWORK, 1500.0, store)
    assert not store.is_down_for(900.0, 1800.9)
    assert store.is_down_for(900.0, 1801.0)
    store.note_upload(None, 1801.0)
    probed(RetryReason.NETWORK, 1802.0, store)
    assert not store.is_down_for(900.0, 2701.9)

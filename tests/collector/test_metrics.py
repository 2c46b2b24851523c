import pytest
from prometheus_client.exposition import generate_latest

from core_dump_collector.jobs import Outcome, RetryReason, UploadResult
from core_dump_collector.metrics import Metrics


def samples(metrics):
    lines = generate_latest(metrics.registry).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_no_series_says_when_another_was_created():
    assert [name for name in samples(Metrics()) if "_created" in name] == []


@pytest.mark.parametrize("outcome", list(Outcome))
def test_each_outcome_is_counted_once_where_it_belongs(outcome):
    metrics = Metrics()
    before = samples(metrics)
    retried = RetryReason.NETWORK if outcome is Outcome.RETRY else None
    metrics.observe(UploadResult("core-a-1-2-11.gz", outcome, retry_reason=retried))
    counts = ("core_dump_uploads_total", "core_dump_files_skipped_total", "core_dump_retries_total")
    counts += ("core_dump_dumps_discarded_total",)
    moved = [
        name for name, value in samples(metrics).items() if name.startswith(counts) and before[name] != value
    ]
    expected = f'core_dump_uploads_total{{result="{outcome}"}}'
    if outcome in {Outcome.BUSY, Outcome.VANISHED, Outcome.REFUSED}:
        expected = f'core_dump_files_skipped_total{{reason="{outcome}"}}'
    if outcome is Outcome.DISCARDED:
        expected = "core_dump_dumps_discarded_total"
    if outcome is Outcome.RETRY:
        expected = 'core_dump_retries_total{reason="network"}'
    assert moved == [expected]


def test_pattern_is_taken_once_for_each_time_it_was_ours():
    metrics = Metrics()
    looks = [False, True, False, False, True, False]
    assert [metrics.observe_pattern(ours=ours) for ours in looks] == [False, False, True, False, False, True]
    assert samples(metrics)["core_dump_core_pattern_taken_total"] == "2.0"

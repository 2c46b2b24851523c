"""A worker that dies takes none of the others with it, and keeps nothing from ending."""

from __future__ import annotations

import gzip
import os
import signal
import time
from pathlib import Path

import pytest
from tests.support.collector import running, wait_until

DONE = 'core_dump_uploads_total{result="uploaded"}'


def publish(directory, numbers):
    for number in numbers:
        partial = directory / f"core-app-{1_700_000_000 + number}-{number}-11.gz.partial"
        partial.write_bytes(gzip.compress(b"%d" % number))
        partial.rename(partial.with_suffix(""))


def is_first_in_line(pid):
    """Tell whether an idle worker holds the lock of the queue: it waits for the pipe, the others for it."""
    return "pipe" in Path(f"/proc/{pid}/wchan").read_text()


@pytest.fixture
def bereft(seaweed, bucket, watch_dir, tmp_path):
    """A collector whose idle worker was killed while it held the queue's lock, and the pids of the others."""
    with running(watch_dir, seaweed.environ() | {"METADATA": "false", "WORKERS": "3"}, tmp_path) as collector:
        publish(watch_dir, range(30))
        wait_until(lambda: collector.metric(DONE) == 30, 60)
        wait_until(lambda: any(map(is_first_in_line, collector.workers())), 10, "an idle worker")
        (first,) = filter(is_first_in_line, collector.workers())
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in collector.workers(), 10)
        yield collector, collector.workers()


def test_worker_killed_with_the_queues_lock_in_its_hands_does_not_hold_up_the_end(bereft):
    collector, others = bereft
    assert others
    began = time.monotonic()
    assert collector.stop() == 0
    assert time.monotonic() - began < 8


def test_worker_killed_with_the_queues_lock_in_its_hands_leaves_none_that_waits_for_it(bereft, watch_dir):
    collector, others = bereft
    publish(watch_dir, range(30, 60))
    wait_until(lambda: collector.metric(DONE) == 60, 60)
    wait_until(lambda: not set(others) & set(collector.workers()), 10, "the old workers to end")
    assert collector.metric("core_dump_pool_rebuilds_total") == 1


def test_stopped_worker_is_killed_at_the_deadline_and_its_job_done_by_another(
    seaweed, bucket, watch_dir, tmp_path
):
    variables = {"WORKERS": "1", "SIDECAR": "false", "RETRY_SECONDS": "1"}
    variables |= {"CONNECT_TIMEOUT_SECONDS": "0.2", "READ_TIMEOUT_SECONDS": "0.3"}
    with running(watch_dir, seaweed.environ() | variables, tmp_path) as collector:
        publish(watch_dir, [1])
        wait_until(lambda: collector.metric(DONE) == 1)
        (worker,) = collector.workers()
        os.kill(worker, signal.SIGSTOP)
        publish(watch_dir, [2])
        wait_until(lambda: collector.metric(DONE) == 2, 40)
        assert collector.metric('core_dump_retries_total{reason="timeout"}') == 1
        assert worker not in collector.workers()
        assert collector.get("/livez") == "ok\n"

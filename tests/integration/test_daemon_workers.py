"""A worker that dies takes none of the others with it, and keeps nothing from ending."""

from __future__ import annotations

import gzip
import os
import signal
import time

from tests.support.collector import running, wait_until

DONE = 'core_dump_uploads_total{result="uploaded"}'


def publish(directory, numbers):
    for number in numbers:
        partial = directory / f"core-app-{1_700_000_000 + number}-{number}-11.gz.partial"
        partial.write_bytes(gzip.compress(b"%d" % number))
        partial.rename(partial.with_suffix(""))


def test_worker_killed_while_idle_costs_nothing_and_is_replaced_when_it_is_needed(
    seaweed, bucket, watch_dir, tmp_path
):
    with running(watch_dir, seaweed.environ() | {"METADATA": "false"}, tmp_path) as collector:
        publish(watch_dir, range(30))
        wait_until(lambda: collector.metric(DONE) == 30, 60)
        old = collector.workers()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: collector.metric("core_dump_pool_rebuilds_total") == len(old), 10)
        publish(watch_dir, range(30, 60))
        wait_until(lambda: collector.metric(DONE) == 60, 60)
        assert not set(old) & set(collector.workers())
        assert collector.metric('core_dump_retries_total{reason="worker_died"}') == 0
        began = time.monotonic()
        assert collector.stop() == 0
        assert time.monotonic() - began < 8


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

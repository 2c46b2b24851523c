"""A pool of real worker processes whose jobs do not come back."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from concurrent.futures import process
from multiprocessing import forkserver

import pytest
from tests.support import s3
from tests.support.collector import wait_until
from tests.support.uploads import NAME, connected, options

from core_dump_collector import pool as pool_module
from core_dump_collector.deadlines import seconds_for
from core_dump_collector.jobs import Job, RetryReason, Salvage, SalvageResult
from core_dump_collector.pool import Pool


@pytest.fixture
def busy(watch_dir):
    """A pool whose one worker waits for an answer, and the worker's process."""
    forkserver._forkserver._stop()  # an earlier one has the environment of another test
    (watch_dir / NAME).write_bytes(b"\x1f\x8b")
    woken = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        port = silent.getsockname()[1]
        with connected(s3.ADMIN.environ(), AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{port}"):
            pool = Pool(1, options(read_timeout_seconds=30, connect_timeout_seconds=5), woken.set)
            pool.submit(Job(str(watch_dir), NAME))
            connection, _ = silent.accept()
        with connection, contextlib.ExitStack() as ending:
            ending.callback(pool.kill)
            connection.settimeout(30)
            assert connection.recv(10)
            (worker,) = pool._executor._processes.values()
            yield pool, worker, woken
    forkserver._forkserver._stop()


def result_of(pool, woken):
    assert woken.wait(10)
    wait_until(lambda: not pool.in_flight or pool._done.qsize(), 10)
    (result,) = pool.collect()
    return result


@pytest.mark.parametrize("stopped", [False, True], ids=["waiting", "stopped"])
def test_worker_past_the_deadline_of_its_job_is_killed(busy, stopped):
    pool, worker, woken = busy
    if stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds_for(2, 35, 1000)
    pool.kill_hung(deadline - 10)
    assert worker.is_alive()
    pool.kill_hung(deadline + 1)
    result = result_of(pool, woken)
    assert result.retry_reason is RetryReason.TIMEOUT
    wait_until(lambda: not worker.is_alive(), 10)
    assert pool.in_flight == 0
    assert pool.rebuilds == 1


def test_worker_that_stays_stopped_is_killed_long_before_the_deadline(busy):
    pool, worker, woken = busy
    now = time.monotonic()
    pool.kill_hung(now)
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: pool_module._is_stopped(worker.pid), 10)
    pool.kill_hung(now + 10)
    pool.kill_hung(now + pool_module.STOPPED_SECONDS)
    assert worker.is_alive()
    pool.kill_hung(now + 10 + pool_module.STOPPED_SECONDS)
    assert result_of(pool, woken).retry_reason is RetryReason.WORKER_DIED


def test_pool_is_stuck_once_killing_does_not_bring_a_job_back(busy):
    pool, _, _ = busy
    deadline = time.monotonic() + seconds_for(2, 35, 1000)
    assert not pool.is_stuck(deadline + pool_module.STUCK_SECONDS - 10)
    assert pool.is_stuck(deadline + pool_module.STUCK_SECONDS + 1)


@contextlib.contextmanager
def no_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def no_thread():
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process._ExecutorManagerThread, "start", refuse)
        yield


@pytest.mark.parametrize("scarcity", [no_descriptors, no_thread], ids=lambda value: value.__name__)
def test_pool_that_cannot_start_returns_its_jobs_and_starts_later(busy, watch_dir, scarcity):
    pool, worker, woken = busy
    with scarcity():
        worker.kill()
        assert result_of(pool, woken).retry_reason is RetryReason.WORKER_DIED
        woken.clear()
        for _ in range(2):
            pool.submit(Job(str(watch_dir), NAME))
            assert not pool.has_room
            result = result_of(pool, woken)
            assert (result.name, result.retry_reason) == (NAME, RetryReason.WORKER_DIED)
            woken.clear()
    pool.kill_hung(time.monotonic())
    assert pool.has_room
    pool.submit(Salvage(str(watch_dir), "gone.partial"))
    assert result_of(pool, woken) == SalvageResult("gone.partial")


@pytest.mark.parametrize("seen_by", ["heartbeat", "next job"])
def test_job_returns_although_the_thread_that_hands_out_jobs_has_ended(busy, watch_dir, seen_by):
    pool, worker, woken = busy
    manager = pool._executor._executor_manager_thread
    worker.kill()
    manager.join(10)
    assert result_of(pool, woken).retry_reason is RetryReason.WORKER_DIED
    woken.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process._ExecutorManagerThread, "run", lambda _: None)
        pool.submit(Job(str(watch_dir), NAME))
        pool._executor._executor_manager_thread.join(10)
    if seen_by == "heartbeat":
        pool.kill_hung(time.monotonic())
    else:
        pool.submit(Salvage(str(watch_dir), "gone.partial"))
    assert woken.wait(10)
    assert pool.collect()[0].retry_reason is RetryReason.WORKER_DIED

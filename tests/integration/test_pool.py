"""A pool of real worker processes whose jobs do not come back."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import socket
import time
from multiprocessing import forkserver, get_context, popen_forkserver
from multiprocessing.connection import wait

import pytest
from tests.support import s3
from tests.support.collector import wait_until
from tests.support.uploads import NAME, connected, options

from core_dump_collector import pool as pool_module
from core_dump_collector import serving
from core_dump_collector.board import HEAVY, LIGHT_JOBS, Board
from core_dump_collector.deadlines import SILENT_SECONDS, seconds_for
from core_dump_collector.governor import FIRST
from core_dump_collector.jobs import Job, RetryReason, Salvage, SalvageResult
from core_dump_collector.pool import Pool

PATIENCE = {"read_timeout_seconds": 30, "connect_timeout_seconds": 5}


@contextlib.contextmanager
def silent_store():
    """Yield a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        silent.settimeout(30)
        yield silent


@contextlib.contextmanager
def pool_at(silent, **changes):
    """Run a pool whose store is this server."""
    forkserver._forkserver._stop()  # an earlier one has the environment of another test
    endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
    with connected(s3.ADMIN.environ(), AWS_ENDPOINT_URL_S3=endpoint):
        pool = Pool(options(**PATIENCE | changes))
        try:
            yield pool
        finally:
            pool.kill()
            forkserver._forkserver._stop()


@pytest.fixture
def busy(watch_dir):
    """A pool whose one worker waits for an answer, and the worker's process."""
    (watch_dir / NAME).write_bytes(b"\x1f\x8b")
    with silent_store() as silent, pool_at(silent, workers=1) as pool:
        pool.submit(Job(str(watch_dir), NAME))
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(30)
            assert connection.recv(10)
            (worker,) = pool._workers.values()
            yield pool, worker.process


def result_of(pool):
    assert wait([pool], 10)
    (result,) = pool.collect()
    return result


def result_after_death(pool):
    """Return a result that comes once a worker has ended."""
    found = []
    wait_until(lambda: found.extend(pool.collect()) or found, 10)
    (result,) = found
    return result


@pytest.mark.parametrize("stopped", [False, True], ids=["waiting", "stopped"])
def test_worker_past_the_deadline_of_its_job_is_killed(busy, monkeypatch, stopped):
    monkeypatch.setattr(pool_module, "SILENT_SECONDS", 1e9)
    pool, process = busy
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds_for(2, 35, 1250)
    pool.kill_hung(deadline - 10)
    assert process.is_alive()
    pool.kill_hung(deadline + 1)
    assert result_after_death(pool).retry_reason is RetryReason.TIMEOUT
    assert (pool.in_flight, pool.rebuilds) == (0, 1)


def test_worker_that_stays_stopped_is_killed_long_before_the_deadline(busy):
    pool, process = busy
    now = time.monotonic()
    pool.kill_hung(now)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: pool_module._is_stopped(process.pid), 10)
    pool.kill_hung(now + 10)
    pool.kill_hung(now + pool_module.STOPPED_SECONDS)
    assert process.is_alive()
    pool.kill_hung(now + 10 + pool_module.STOPPED_SECONDS)
    assert result_after_death(pool).retry_reason is RetryReason.WORKER_DIED


def test_job_that_waits_for_the_store_makes_progress_as_far_as_the_pool_can_see(busy):
    pool, _ = busy
    (worker,) = pool._workers.values()
    began = worker.last_beat(0)
    wait_until(lambda: worker.last_beat(0) > began + 0.3, 10)


def test_worker_that_hangs_outside_the_network_is_killed_ten_minutes_after_its_last_progress(
    watch_dir, tmp_path
):
    with open(watch_dir / NAME, "wb") as file:
        file.truncate(1 << 30)
    config = tmp_path / "config"
    config.write_text("[default]\ncredential_process = /bin/sleep 60\n")
    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_CONFIG_FILE": str(config)}
    forkserver._forkserver._stop()
    with connected(no_keys), contextlib.ExitStack() as ending:
        pool = Pool(options(**PATIENCE))
        ending.callback(forkserver._forkserver._stop)
        ending.callback(pool.kill)
        pool.submit(Job(str(watch_dir), NAME), heavy=True)
        (worker,) = pool._workers.values()
        wait_until(lambda: worker.seat.beaten_at(HEAVY), 30)
        last = worker.last_beat(HEAVY)
        pool.kill_hung(last + SILENT_SECONDS - 1)
        assert worker.process.is_alive()
        pool.kill_hung(last + SILENT_SECONDS + 1)
        assert result_after_death(pool).retry_reason is RetryReason.TIMEOUT


def test_pool_is_stuck_once_killing_does_not_bring_a_job_back(busy):
    pool, _ = busy
    deadline = time.monotonic() + seconds_for(2, 35, 1250)
    assert not pool.is_stuck(deadline + pool_module.STUCK_SECONDS - 10)
    assert pool.is_stuck(deadline + pool_module.STUCK_SECONDS + 1)


def test_death_of_a_worker_brings_back_its_own_jobs_and_no_others(watch_dir):
    names = [f"core-app-170000000{number}-1-11.gz" for number in range(3)]
    for name in names:
        (watch_dir / name).write_bytes(b"\x1f\x8b")
    with silent_store() as silent, pool_at(silent, workers=2) as pool:
        for name in names:
            pool.submit(Job(str(watch_dir), name))
        victim, other = pool._workers.values()
        lost = {task.job.name for task in victim.tasks.values()}
        victim.process.kill()
        victim.process.join(10)
        results = pool.collect()
        assert {result.name for result in results} == lost
        assert {result.retry_reason for result in results} == {RetryReason.WORKER_DIED}
        assert pool.in_flight == len(names) - len(lost) == 1
        assert other.process.is_alive()


def test_one_worker_has_places_for_small_dumps_and_one_for_a_large_one(watch_dir):
    with silent_store() as silent, pool_at(silent, workers=1) as pool:
        for number in range(FIRST):
            name = f"core-app-170000000{number}-1-11.gz"
            (watch_dir / name).write_bytes(b"\x1f\x8b")
            pool.submit(Job(str(watch_dir), name))
        (worker,) = pool._workers.values()
        wait_until(lambda: all(worker.seat.beaten_at(place) for place in range(FIRST)), 30, "threads")
        assert pool.room() == LIGHT_JOBS - FIRST
        assert pool.room(heavy=True) == 1


def test_job_for_a_worker_that_has_just_died_goes_to_another(watch_dir):
    (watch_dir / NAME).write_bytes(b"\x1f\x8b")
    with silent_store() as silent, pool_at(silent, workers=1) as pool:
        pool.submit(Job(str(watch_dir), NAME))
        (worker,) = pool._workers.values()
        worker.process.kill()
        worker.process.join(10)
        pool.submit(Salvage(str(watch_dir), "gone.partial"))
        found = []
        wait_until(lambda: found.extend(pool.collect()) or len(found) == 2, 30)
        lost, salvaged = found
        assert lost.retry_reason is RetryReason.WORKER_DIED
        assert salvaged == SalvageResult("gone.partial")


def serve_with_one_thread(channel, board):
    make = serving._Thread

    def refuse(channel, worker, flow, place):
        if place:
            raise RuntimeError("can't start new thread")
        return make(channel, worker, flow, place)

    serving._Thread = refuse
    serving.serve(channel, board, 0, options())


def test_job_without_a_thread_comes_back_and_costs_the_others_nothing(watch_dir):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    process = get_context("fork").Process(target=serve_with_one_thread, args=(theirs, Board(1)))
    process.start()
    with ours:
        theirs.close()
        answers = []
        for place in (0, 1, 0):
            ours.send(pickle.dumps((place, Salvage(str(watch_dir), "gone.partial"))))
            answers.append(pickle.loads(ours.recv(serving.MOST_MESSAGE_BYTES)))
    process.kill()
    process.join(10)
    why = "no thread can be started: can't start new thread"
    assert [(place, result.detail) for place, result in answers] == [(0, ""), (1, why), (0, "")]


@contextlib.contextmanager
def no_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def no_process():
    def refuse(_):
        raise OSError(11, "Resource temporarily unavailable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(popen_forkserver.Popen, "_launch", refuse)
        yield


@pytest.mark.parametrize("scarcity", [no_descriptors, no_process], ids=lambda value: value.__name__)
def test_pool_that_cannot_start_returns_its_jobs_and_starts_later(busy, watch_dir, scarcity):
    pool, process = busy
    with scarcity():
        process.kill()
        assert result_after_death(pool).retry_reason is RetryReason.WORKER_DIED
        for _ in range(2):
            pool.submit(Job(str(watch_dir), NAME))
            assert not pool.room()
            result = result_of(pool)
            assert (result.name, result.retry_reason) == (NAME, RetryReason.WORKER_DIED)
            assert "no worker process can be started" in result.detail
    pool.kill_hung(time.monotonic())
    assert pool.room()
    pool.submit(Salvage(str(watch_dir), "gone.partial"))
    assert result_of(pool) == SalvageResult("gone.partial")

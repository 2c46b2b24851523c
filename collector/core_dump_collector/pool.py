"""Owns the worker processes: start, submit, kill when one hangs, rebuild when one dies, drain.

Uses `ProcessPoolExecutor` because the join of `multiprocessing.Pool` never returns after a worker was SIGKILLed.
Workers come from a fork server that has imported boto3 once, so they share its memory. The executor does not tell which
worker has which job, and replaces all workers when one dies: a job that hangs costs the others a retry.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from concurrent.futures import BrokenExecutor, Future
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from core_dump_collector.deadlines import Deadlines, seconds_for
from core_dump_collector.executors import Starter
from core_dump_collector.jobs import Job, RetryReason, fail

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor
    from multiprocessing.process import BaseProcess

    from core_dump_collector.jobs import AnyJob, AnyResult
    from core_dump_collector.options import UploadOptions
    from core_dump_collector.upload import Worker

_PRELOAD = ["__main__", "core_dump_collector.preload"]
_KILL_SECONDS = 5.0
STOPPED_SECONDS = 60.0
"""A worker that was stopped (SIGSTOP) and not continued for this long is killed."""
STUCK_SECONDS = 60.0
"""After its deadline a job is given this long to come back from its killed worker."""
_DIED = (RetryReason.WORKER_DIED, "the worker process died")
_HUNG = (RetryReason.TIMEOUT, "the job did not end in time, so its worker process was killed")

_worker: Worker | None = None
"""Set in worker processes: an initializer of ProcessPoolExecutor can leave its result nowhere else."""


def _begin_worker(options: UploadOptions) -> None:
    """Make the worker, and end it with the daemon: an orphan must not go on uploading.

    SIGINT and SIGTERM are ignored since the fork (`preload`): the daemon decides when workers end.
    """
    from core_dump_collector import upload  # noqa: PLC0415  boto3 stays out of the daemon's memory

    global _worker  # noqa: PLW0603
    _worker = upload.Worker(options)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _process(job: AnyJob) -> AnyResult:
    assert _worker is not None  # noqa: S101  the initializer has run
    return _worker.process(job)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


class Pool:
    """A pool that survives the death of its workers.

    Args:
        workers: number of processes.
        options: given to each worker once, when it starts.
        wake: called from another thread whenever a result can be collected.
    """

    def __init__(self, workers: int, options: UploadOptions, wake: Callable[[], None]) -> None:
        """Prepare; processes start with the first jobs."""
        self._workers = workers
        self._options = options
        self._wake = wake
        self._starter = Starter(workers, _PRELOAD, _begin_worker, (options,))
        self._executor: Executor | None = None
        """None until a job needs one, also after one was discarded."""
        self._jobs: dict[Future[AnyResult], AnyJob] = {}
        """Jobs in flight. A future that is not in it belongs to an executor that was discarded."""
        self._done: queue.SimpleQueue[Future[AnyResult]] = queue.SimpleQueue()
        self._deadlines: Deadlines[Future[AnyResult]] = Deadlines(workers)
        self._hung: set[Future[AnyResult]] = set()
        self._stopped_since: dict[int, float] = {}
        self._lacks_resources = False
        """A job could not be handed over; no other is wanted before the next heartbeat."""
        self.rebuilds = 0
        """How often the pool was restarted because a worker died."""

    @property
    def has_room(self) -> bool:
        """Tell whether another job should be submitted: two for each worker keep it busy."""
        return self.room > 0

    @property
    def room(self) -> int:
        """Return how many more jobs should be submitted."""
        if self._lacks_resources:
            return 0
        return 2 * self._workers - len(self._deadlines)

    @property
    def in_flight(self) -> int:
        """Jobs whose result was not collected yet."""
        return len(self._deadlines)

    def is_stuck(self, now: float) -> bool:
        """Tell whether killing the workers did not bring an overdue job back."""
        return bool(self._deadlines.overdue(now - STUCK_SECONDS))

    def submit(self, job: AnyJob) -> None:
        """Hand a job to the next free worker; one that cannot be handed over comes back as a retry."""
        future = self._schedule(job)
        options = self._options
        request_seconds = options.connect_timeout_seconds + options.read_timeout_seconds
        seconds = seconds_for(_size_of(job), request_seconds, options.connection_bytes_per_second)
        self._jobs[future] = job
        self._deadlines.add(future, seconds, time.monotonic())
        future.add_done_callback(self._land)

    def _schedule(self, job: AnyJob) -> Future[AnyResult]:
        try:
            return self._hand_over(job)
        except BrokenExecutor:  # a worker died, and `collect` has not seen it yet
            self._rebuild()
        except Exception as error:  # noqa: BLE001  no memory, too many processes, threads or files
            return self._withdraw(error)
        try:
            return self._hand_over(job)
        except Exception as error:  # noqa: BLE001
            return self._withdraw(error)

    def _hand_over(self, job: AnyJob) -> Future[AnyResult]:
        self._replace_unserved()
        if self._executor is None:
            self._executor = self._starter.start()
        return self._executor.submit(_process, job)

    def _withdraw(self, error: Exception) -> Future[AnyResult]:
        """Return the future of a job that could not be handed over; `submit` may have queued it before it failed.

        An executor whose threads run keeps its other jobs; any other one would never return a result.
        """
        self._lacks_resources = True
        if self._is_served:
            queued: dict[int, Any] = getattr(self._executor, "_pending_work_items", {})
            item = queued.get(getattr(self._executor, "_queue_count", 0) - 1)
            if item is not None and not item.future.cancel():
                running: Future[AnyResult] = item.future
                return running
        else:
            self._discard()
        failed: Future[AnyResult] = Future()
        failed.set_exception(OSError(f"no worker process can be started: {error}"))
        return failed

    @property
    def _is_served(self) -> bool:
        """Tell whether a thread of the executor hands out jobs and returns results."""
        threads = {
            getattr(self._executor, "_executor_manager_thread", None),
            *getattr(self._executor, "_threads", ()),
        }
        return any(thread is not None and thread.is_alive() for thread in threads)

    def _land(self, future: Future[AnyResult]) -> None:
        self._done.put(future)
        self._wake()

    def collect(self) -> list[AnyResult]:
        """Return the results that are in, without waiting; a dead worker's jobs come back as retries."""
        results: list[AnyResult] = []
        while True:
            try:
                future = self._done.get_nowait()
            except queue.Empty:
                break
            if future in self._jobs:
                self._deadlines.remove(future, time.monotonic())
                results.append(self._result_of(self._jobs.pop(future), future))
                self._hung.discard(future)
        if getattr(self._executor, "_broken", False):
            self._rebuild()
        return results

    def _result_of(self, job: AnyJob, future: Future[AnyResult]) -> AnyResult:
        try:
            return future.result(timeout=0)
        except (BrokenExecutor, TimeoutError):  # the latter: its executor was discarded
            return fail(job, *(_HUNG if future in self._hung else _DIED))
        except OSError as error:
            return fail(job, RetryReason.WORKER_DIED, str(error)[:500])
        except Exception as error:  # noqa: BLE001  the boundary to the workers: nothing may end the daemon
            return fail(job, RetryReason.INTERNAL, repr(error)[:500])

    def kill_hung(self, now: float) -> None:
        """Kill the workers if a job is past its deadline, or if one of them was stopped a while ago.

        To be called with every heartbeat. It also discards an executor whose thread has ended: no result would come.
        """
        self._lacks_resources = False
        self._replace_unserved()
        hung = set(self._deadlines.overdue(now)) - self._hung
        if hung or (self._is_one_stopped(now) and self.in_flight):
            self._hung |= hung
            _kill_all()

    def _is_one_stopped(self, now: float) -> bool:
        workers = multiprocessing.active_children()
        stopped = [worker.pid for worker in workers if worker.pid is not None and _is_stopped(worker.pid)]
        self._stopped_since = {pid: self._stopped_since.get(pid, now) for pid in stopped}
        return any(since <= now - STOPPED_SECONDS for since in self._stopped_since.values())

    def _replace_unserved(self) -> None:
        if self._executor is not None and not self._is_served:
            self._rebuild()

    def _rebuild(self) -> None:
        """Discard the executor, whose worker has died; the next job gets another one."""
        self._discard()
        self.rebuilds += 1

    def _discard(self) -> None:
        """Kill the workers and forget their executor; its jobs come back as retries."""
        # The dead worker may have held a lock that the others wait for, and the executor waits for them.
        _kill_all()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
        for future in self._jobs:
            if not future.done():
                self._land(future)

    def kill(self) -> bool:
        """End every worker at once; what it was doing is on disk for the next start.

        Return False if one of them does not end: a file system that is frozen holds it.
        """
        workers = _kill_all()
        deadline = time.monotonic() + _KILL_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
        if not self._starter.has_processes:
            return not self.in_flight
        return not any(worker.is_alive() for worker in workers)


def _kill_all() -> list[BaseProcess]:
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    return workers


def _is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by a signal (proc_pid_stat(5))."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[:1] == [b"T"]
    return False


def _size_of(job: AnyJob) -> int:
    """Return the length of a job's file; 0 if there is none."""
    if not isinstance(job, Job):
        return 0
    try:
        return os.lstat(os.path.join(job.directory, job.name)).st_size
    except (OSError, ValueError):
        return 0

"""Owns the worker processes: start, submit, kill one that hangs, replace one that died, update the allowances.

A worker has several small jobs in hand at the same time and one that may be large. Each job has a place at one worker,
so the end of a worker costs the others nothing. A job of a worker that ended comes back as a retry, once the process
is gone, so that no file is ever with two workers.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import time
from typing import TYPE_CHECKING

import structlog

from core_dump_collector import budget
from core_dump_collector.allowance import Allowance
from core_dump_collector.board import LIGHT_JOBS, Board
from core_dump_collector.deadlines import SILENT_SECONDS, seconds_for
from core_dump_collector.jobs import Job, RetryReason, fail
from core_dump_collector.node import memory
from core_dump_collector.processes import read_stat
from core_dump_collector.workers import Task, WorkerProcess

if TYPE_CHECKING:
    from core_dump_collector.jobs import AnyJob, AnyResult
    from core_dump_collector.options import UploadOptions

log = structlog.get_logger()

_KILL_SECONDS = 5.0
STOPPED_SECONDS = 60.0
"""A worker that was stopped (SIGSTOP) and not continued for this long is killed."""
STUCK_SECONDS = 60.0
"""After its deadline a job is given this long to come back from its killed worker."""
SPREAD = 2
"""Jobs that a worker has in hand before another one is started."""
_DIED = (RetryReason.WORKER_DIED, "the worker process died")
_HUNG = (RetryReason.TIMEOUT, "the job did not end in time, so its worker process was killed")


class Pool:
    """A pool that survives the death of its workers. Its descriptor is readable when `collect` has something to do.

    Args:
        options: given to each worker once, when it starts.
    """

    def __init__(self, options: UploadOptions) -> None:
        """Prepare; processes start with the first jobs."""
        self._options = options
        limit = memory.find_limit()
        self._budget = budget.plan(limit.limit_bytes if limit else None, options.workers, options.part_bytes)
        self._board = Board(options.workers)
        self._allowance = Allowance(options, self._budget, limit)
        self._workers: dict[int, WorkerProcess] = {}
        """By their seats."""
        self._selector = selectors.DefaultSelector()
        self._unstarted: list[AnyResult] = []
        """Results of jobs that could not be handed over, or whose worker was found dead."""
        self._signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._signal, selectors.EVENT_READ)
        self._lacks_resources = False
        """A job could not be handed over; no other is wanted before the next heartbeat."""
        self.rebuilds = 0
        """How often a worker was replaced because it died."""
        if self._budget.workers < options.workers:
            log.info("the memory limit leaves room for fewer workers", workers=self._budget.workers)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._selector.fileno()

    def room(self, *, heavy: bool = False) -> int:
        """Return how many more jobs should be submitted; `heavy` for those that may be large."""
        if self._lacks_resources or self._unstarted:
            return 0
        unstarted = self._budget.workers - len(self._workers)
        workers = self._workers.values()
        if heavy:
            places = unstarted + sum(worker.has_heavy_place for worker in workers)
        else:
            places = LIGHT_JOBS * unstarted + sum(worker.free_places for worker in workers)
        return max(0, min(places, self._allowance.most_jobs - self.in_flight))

    @property
    def in_flight(self) -> int:
        """Jobs whose result was not collected yet."""
        return sum(len(worker.tasks) for worker in self._workers.values()) + len(self._unstarted)

    @property
    def connections(self) -> int:
        """Return how many connections all workers together may use."""
        return self._allowance.connections

    def is_stuck(self, now: float) -> bool:
        """Tell whether killing a worker did not bring an overdue job back."""
        return any(
            task.deadline < now - STUCK_SECONDS
            for worker in self._workers.values()
            for task in worker.tasks.values()
        )

    def submit(self, job: AnyJob, *, heavy: bool = False) -> None:
        """Hand a job to a worker that has a place; one that cannot be handed over comes back as a retry."""
        now = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.is_dead:  # and `collect` has not seen it yet
                self._return(self._bury(worker))
        task = Task(job, now, now + self._seconds_for(job))
        try:
            self._choose(heavy=heavy).give(task, heavy=heavy)
        except Exception as error:  # noqa: BLE001  no memory, too many processes or files, a worker that just died
            self._lacks_resources = True
            why = f"no worker process can be started: {error}"[:500]
            self._return([fail(job, RetryReason.WORKER_DIED, why)])
        self._allowance.spread(self._workers.values(), now)

    def _return(self, results: list[AnyResult]) -> None:
        """Let `collect` return results."""
        self._unstarted += results
        if results:
            os.eventfd_write(self._signal, 1)

    def _seconds_for(self, job: AnyJob) -> float:
        options = self._options
        return seconds_for(_size_of(job), options.request_seconds, options.connection_bytes_per_second)

    def _choose(self, *, heavy: bool) -> WorkerProcess:
        """Return the worker with the fewest jobs; start one while all have several."""
        able = [w for w in self._workers.values() if (w.has_heavy_place if heavy else w.free_places)]
        best = min(able, key=lambda worker: len(worker.tasks), default=None)
        wanted = best is None or len(best.tasks) >= SPREAD
        if wanted and len(self._workers) < self._budget.workers:
            with contextlib.suppress(*([] if best is None else [Exception])):
                return self._start()
        if best is None:
            raise OSError("all workers are busy")
        return best

    def _start(self) -> WorkerProcess:
        index = next(n for n in range(self._budget.workers) if n not in self._workers)
        worker = WorkerProcess(self._board, index, self._options)
        self._workers[index] = worker
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        self._selector.register(worker.process.sentinel, selectors.EVENT_READ, worker)
        return worker

    def collect(self) -> list[AnyResult]:
        """Return the results that are in, without waiting; a dead worker's jobs come back as retries."""
        results, self._unstarted = self._unstarted, []
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._signal)
        for worker in {key.data for key, _ in self._selector.select(0) if key.data is not None}:
            results += worker.results()
            if worker.is_dead:
                results += self._bury(worker)
        return results

    def _bury(self, worker: WorkerProcess) -> list[AnyResult]:
        """Forget a worker that has ended; another takes its seat when it is needed."""
        results = worker.results()
        results += [fail(task.job, *(_HUNG if task.overdue else _DIED)) for task in worker.tasks.values()]
        self._selector.unregister(worker.channel)
        self._selector.unregister(worker.process.sentinel)
        worker.close()
        del self._workers[worker.index]
        self.rebuilds += 1
        return results

    def tick(self, now: float) -> None:
        """Update the allowance of each worker; to be called when `due` has come."""
        self._allowance.take(self._workers.values(), now)

    def share_rate(self, *, shared: bool) -> None:
        """Note whether modules are sent at the same time, which then have half of the rate."""
        self._allowance.is_shared = shared

    @property
    def due(self) -> float:
        """Return when `tick` is due."""
        return self._allowance.due if self.in_flight else math.inf

    def kill_hung(self, now: float) -> None:
        """Kill each worker with a job past its deadline or without progress, or that was stopped a while ago.

        To be called with every heartbeat.
        """
        self._lacks_resources = False
        for worker in list(self._workers.values()):
            hung = [
                task
                for place, task in worker.tasks.items()
                if task.deadline < now or worker.last_beat(place) < now - SILENT_SECONDS
            ]
            for task in hung:
                task.overdue = True
                task.deadline = min(task.deadline, now)
            if hung or self._was_stopped(worker, now):
                worker.process.kill()

    @staticmethod
    def _was_stopped(worker: WorkerProcess, now: float) -> bool:
        stopped = worker.process.pid is not None and _is_stopped(worker.process.pid)
        worker.stopped_since = (worker.stopped_since or now) if stopped else None
        return stopped and bool(worker.tasks) and now - (worker.stopped_since or now) >= STOPPED_SECONDS

    def kill(self) -> bool:
        """End every worker at once; what it was doing is on disk for the next start.

        Return False if one of them does not end: a file system that is frozen holds it.
        """
        processes = [worker.process for worker in self._workers.values()]
        for process in processes:
            process.kill()
        deadline = time.monotonic() + _KILL_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._selector.close()
        os.close(self._signal)
        self._board.close()
        for worker in self._workers.values():
            worker.channel.close()
        return not any(process.is_alive() for process in processes)


def _is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by a signal."""
    return read_stat(pid)[:1] == [b"T"]


def _size_of(job: AnyJob) -> int:
    """Return the length of a job's file; 0 if there is none."""
    if not isinstance(job, Job):
        return 0
    try:
        return os.lstat(os.path.join(job.directory, job.name)).st_size
    except (OSError, ValueError):
        return 0

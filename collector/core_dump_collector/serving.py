"""Owns the loop of a worker process: take jobs from its channel, work on several at a time, send results back.

The channel keeps the borders of messages (unix(7), SOCK_SEQPACKET), so a message arrives whole or not at all, even if
its sender is killed or stopped. It ends with the daemon, and the worker with it: an orphan must not go on uploading.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from core_dump_collector.jobs import RetryReason, fail

if TYPE_CHECKING:
    import socket

    from core_dump_collector.board import Board
    from core_dump_collector.jobs import AnyJob, AnyResult
    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.flow import Flow
    from core_dump_collector.upload import Worker

MOST_MESSAGE_BYTES = 64 * 1024
"""A path has at most 4,096 bytes, a detail some hundreds."""


def serve(channel: socket.socket, board: Board, index: int, options: UploadOptions) -> None:
    """Work until the daemon has ended.

    SIGINT and SIGTERM are ignored since the fork (`preload`): the daemon decides when workers end.
    """
    from core_dump_collector import upload  # noqa: PLC0415  boto3 stays out of the daemon's memory
    from core_dump_collector.s3.flow import Flow  # noqa: PLC0415

    flow = Flow(board.seat(index))
    board.close()
    worker = upload.Worker(options, flow)
    threads: dict[int, _Thread] = {}
    with contextlib.suppress(OSError):
        while message := channel.recv(MOST_MESSAGE_BYTES):
            place, job = pickle.loads(message)  # noqa: S301  from the daemon, through a socket that nobody else has
            try:
                if place not in threads:
                    threads[place] = _Thread(channel, worker, flow, place)
            except RuntimeError as error:  # too many threads, or no memory: the jobs under way go on
                why = f"no thread can be started: {error}"
                _send(channel, place, job, fail(job, RetryReason.WORKER_DIED, why))
            else:
                threads[place].take(job)
    os._exit(0)


class _Thread:
    """A thread that does the jobs of one place, one after the other."""

    def __init__(self, channel: socket.socket, worker: Worker, flow: Flow, place: int) -> None:
        self._channel = channel
        self._worker = worker
        self._flow = flow
        self._place = place
        self._jobs: SimpleQueue[AnyJob] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=f"job-{place}").start()

    def take(self, job: AnyJob) -> None:
        """Do a job; the daemon gives none to a place that has one."""
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            with self._flow.job(self._place):
                result = self._worker.process(job)
            _send(self._channel, self._place, job, result)


def _send(channel: socket.socket, place: int, job: AnyJob, result: AnyResult) -> None:
    message = pickle.dumps((place, result))
    if len(message) > MOST_MESSAGE_BYTES:
        message = pickle.dumps((place, fail(job, RetryReason.INTERNAL, "the result is too long")))
    with contextlib.suppress(OSError):  # the daemon has ended, and with it this process
        channel.send(message)

"""Owns one worker process as the daemon sees it: its start, the jobs that it has in hand, its results and its end.

Workers come from a fork server that has imported boto3 once, so they share its memory. They need neither semaphores
nor threads of the daemon. A fork server needs a directory for its socket; the watch directory serves if no other does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.board import HEAVY, LIGHT_JOBS
from core_dump_collector.serving import MOST_MESSAGE_BYTES, serve

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from core_dump_collector.board import Board
    from core_dump_collector.jobs import AnyJob, AnyResult
    from core_dump_collector.options import UploadOptions

log = structlog.get_logger()

_PRELOAD = ["__main__", "core_dump_collector.preload"]


def choose_temporary_directory(fallback: str) -> None:
    """Let sockets of the fork server be made in another directory if none of the usual ones is writable."""
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = fallback
        log.warning("no temporary directory is writable; using the watch directory", directory=fallback)


def fork_server() -> ForkServerContext:
    """Return the context of every process that uploads; the first of them starts the fork server, prepared for all."""
    # Read by the C library when the fork server starts (mallopt(3)): each thread would have an arena of its own.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@dataclass(slots=True)
class Task:
    """A job in a worker's hands."""

    job: AnyJob
    began: float
    """Monotonic seconds."""
    deadline: float
    overdue: bool = False
    """The job did not end in time, or made no progress for too long."""


class WorkerProcess:
    """A running worker."""

    def __init__(self, board: Board, index: int, options: UploadOptions) -> None:
        """Start it.

        Raises:
            Exception: no memory, or too many processes or files.
        """
        self.index = index
        self.seat = board.seat(index)
        self.seat.clear()
        self.tasks: dict[int, Task] = {}
        """By their places."""
        self.stopped_since: float | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            self.process = fork_server().Process(target=serve, args=(theirs, board, index, options))
            self.process.start()
            undo.pop_all()
        ours.setblocking(False)
        self.channel = ours

    @property
    def has_heavy_place(self) -> bool:
        """Tell whether it can take a job that may be large."""
        return HEAVY not in self.tasks

    @property
    def free_places(self) -> int:
        """Return how many more small jobs it can take."""
        return LIGHT_JOBS - (len(self.tasks) - (HEAVY in self.tasks))

    def give(self, task: Task, *, heavy: bool) -> None:
        """Hand it a job.

        Raises:
            OSError: it is dead, or its channel is full.
        """
        place = HEAVY if heavy else next(n for n in range(HEAVY) if n not in self.tasks)
        self.channel.send(pickle.dumps((place, task.job)))
        self.tasks[place] = task

    def results(self) -> list[AnyResult]:
        """Return the results that are in, without waiting."""
        found: list[AnyResult] = []
        with contextlib.suppress(OSError, EOFError):
            while message := self.channel.recv(MOST_MESSAGE_BYTES):
                place, result = pickle.loads(message)  # noqa: S301  from a process of ours, through a socket of ours
                del self.tasks[place]
                found.append(result)
        return found

    def last_beat(self, place: int) -> float:
        """Return when a job last made progress."""
        return max(self.tasks[place].began, self.seat.beaten_at(place))

    @property
    def is_dead(self) -> bool:
        """Tell whether it has ended."""
        return not self.process.is_alive()

    def close(self) -> None:
        """Forget a worker that is dead."""
        self.channel.close()
        with contextlib.suppress(ValueError):
            self.process.close()

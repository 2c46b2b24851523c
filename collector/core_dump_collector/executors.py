"""Owns how worker processes are started where a host lacks something that Python's own way needs.

A fork server needs a directory for its socket, a process pool needs POSIX semaphores (/dev/shm). Without the first,
the watch directory serves; without the second, one thread of the daemon does the work.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger()


def choose_temporary_directory(fallback: str) -> None:
    """Let sockets of the fork server be made in another directory if none of the usual ones is writable."""
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = fallback
        log.warning("no temporary directory is writable; using the watch directory", directory=fallback)


class Starter:
    """Starts executors, each with the same workers; used again when a worker has died."""

    def __init__(
        self, workers: int, preload: list[str], initializer: Callable[..., None], arguments: tuple[Any, ...]
    ) -> None:
        """Look once whether processes can share a queue here."""
        self._workers = workers
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(preload)
        self._initializer = initializer
        self._arguments = arguments
        self.has_processes = self._look_for_semaphores()
        """Jobs run in processes of their own, not in a thread."""

    def start(self) -> Executor:
        """Return a new executor."""
        if self.has_processes:
            return ProcessPoolExecutor(
                self._workers,
                mp_context=self._context,
                initializer=self._initializer,
                initargs=self._arguments,
            )
        return ThreadPoolExecutor(1, initializer=self._initializer, initargs=self._arguments)

    def _look_for_semaphores(self) -> bool:
        try:
            self._context.Lock()
        except (OSError, ImportError) as error:
            log.warning(
                "no semaphores (is /dev/shm a writable tmpfs?); one dump at a time is uploaded, by the daemon itself",
                error=str(error),
            )
            return False
        return True

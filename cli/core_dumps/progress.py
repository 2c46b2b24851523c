"""Owns progress bars: on standard error, and only if that is a terminal."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID


class Bars:
    """One bar at a time; silent if standard error is not a terminal."""

    def __init__(self) -> None:
        """Check whether standard error is a terminal."""
        columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(
            *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
        )
        self._lock = threading.Lock()
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bars."""
        self._progress.stop()

    def start(self, what: str, total_bytes: int | None) -> None:
        """Begin a stage."""
        with self._lock:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=total_bytes)

    def advance(self, count: int) -> None:
        """Count bytes of the stage."""
        with self._lock:
            if self._task is not None:
                self._progress.advance(self._task, count)

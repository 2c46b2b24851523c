"""Owns logging: structlog to standard error, JSON for machines, text on a terminal.

A thread writes the lines. A reader that stops reading, or goes away, costs lines and holds up nothing.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any

import structlog

from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import TextIO

    from core_dump_collector.config import Settings

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_MOST_BYTES = 2000
MOST_LINES = 2000
"""Lines that wait for the reader; more are dropped and counted."""
FLUSH_SECONDS = 2.0
"""At the end, for a reader that is slow."""


class LogWriter:
    """A text stream whose `write` never blocks and never fails."""

    def __init__(self, stream: TextIO | None) -> None:
        """Start the thread; without a stream every line is dropped."""
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(MOST_LINES)
        self._told = 0
        self.dropped = 0
        """Lines that nobody will read."""
        threading.Thread(target=self._pump, daemon=True, name="log").start()

    def write(self, line: str) -> int:
        """Hand a line to the thread, or drop it if too many wait."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1
        return len(line)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can; `drain` waits for it."""

    def drain(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until everything is written, at most so long."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)

    def _pump(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._put(line)
                self._tell()
            except (OSError, ValueError):  # its reader is gone, or it was closed
                self.dropped += 1
            finally:
                self._lines.task_done()

    def _tell(self) -> None:
        """Log how many lines were dropped since the last time."""
        missed = self.dropped - self._told
        if missed:
            self._told += missed
            structlog.get_logger().warning("log lines were dropped: nobody read them in time", lines=missed)

    def _put(self, line: str) -> None:
        if self._stream is None:
            raise ValueError("standard error is closed")
        self._stream.write(line)
        self._stream.flush()


def configure(settings: Settings) -> LogWriter:
    """Set structlog up once, at start, by LOG_LEVEL and LOG_FORMAT; return where its lines go."""
    writer = LogWriter(sys.stderr)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and is_terminal)
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=is_terminal)]
        if as_text
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _escape,
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.log_level]),
        logger_factory=structlog.WriteLoggerFactory(writer),  # type: ignore[arg-type]  # it writes and flushes
        cache_logger_on_first_use=True,
    )
    return writer


def _escape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make every text printable: a hostile file name must not start a new line or a terminal escape."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable(value, _MOST_BYTES)
    return event

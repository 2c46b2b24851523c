"""Owns logging: structlog to standard error, JSON for machines, text on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from core_dump_collector.config import Settings

_MOST_BYTES = 2000
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def _escape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make every text printable: a hostile file name must not start a new line or a terminal escape."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable(value, _MOST_BYTES)
    return event


def configure(settings: Settings) -> None:
    """Set structlog up once, at start, by LOG_LEVEL and LOG_FORMAT."""
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

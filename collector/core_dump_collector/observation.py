"""Owns the rule that observation ends nothing: a look that fails is counted, logged once, and repeated later."""

from __future__ import annotations

import traceback
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import Counter

log = structlog.get_logger()
T = TypeVar("T")


class Look(StrEnum):
    """What the daemon looks at; bounded, so it can be a metric label."""

    INOTIFY = "inotify"
    DIRECTORY = "directory"
    SCAN = "scan"
    FREE_SPACE = "free_space"
    OWNER = "owner"
    POD = "pod"
    CORE_PATTERN = "core_pattern"
    QUARANTINE = "quarantine"
    RECORDS = "records"
    KERNEL_LOG = "kernel_log"
    KERNEL_LOG_POSITION = "kernel_log_position"
    HELPER = "helper"
    WORKERS = "workers"
    OVERVIEW = "overview"
    MODULES = "modules"
    STARTUP_FILE = "startup_file"


class Observer:
    """Makes each look safe, and tells the log when its result changes."""

    def __init__(self, failures: Counter) -> None:
        """Count failures in a metric with the label `what`."""
        self._failures = failures
        self._reported: dict[Look, str] = {}

    def look(self, what: Look, call: Callable[[], T]) -> T | None:
        """Return what the call returns, or None if it fails, whatever it raises."""
        try:
            result = call()
        except OSError as error:
            self.fail(what, error.strerror or str(error))
            return None
        except Exception as error:  # noqa: BLE001  the boundary between looking and collecting
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(what, f"{where.filename.rpartition('/')[2]}:{where.lineno}: {error!r}")
            return None
        self.succeed(what)
        return result

    def fail(self, what: Look, why: str, **details: object) -> None:
        """Count a failure; log it unless the previous look failed for the same reason."""
        self._failures.labels(what).inc()
        if self._reported.get(what) != why:
            self._reported[what] = why
            log.error("cannot observe", what=what, error=why[:500], **details)

    def succeed(self, what: Look) -> None:
        """Log that a look succeeds again."""
        if self._reported.pop(what, None) is not None:
            log.info("can observe again", what=what)

"""Errors that cross module boundaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core_dump_collector.jobs import RetryReason


class ConfigError(Exception):
    """A setting or the node is not as it must be; the message is one line and says what to do."""


class RetryableError(Exception):
    """The upload failed for a reason that can pass."""

    def __init__(self, reason: RetryReason, detail: str) -> None:
        """Keep the bounded reason beside the text."""
        super().__init__(detail)
        self.reason = reason


class PermanentError(Exception):
    """The store refuses this object for good."""

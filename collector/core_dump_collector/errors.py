"""Errors that cross module boundaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core_dump_collector.jobs import RetryReason


class ConfigError(Exception):
    """A setting or the node is not as it must be; the message is one line and says what to do."""


class RetryableError(Exception):
    """The upload failed for a reason that can pass."""

    def __init__(self, reason: RetryReason, detail: str, *, outcome_unknown: bool = False) -> None:
        """Keep the bounded reason beside the text.

        Args:
            reason: bounded, for the metric.
            detail: one line for the log.
            outcome_unknown: the request may have been carried out: its answer was lost or unclear.
        """
        super().__init__(detail)
        self.reason = reason
        self.outcome_unknown = outcome_unknown


class PermanentError(Exception):
    """The store refuses this object for good."""

"""Owns the exceptions of the store's side. botocore's own never leave this package.

Exception                      raised by                     caught by
└── StoreError
    ├── RetryableError         classify, store, publish,     upload.Worker: the dump waits for another attempt
    │   │                      documents, multipart
    │   ├── ConflictError      store (409)                   multipart, transfer: the upload starts again
    │   └── UnprovenError      publish, transfer, documents  upload.Worker: the dump waits longer; storecheck
    ├── PermanentError         classify                      upload.Worker: the dump goes to quarantine/
    ├── TakenError             store (412)                   publish: is the object under the key this dump?
    ├── ConditionRefusedError  store (400, 412, 501)         publish, documents: again, without the condition
    ├── GoneError              store (NoSuchUpload)          publish: completed? transfer: to be started again
    ├── HeadRefusedError       store (4xx to HEAD)           publish, transfer, documents: nobody can look
    ├── CollisionError         publish                       transfer: the next key
    └── OwnKeyNeededError      publish, transfer             transfer: the key that is derived from the content
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_dump_collector.jobs import RetryReason

if TYPE_CHECKING:
    from core_dump_collector.metadata import StoredObject


class StoreError(Exception):
    """A request to the store did not end as it should."""


class RetryableError(StoreError):
    """The upload failed for a reason that can pass."""

    def __init__(self, reason: RetryReason, detail: str, *, outcome_unknown: bool = False) -> None:
        """Keep the bounded reason beside the text.

        Args:
            reason: bounded, for the metric.
            detail: one line for the log.
            outcome_unknown: the request may have been carried out: its response was lost or unclear.
        """
        super().__init__(detail)
        self.reason = reason
        self.outcome_unknown = outcome_unknown


class ConflictError(RetryableError):
    """Another conditional request for the key is in progress (409): a multipart upload has to start again."""

    def __init__(self, detail: str) -> None:
        """Keep the store's words."""
        super().__init__(
            RetryReason.SERVER,
            f"{detail} (another request is writing to the key; if this stays, set CONDITIONAL=false)",
        )


class UnprovenError(RetryableError):
    """The store may have the object, and nothing proves it."""

    def __init__(self, advice: str) -> None:
        """Say which permission or setting would provide a proof."""
        super().__init__(RetryReason.UNPROVEN, f"nothing proves that the store has it whole: {advice}")


class PermanentError(StoreError):
    """The store refuses this object, whoever sends it and however often."""


class TakenError(StoreError):
    """The key is taken: If-None-Match was not fulfilled (412)."""

    def __init__(self, *, by_us: bool = False) -> None:
        """Say whether an earlier request of the same call, with unknown outcome, may have taken it."""
        super().__init__("the key is taken")
        self.by_us = by_us


class ConditionRefusedError(StoreError):
    """The store refuses a request that has If-None-Match, perhaps because of it."""


class GoneError(StoreError):
    """The multipart upload does not exist any more: completed, aborted or expired."""

    def __init__(self, *, by_us: bool = False) -> None:
        """Say whether an earlier request of the same call, with unknown outcome, may have completed it."""
        super().__init__("the multipart upload is gone")
        self.by_us = by_us


class HeadRefusedError(StoreError):
    """The store does not answer a HEAD request; normal for an identity that may only write."""

    def __init__(self, status: int) -> None:
        """Keep the HTTP status."""
        super().__init__(f"HEAD is refused with {status}")
        self.status = status


class CollisionError(StoreError):
    """Another object has the key, or one that nobody can look at."""

    def __init__(self, stored: StoredObject, *, seen: bool) -> None:
        """Remember what the dump would be under the key, and whether the other object was seen."""
        super().__init__("the key is taken by another object")
        self.stored = stored
        self.seen = seen


class OwnKeyNeededError(StoreError):
    """The store knows no conditions and refuses HEAD: nothing tells whether the key is free."""

    def __init__(self, size_bytes: int, crc32: int) -> None:
        """Remember the size and the CRC-32 from which a practically unique key is made."""
        super().__init__("the key may be taken")
        self.size_bytes = size_bytes
        self.crc32 = crc32

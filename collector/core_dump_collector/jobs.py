"""Owns the messages between daemon and workers: one job in, one result out, all frozen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core_dump_collector.node.dumpfile import Identity


class Outcome(StrEnum):
    """How the work on one file ended; bounded, so it can be a metric label."""

    UPLOADED = "uploaded"
    ALREADY_STORED = "already_stored"
    """S3 already had the same bytes under the key, from an earlier attempt whose response was lost."""
    VANISHED = "vanished"
    """The file was deleted or moved before the collector opened it."""
    BUSY = "busy"
    """A writer still has it open; its close will be seen by the watch."""
    REFUSED = "refused"
    """The collector does not touch it (a symlink, hard link, FIFO, ...); it stays where it is."""
    QUARANTINED = "quarantined"
    """S3 refuses it for good; moved to quarantine/."""
    DISCARDED = "discarded"
    """Deleted without being stored, because it is older than DISCARD_AFTER_SECONDS."""
    RETRY = "retry"
    """Failed for a reason that can pass; the file is still on disk."""


STORED_OUTCOMES = frozenset({Outcome.UPLOADED, Outcome.ALREADY_STORED})
"""The bucket has the dump."""


class RetryReason(StrEnum):
    """Why an upload will be tried again; bounded, so it can be a metric label."""

    NETWORK = "network"
    THROTTLED = "throttled"
    SERVER = "server"
    CREDENTIALS = "credentials"
    FORBIDDEN = "forbidden"
    NO_SUCH_BUCKET = "no_such_bucket"
    CHECKSUM = "checksum"
    UNPROVEN = "unproven"
    """The store may have the dump, and nothing proves it: the log says which permission or setting would."""
    LOCAL_IO = "local_io"
    WORKER_DIED = "worker_died"
    TIMEOUT = "timeout"
    """The job did not end by its deadline."""
    INTERNAL = "internal"

    @property
    def needs_operator(self) -> bool:
        """Return true if retries fail until somebody changes a policy or a setting: they are slow."""
        return self in {RetryReason.FORBIDDEN, RetryReason.NO_SUCH_BUCKET, RetryReason.UNPROVEN}


@dataclass(frozen=True, slots=True)
class Undeleted:
    """A dump that is stored, whole, and whose file could not be deleted."""

    identity: Identity
    key: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the loop knows about a file without opening it."""

    size_bytes: int
    modified_ns: int
    """Modification time, Unix nanoseconds."""
    unchanged_seconds: float
    """For how long both have been seen as they are, on the monotonic clock."""
    undeleted: Undeleted | None = None
    """What an earlier attempt stored under this name, and could not delete."""


@dataclass(frozen=True, slots=True)
class Job:
    """One file of the watch directory, by name (undecodable bytes as surrogate escapes)."""

    directory: str
    name: str
    sighting: Sighting | None = None
    discard: bool = False
    """Delete the file instead: it is older than DISCARD_AFTER_SECONDS."""


@dataclass(frozen=True, slots=True)
class Salvage:
    """One partial dump whose helper may be dead, by name."""

    directory: str
    name: str


@dataclass(frozen=True, slots=True)
class SalvageResult:
    """What became of one partial dump."""

    name: str
    published: str | None = None
    """The name under which it waits now; empty if it held nothing and was removed; None if it is left alone."""
    detail: str = ""
    """Why it could not be salvaged, if that is a fault."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question to the store: does it answer, and know bucket and credentials?"""

    name: str = "probe"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The answer to a probe."""

    reason: RetryReason | None = None
    """None if bucket and credentials are known to the store."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A record without a dump: what the helper refused."""

    name: str
    """`.helper/` and the last segment of the key."""
    facts: tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, slots=True)
class RecordResult:
    """What became of one `Document`."""

    name: str
    retry_reason: RetryReason | None = None
    """None if it is stored."""
    detail: str = ""
    """One line for the log, without control characters."""

    @property
    def stored(self) -> bool:
        """Tell whether the bucket has the document."""
        return self.retry_reason is None


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What became of one dump."""

    name: str
    outcome: Outcome
    key: str | None = None
    read_bytes: int = 0
    """Bytes read from the local file."""
    stored_bytes: int = 0
    """Size of the object in S3."""
    seconds: float = 0.0
    signal: int | None = None
    truncated: str | None = None
    """Reason as in docs/contracts.md, None for a whole dump."""
    sensitive: bool = False
    retry_reason: RetryReason | None = None
    detail: str = ""
    """One line for the log, without control characters."""
    crashed_at: int | None = None
    """Unix seconds, as the kernel says, if the dump is stored."""
    helper_version: str = ""
    """Of the helper that wrote the dump, if nobody else can have said so."""
    undeleted: Undeleted | None = None
    """Set if the dump is stored and only deleting it has to be tried again."""


AnyJob = Job | Document | Salvage | Probe
AnyResult = UploadResult | RecordResult | SalvageResult | ProbeResult


def fail(job: AnyJob, reason: RetryReason, detail: str) -> AnyResult:
    """Return the result of a job that failed for a reason that can pass."""
    match job:
        case Salvage():
            return SalvageResult(job.name, detail=detail)
        case Document():
            return RecordResult(job.name, reason, detail)
        case Probe():
            return ProbeResult(reason, detail)
        case _:
            return UploadResult(job.name, Outcome.RETRY, retry_reason=reason, detail=detail)

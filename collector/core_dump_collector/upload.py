"""Owns the worker's side of a job: one dump from the disk to S3, proven, and only then deleted.

`Worker.process` turns every outcome into one result. `s3/sources` owns the bytes that are sent, `s3/transfer` the way
they are sent, `s3/store` the requests.
"""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core_dump_collector import fingerprint, metadata, modulelist
from core_dump_collector.jobs import (
    Document,
    Job,
    Outcome,
    Probe,
    ProbeResult,
    RecordResult,
    RetryReason,
    Salvage,
    SalvageResult,
    Undeleted,
    UploadResult,
    fail,
)
from core_dump_collector.node import dumpfile
from core_dump_collector.s3 import documents, record, sources
from core_dump_collector.s3.errors import PermanentError, RetryableError
from core_dump_collector.s3.flow import Flow
from core_dump_collector.s3.stores import Stores
from core_dump_collector.s3.transfer import Transfer
from core_dump_format.attributes import SALVAGED
from core_dump_format.keys import build_key
from core_dump_format.reorder import ORDER_VERSION
from core_dump_format.text import printable

if TYPE_CHECKING:
    from core_dump_collector.jobs import AnyJob, AnyResult
    from core_dump_collector.metadata import Facts, StoredObject
    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.record import Attempt
    from core_dump_collector.s3.store import Store

MOST_BYTES = 50 << 40
"""Longer files are refused: this is S3's largest object (48.8 TiB; Amazon S3 User Guide, "Uploading objects"), and a
sparse file of 8 EiB would keep a worker busy for years."""
LEAST_PART_BYTES = 5 << 20
"""S3's smallest part (Amazon S3 User Guide, "Multipart upload limits")."""
_OUTCOME_OF_UNFIT = {
    dumpfile.Unfit.VANISHED: Outcome.VANISHED,
    dumpfile.Unfit.BUSY: Outcome.BUSY,
    dumpfile.Unfit.REFUSED: Outcome.REFUSED,
}


class Worker:
    """Processes the jobs of one worker process, several at a time, with one S3 client that the first job makes."""

    def __init__(self, options: UploadOptions, flow: Flow | None = None) -> None:
        """Remember the options; without a flow, nobody limits how much is sent."""
        self._options = options
        self._flow = flow or Flow()
        self._stores = Stores(options, self._flow)
        self._fingerprinting = threading.Lock()
        """Fingerprints are work for the CPU: one at a time keeps each within its time limit."""

    def process(self, job: AnyJob) -> AnyResult:
        """Upload and delete a dump, salvage a partial, store a record or probe the store. Never raises."""
        started = time.monotonic()
        try:
            result = self._run(job)
        except Exception as error:  # noqa: BLE001  the worker's boundary: a fault of ours must not end the pool
            result = fail(job, *_explain(error))
        if isinstance(result, UploadResult):
            return replace(result, seconds=time.monotonic() - started, detail=printable(result.detail))
        return result

    def _run(self, job: AnyJob) -> AnyResult:
        match job:
            case Salvage():
                return SalvageResult(job.name, dumpfile.salvage(job.directory, job.name))
            case Document():
                return self._store_record(job)
            case Probe():
                with self._stores.lease() as store:
                    store.probe(f"{self._options.node_folder}.probe")
                return ProbeResult()
            case _:
                return self._upload(job)

    def close(self) -> None:
        """Close the client; the next job makes one."""
        self._stores.close()

    def open_store(self) -> Store:
        """Return the store; make its client, from the environment, if there is none.

        Raises:
            RetryableError: the client cannot be made now.
        """
        return self._stores.open()

    def _store_record(self, document: Document) -> RecordResult:
        """Store a suppressed-crash record."""
        key = metadata.record_key(document, self._options)
        try:
            rendered = metadata.render_record(document, key, self._options)
            with self._stores.lease() as store:
                documents.put(store, key, rendered)
        except PermanentError as error:
            raise RetryableError(RetryReason.SERVER, str(error)) from error
        return RecordResult(document.name)

    def _upload(self, job: Job) -> UploadResult:
        try:
            with dumpfile.DumpFile(job.directory, job.name, job.sighting) as dump:
                if job.discard and dump.unlink():
                    return UploadResult(job.name, Outcome.DISCARDED)
                known = job.sighting.undeleted if job.sighting else None
                if known is not None and known.identity == dump.identity:
                    return _delete_stored(dump, known)
                return self._upload_open(dump, job.directory)
        except dumpfile.UnfitError as unfit:
            return UploadResult(job.name, _OUTCOME_OF_UNFIT[unfit.why], detail=str(unfit))

    def _upload_open(self, dump: DumpFile, directory: str) -> UploadResult:
        options, raw = self._options, dump.attributes()
        facts = metadata.gather(dump, raw, options)
        if facts.sensitive is not None and not options.upload_sensitive:
            return _result(dump, facts, Outcome.REFUSED, f"sensitive ({facts.sensitive}): left on disk")
        if dump.size_bytes > MOST_BYTES:
            return _result(dump, facts, Outcome.REFUSED, "larger than any object of S3: left on disk")
        dump.require_deletable()
        salvaged = SALVAGED in raw
        attempt = record.read(raw, trusted=dump.is_trusted)
        ordered = attempt is None or attempt.order == ORDER_VERSION
        read = sources.open_source(
            dump,
            self._part_bytes(attempt),
            compress_raw=options.compress_raw,
            salvaged=salvaged,
            ordered=ordered,
        )
        facts = facts.with_attributes(read.facts)
        suffix = ".gz" if read.gzip else ""
        key = build_key(options.prefix, options.key_template, facts.key_fields(), suffix=suffix)
        try:
            with self._stores.lease() as store:
                transfer = Transfer(store, dump, read, attempt, _headers(facts, read))
                stored, outcome = transfer.run(key)
                if options.metadata:
                    rendered = metadata.render(facts, stored, options.bucket, self._fingerprint(dump, facts))
                    documents.put(store, stored.key + ".json", rendered)
        except PermanentError as error:
            name = dump.quarantine()
            return _result(dump, facts, Outcome.QUARANTINED, f"{error}; moved to quarantine/{name}")
        if options.modules:
            modulelist.pass_on(store, dump, directory, stored.key, facts.sensitive or "")
        return _delete(dump, facts, stored, outcome, transfer.note)

    def _part_bytes(self, attempt: Attempt | None) -> int:
        """Return the least size of parts: that of an earlier attempt, whose parts the store may have."""
        most = self._options.part_bytes
        if attempt is not None and LEAST_PART_BYTES <= attempt.part_bytes <= most:
            return attempt.part_bytes
        return min(LEAST_PART_BYTES, most) if self._flow.wants_small_parts else most

    def _fingerprint(self, dump: DumpFile, facts: Facts) -> dict[str, str | int]:
        """Return the fingerprint's fields; none if the setting is off, or neither attributes nor core contain them."""
        if not self._options.fingerprint:
            return {}
        try:
            found = fingerprint.fingerprint_of_attributes(facts.attributes)
            if found is None:
                with self._fingerprinting:
                    found = fingerprint.fingerprint_of_file(dump.fd)
        except Exception:  # noqa: BLE001  hostile bytes may cost the metadata, never the dump
            return {}
        return found.fields() if found else {}


def _explain(error: Exception) -> tuple[RetryReason, str]:
    """Return the reason of a retry and its text."""
    match error:
        case RetryableError():
            return error.reason, printable(str(error))
        case OSError():
            return RetryReason.LOCAL_IO, printable(error.strerror or str(error))
        case _:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            return RetryReason.INTERNAL, printable(f"{place}: {type(error).__name__}: {error}")


def _delete(dump: DumpFile, facts: Facts, stored: StoredObject, outcome: Outcome, note: str) -> UploadResult:
    """Delete the local file: the store has it."""
    if not dump.is_unchanged():
        record.clear(dump)
        raise RetryableError(RetryReason.LOCAL_IO, "the file was written to while it was uploaded")
    try:
        detail = note if dump.unlink() else "somebody else deleted or replaced the file in the meantime"
    except OSError as error:
        return _keep(dump, Undeleted(dump.identity, stored.key), error)
    return _result(dump, facts, outcome, detail, stored)


def _delete_stored(dump: DumpFile, known: Undeleted) -> UploadResult:
    """Delete a file that an earlier attempt stored."""
    try:
        dump.unlink()
    except OSError as error:
        return _keep(dump, known, error)
    return UploadResult(dump.name, Outcome.ALREADY_STORED, key=known.key, read_bytes=dump.size_bytes)


def _keep(dump: DumpFile, known: Undeleted, error: OSError) -> UploadResult:
    """Return the result of a dump that is stored and cannot be deleted now."""
    return UploadResult(
        dump.name,
        Outcome.RETRY,
        key=known.key,
        retry_reason=RetryReason.LOCAL_IO,
        detail=f"it is stored, but the file cannot be deleted: {error.strerror}",
        undeleted=known,
    )


def _headers(facts: Facts, read: sources.Source) -> dict[str, Any]:
    kind = "application/gzip" if read.gzip else "application/octet-stream"
    return {"ContentType": kind, "Metadata": facts.user_metadata()}


def _result(
    dump: DumpFile, facts: Facts, outcome: Outcome, detail: str, stored: StoredObject | None = None
) -> UploadResult:
    return UploadResult(
        dump.name,
        outcome,
        key=stored.key if stored else None,
        read_bytes=dump.size_bytes if stored else 0,
        stored_bytes=stored.size_bytes if stored else 0,
        signal=facts.signal,
        truncated=facts.truncated,
        sensitive=facts.sensitive is not None,
        detail=detail,
        crashed_at=facts.timestamp if stored and "timestamp" in facts.attributes else None,
        helper_version=str(facts.attributes.get("helper_version", "")) if dump.is_trusted else "",
    )

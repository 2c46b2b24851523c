"""The worker's entry: one dump from the disk to S3, proven, and only then deleted.

`process` turns whatever happens into one result; `_upload` is the way of a dump. What is sent is `source`'s, how
it is sent `transfer`'s, the requests are `store`'s.
"""

from __future__ import annotations

import time
import traceback
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError

from core_dump_collector import fingerprint, metadata
from core_dump_collector.errors import ConfigError, PermanentError, RetryableError
from core_dump_collector.jobs import Document, Job, Outcome, RetryReason, UploadResult
from core_dump_collector.node import dumpfile
from core_dump_collector.s3 import classify, parts, record
from core_dump_collector.s3.client import make_client
from core_dump_collector.s3.store import Store, TakenError, UnconditionalStoreError
from core_dump_collector.s3.transfer import Transfer
from core_dump_format.attributes import SALVAGED
from core_dump_format.keys import build_key
from core_dump_format.text import printable

if TYPE_CHECKING:
    from core_dump_collector.config import Settings
    from core_dump_collector.metadata import Facts, StoredObject
    from core_dump_collector.node.dumpfile import DumpFile

MOST_BYTES = 50 << 40
"""Length of the longest file taken: S3's largest object (48.8 TiB; Amazon S3 User Guide, "Uploading objects"). A sparse
file of 8 EiB would keep a worker busy for years."""
_OUTCOME_OF_UNFIT = {
    dumpfile.Unfit.VANISHED: Outcome.VANISHED,
    dumpfile.Unfit.BUSY: Outcome.BUSY,
    dumpfile.Unfit.REFUSED: Outcome.REFUSED,
}
_ADVICE = {
    RetryReason.FORBIDDEN: "allow s3:PutObject on it (docs/iam.md has the policy)",
    RetryReason.NO_SUCH_BUCKET: "create it, or correct BUCKET_NAME, AWS_REGION or AWS_ENDPOINT_URL_S3",
    RetryReason.CREDENTIALS: "give this process credentials as boto3 expects them, and check the clock",
}


def process(job: Job | Document, settings: Settings) -> UploadResult:
    """Bring one file to S3 and delete it, or store one record. Never raises."""
    started = time.monotonic()
    try:
        result = _store(job, settings) if isinstance(job, Document) else _process(job, settings)
    except RetryableError as error:
        if error.reason == RetryReason.CREDENTIALS:
            _CONNECTION.close()  # whatever renews them, files or environment, is read again
        result = _retry(job, error.reason, str(error))
    except OSError as error:
        result = _retry(job, RetryReason.LOCAL_IO, error.strerror or str(error))
    except Exception as error:  # noqa: BLE001  the worker's boundary: a fault of ours must not end the pool
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        result = _retry(job, RetryReason.INTERNAL, f"{place}: {type(error).__name__}: {error}")
    return replace(result, seconds=time.monotonic() - started, detail=printable(result.detail))


def verify_store(settings: Settings) -> str:
    """Store a probe object, try to store it again, and delete it; return what that has shown.

    Raises:
        ConfigError: somebody has to change something; the message says what.
        RetryableError: the store cannot be reached, or not now.
    """
    store = _CONNECTION.store(settings)
    key = f"{settings.prefix}{settings.node_name}/.check-{uuid.uuid4()}"
    document = b'{"written by": "core-dump-collector check"}\n'
    try:
        store.put_probe(key, document)
        kept = _second_probe(store, key, document)
    except UnconditionalStoreError:
        store.put_probe(key, document)
        kept = "the store does not know If-None-Match: keys are looked at before they are written"
    except PermanentError as error:
        raise ConfigError(str(error)) from error
    except RetryableError as error:
        if error.reason in _ADVICE:
            raise ConfigError(f"{error}: {_ADVICE[error.reason]}") from error
        raise
    deleted = "and deleted" if store.delete(key) else f"and stays ({key}: deleting is not allowed)"
    return f"a probe object was stored {deleted}; {kept}"


def _second_probe(store: Store, key: str, document: bytes) -> str:
    try:
        store.put_probe(key, document)
    except TakenError:
        return "a second one under its key was refused"
    return "WARNING: the store ignores If-None-Match, so a dump may replace another of the same key"


class _Connection:
    """The process's one S3 client, made with its first job."""

    def __init__(self) -> None:
        self._open: tuple[Settings, Store] | None = None

    def store(self, settings: Settings) -> Store:
        if self._open is None or self._open[0] != settings:
            self.close()
            try:
                client = make_client(settings)
            except BotoCoreError as error:
                raise classify.translate(error) from error
            self._open = (settings, Store(client, settings))
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


_CONNECTION = _Connection()


def _process(job: Job, settings: Settings) -> UploadResult:
    try:
        with dumpfile.DumpFile(job.directory, job.name) as dump:
            return _upload(dump, settings)
    except dumpfile.UnfitError as unfit:
        return UploadResult(job.name, _OUTCOME_OF_UNFIT[unfit.why], detail=str(unfit))


def _store(document: Document, settings: Settings) -> UploadResult:
    """Store a record without a dump; one that is there already is the same."""
    key = f"{settings.prefix}{settings.node_name}/{document.name.rpartition('/')[2]}"
    try:
        _CONNECTION.store(settings).put_document(key, metadata.render_record(document, key, settings))
    except PermanentError as error:
        raise RetryableError(RetryReason.SERVER, str(error)) from error
    return UploadResult(document.name, Outcome.UPLOADED, key=key)


def _retry(job: Job | Document, reason: RetryReason, detail: str) -> UploadResult:
    return UploadResult(job.name, Outcome.RETRY, retry_reason=reason, detail=detail)


def _upload(dump: DumpFile, settings: Settings) -> UploadResult:
    raw = dump.attributes()
    facts = metadata.gather(dump, raw, settings)
    if facts.sensitive is not None and not settings.upload_sensitive:
        return _result(dump, facts, Outcome.REFUSED, f"sensitive ({facts.sensitive}): left on disk")
    if dump.size_bytes > MOST_BYTES:
        return _result(dump, facts, Outcome.REFUSED, "larger than any object of S3: left on disk")
    dump.require_deletable()
    salvaged = SALVAGED in raw
    read = parts.open_source(dump, settings.part_bytes, compress_raw=settings.compress_raw, salvaged=salvaged)
    suffix = ".gz" if read.gzip else ""
    key = build_key(settings.prefix, settings.key_template, facts.key_fields(), suffix=suffix)
    store = _CONNECTION.store(settings)
    transfer = Transfer(store, dump, read, record.read(raw, trusted=dump.is_trusted), _headers(facts, read))
    try:
        stored, outcome = transfer.run(key)
        if settings.sidecar:
            crash = _fingerprint(dump) if settings.fingerprint else {}
            store.put_document(stored.key + ".json", metadata.render(facts, stored, settings.bucket, crash))
    except PermanentError as error:
        name = dump.quarantine()
        return _result(dump, facts, Outcome.QUARANTINED, f"{error}; moved to quarantine/{name}")
    if not dump.is_unchanged():
        record.clear(dump)
        raise RetryableError(RetryReason.LOCAL_IO, "the file was written to while it was uploaded")
    detail = "" if dump.unlink() else "deleted or replaced by somebody else meanwhile"
    return _result(dump, facts, outcome, detail, stored)


def _fingerprint(dump: DumpFile) -> dict[str, str]:
    """Return what tells this crash apart from others; nothing where the core does not say."""
    try:
        found = fingerprint.fingerprint_of_file(dump.fd)
    except Exception:  # noqa: BLE001  hostile bytes may cost the metadata, never the dump
        return {}
    return found.fields() if found else {}


def _headers(facts: Facts, read: parts.Source) -> dict[str, Any]:
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
    )

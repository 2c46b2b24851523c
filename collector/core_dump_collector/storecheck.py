"""Owns the store's part of `core-dump-collector check`: a probe object, stored as a dump is, and its result."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from core_dump_collector.errors import ConfigError
from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3 import classify, documents
from core_dump_collector.s3.errors import (
    ConditionRefusedError,
    HeadRefusedError,
    PermanentError,
    RetryableError,
    TakenError,
    UnprovenError,
)
from core_dump_collector.upload import Worker
from core_dump_format.advice import ADVICE
from core_dump_format.keys import MODULES_FOLDER

if TYPE_CHECKING:
    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.store import Store

_PROBE = b'{"written by": "core-dump-collector check"}\n'
_ADVICE = {
    RetryReason.FORBIDDEN: "allow s3:PutObject on it (docs/iam.md has the policy)",
    RetryReason.NO_SUCH_BUCKET: "create it, or correct BUCKET_NAME, AWS_REGION or AWS_ENDPOINT_URL_S3",
    RetryReason.NETWORK: ADVICE["EndpointConnectionError"],
    RetryReason.CREDENTIALS: "give this process credentials as boto3 expects them, and check the clock",
}
_NOT_SEEN = (
    "; HEAD is refused, so a dump whose response is lost stays on the node until s3:GetObject is allowed "
    "(docs/iam.md)"
)
_NOT_LISTED = (
    "; unfinished multipart uploads cannot be listed (s3:ListBucketMultipartUploads), so a lifecycle rule "
    "(AbortIncompleteMultipartUpload) has to remove those of a collector that was killed"
)

_NO_MODULES = (
    "; WARNING: the executables and libraries of crashed processes cannot be stored, so dumps open only where their "
    "images are: allow s3:PutObject on {} too (docs/iam.md), or set MODULES=false"
)


def verify_store(options: UploadOptions) -> str:
    """Store a probe object with proof, try to store it again, and delete it; return what that has shown.

    Raises:
        ConfigError: the probe failed; the message says what to do.
    """
    key = f"{options.node_folder}.check-{uuid.uuid4()}"
    with contextlib.closing(Worker(options)) as worker:
        try:
            store = worker.open_store()
            return _verify(store, key) + (_probe_modules(store, options.prefix) if options.modules else "")
        except PermanentError as error:
            raise ConfigError(str(error)) from error
        except UnprovenError as error:
            raise ConfigError(f"{error}; until then no dump is deleted from the node") from error
        except RetryableError as error:
            raise ConfigError(_with_advice(error)) from error


def _verify(store: Store, key: str) -> str:
    try:
        kept = _probe(store, key) + _limits(store, key)
    finally:
        deleted = store.delete(key)
    left = "and deleted" if deleted else f"and stays ({key}: deleting is not allowed)"
    return f"a probe object was stored {left}; {kept}"


def _probe(store: Store, key: str) -> str:
    """Store an object with proof, and again; return what the second request has shown."""
    if not store.condition.is_used:
        documents.put(store, key, _PROBE)
        return "CONDITIONAL=false: keys are looked at before they are written"
    try:
        found = store.put_document(key, _PROBE, conditional=True)
    except ConditionRefusedError:
        documents.put(store, key, _PROBE)
        return "the store does not know If-None-Match: keys are looked at before they are written"
    documents.prove(store, key, _PROBE, found)
    try:
        store.put_document(key, _PROBE, conditional=True)
    except TakenError:
        return "a second one under its key was refused"
    return "WARNING: the store ignores If-None-Match: keys are looked at before they are written"


def _probe_modules(store: Store, prefix: str) -> str:
    """Store an object in the folder of modules, always the same; return a warning if that is not allowed."""
    folder = f"{prefix}{MODULES_FOLDER}/"
    try:
        documents.put(store, f"{folder}.check", _PROBE)
    except RetryableError as error:
        if error.reason is not RetryReason.FORBIDDEN:
            raise
        return _NO_MODULES.format(f"{folder}*")
    store.delete(f"{folder}.check")
    return ""


def _limits(store: Store, key: str) -> str:
    """Return what the collector cannot do here for want of a permission."""
    try:
        store.look(key)
        seen = ""
    except HeadRefusedError:
        seen = _NOT_SEEN
    return seen + ("" if store.find_uploads(key) is not None else _NOT_LISTED)


def _with_advice(error: RetryableError) -> str:
    """Return the error and what to do; what the store's words or botocore's exception say goes before our reason."""
    cause = error.__cause__
    if isinstance(cause, ClientError) and classify.advice_for(cause) is not None:
        return str(error)  # it is in there
    advice = ADVICE.get(type(cause).__name__) or _ADVICE.get(error.reason)
    return f"{error}: {advice or 'try again; if it stays, ask those who run the store'}"

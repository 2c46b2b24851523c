"""Owns small JSON documents in the bucket: metadata objects and records of refused dumps, each stored with proof."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3.errors import (
    ConditionRefusedError,
    HeadRefusedError,
    RetryableError,
    TakenError,
    UnprovenError,
)
from core_dump_collector.s3.verdict import Content, Found, Seen, advise, compare

if TYPE_CHECKING:
    from core_dump_collector.s3.store import Store


def put(store: Store, key: str, document: bytes) -> None:
    """Store a document under a key that belongs to it; one that is there already stays.

    Raises:
        RetryableError, PermanentError
    """
    try:
        found = _put(store, key, document)
    except TakenError:
        return
    prove(store, key, document, found)


def prove(store: Store, key: str, document: bytes, found: Found) -> None:
    """Make sure that a document is stored.

    Args:
        store: where it was sent.
        key: its key.
        document: its bytes.
        found: what the response said.

    Raises:
        UnprovenError: nothing proves it; the message says what would.
        RetryableError: the store does not have it, or gave no response to rely on.
    """
    content = Content(len(document), zlib.crc32(document), lambda: _md5(document))
    seen = compare(found, content)
    if seen is Seen.SAME:
        return
    try:
        there = store.look(key)
    except HeadRefusedError:
        seen = Seen.REFUSED
    else:
        seen = Seen.ABSENT if there is None else compare(there, content)
    if seen in {Seen.SILENT, Seen.REFUSED}:
        raise UnprovenError(advise(seen, sends_checksums=store.sends_checksums))
    if seen is not Seen.SAME:
        raise RetryableError(RetryReason.CHECKSUM, "the store does not have the document as it was sent")


def _put(store: Store, key: str, document: bytes) -> Found:
    """Send a document with the condition, or without it where the store refuses it twice."""
    for _ in range(2):
        if not store.condition.is_used:
            return store.put_document(key, document, conditional=False)
        try:
            return store.put_document(key, document, conditional=True)
        except ConditionRefusedError:
            continue
    found = store.put_document(key, document, conditional=False)
    store.condition.forget()
    return found


def _md5(document: bytes) -> str:
    return hashlib.md5(document, usedforsecurity=False).hexdigest()

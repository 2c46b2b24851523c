"""Owns storing one module: each content is stored once, by the first node that sends it.

Its key is the SHA-256 of its content, so nothing is lost if another node has stored it. The object under the key may be
junk from somebody else. Readers verify the SHA-256; this module only reports whether the store proves the content.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3.errors import (
    ConditionRefusedError,
    HeadRefusedError,
    RetryableError,
    TakenError,
)
from core_dump_collector.s3.verdict import Content, Found, Seen, compare
from core_dump_format.keys import module_key

if TYPE_CHECKING:
    from core_dump_collector.s3.parts import Part
    from core_dump_collector.s3.store import Store

MOST_BYTES = 5 << 30
"""The most that one request can store (Amazon S3 User Guide, "Uploading objects")."""
_HEADERS = {
    "ContentType": "application/octet-stream",
    "ContentEncoding": "gzip",
    "StorageClass": "STANDARD",  # dumps may go where reading takes hours; a module belongs to many of them
}


class Stored(StrEnum):
    """How a module came to be in the bucket; bounded, so it can be a metric label."""

    UPLOADED = "uploaded"
    PRESENT = "present"
    """It was there: HEAD shows the same length and checksum."""
    UNPROVEN = "unproven"
    """An object is under its key, but nothing proves that it has these bytes; another compressor makes others."""


def store_module(store: Store, prefix: str, sha256: str, part: Part) -> Stored:
    """Store a module unless an object is under its key, and return the result.

    Args:
        store: the bucket.
        prefix: of all keys, empty or ending in a slash.
        sha256: of the content, hexadecimal.
        part: the gzip file.

    Raises:
        RetryableError, PermanentError
    """
    key = module_key(prefix, sha256)
    crc32 = part.crc32()
    content = Content(part.size_bytes, crc32, part.md5)
    there = _look(store, key, content)
    if there not in {Seen.ABSENT, Seen.REFUSED}:
        return Stored.PRESENT if there is Seen.SAME else Stored.UNPROVEN
    try:
        found = _put(store, key, part, crc32)
    except TakenError:
        seen = _look(store, key, content)
        return Stored.PRESENT if seen is Seen.SAME else Stored.UNPROVEN
    if compare(found, content) is Seen.SAME:
        return Stored.UPLOADED
    seen = _look(store, key, content)
    if seen in {Seen.ABSENT, Seen.OTHER}:
        raise RetryableError(RetryReason.CHECKSUM, "the store does not have the module as it was sent")
    return Stored.UPLOADED if seen is Seen.SAME else Stored.UNPROVEN


def _put(store: Store, key: str, part: Part, crc32: int) -> Found:
    """Send a module with the condition; without it, where the store has none: the content under the key is the same."""
    if store.condition.is_used:
        try:
            return store.put(key, part, crc32, _HEADERS, conditional=True)
        except ConditionRefusedError:
            pass
    return store.put(key, part, crc32, _HEADERS, conditional=False)


def _look(store: Store, key: str, content: Content) -> Seen:
    try:
        found = store.look(key)
    except HeadRefusedError:
        return Seen.REFUSED
    return Seen.ABSENT if found is None else compare(found, content)

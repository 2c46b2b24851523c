"""Owns the judgement: what the store's responses prove about an object. Pure; the table of `judge` is its test.

Proof is one of three: a checksum in the response; a HEAD that shows length and checksum; an ETag that equals the MD5.
An ETag that differs is no evidence of anything: with encryption, and behind many gateways, it is not an MD5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from core_dump_format.crc32 import encode_crc32

if TYPE_CHECKING:
    from collections.abc import Callable

_MD5 = re.compile(r"[0-9a-f]{32}(-[0-9]{1,5})?")


class Answer(Enum):
    """The response to the request that makes an object visible."""

    NONE = auto()
    """The request was not sent yet."""
    PROVEN = auto()
    """Success, with proof."""
    UNPROVEN = auto()
    """Success, without proof."""
    TAKEN = auto()
    """412: the key is taken."""
    GONE = auto()
    """The multipart upload does not exist: an earlier request may have completed it."""


class Seen(Enum):
    """What a response or a HEAD shows of the object under the key."""

    SAME = auto()
    """It is the dump, whole."""
    OTHER = auto()
    """Its length or its checksum differs."""
    SILENT = auto()
    """Neither: the length fits and there is nothing to compare."""
    ABSENT = auto()
    """There is no object."""
    REFUSED = auto()
    """The store refuses to say."""


class Tried(Enum):
    """What an earlier attempt at the same key with the same bytes has led to."""

    NEVER = auto()
    UNKNOWN = auto()
    """The request was sent; its response was lost."""
    ACKNOWLEDGED = auto()
    """The store reported success, without proof."""
    PROVEN = auto()
    """The store has proven that it had the whole object."""


class Verdict(Enum):
    """What to do."""

    SEND = auto()
    """Send the request: nothing is lost or overwritten by it. After a 412, without the condition."""
    UPLOADED = auto()
    ALREADY_STORED = auto()
    COLLISION = auto()
    """The key belongs to another object: use the next key."""
    OWN_KEY = auto()
    """Nothing tells whether the key is free: use the key that is derived from the content."""
    RETRY = auto()
    """The store does not have the dump: another attempt later."""
    UNDECIDABLE = auto()
    """The store may have the dump; it stays on disk until something proves it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a response or a HEAD says of an object."""

    size_bytes: int | None
    """None if it does not say."""
    crc32: str | None
    """As S3 writes it; with `-N` the checksum of the checksums of N parts."""
    etag: str
    """As the store writes it."""

    @property
    def md5(self) -> str | None:
        """Return the ETag if it has the form of an MD5, which says nothing of what it is."""
        etag = self.etag.strip('"').lower()
        return etag if _MD5.fullmatch(etag) else None


@dataclass(frozen=True, slots=True)
class Content:
    """What identifies the bytes of an object. The functions read the dump, so they are called only if needed."""

    size_bytes: int
    crc32: int
    etag: Callable[[], str | None]
    """The MD5, or for parts the MD5 of their MD5s with `-N`; None if it is not known."""
    composite_crc32: Callable[[], str | None] = lambda: None
    """The CRC-32 of the parts' CRC-32s with `-N`; None for one part."""


def compare(found: Found, content: Content) -> Seen:
    """Compare what the store says with what was sent: SAME, OTHER or SILENT."""
    if found.size_bytes is not None and found.size_bytes != content.size_bytes:
        return Seen.OTHER
    if found.crc32 is not None:
        return _compare_crc32(found.crc32, content)
    if found.md5 is not None and found.md5 == content.etag():
        return Seen.SAME
    return Seen.SILENT


def _compare_crc32(found: str, content: Content) -> Seen:
    """Compare a checksum; some stores write that of the parts' checksums without its `-N`."""
    if found == encode_crc32(content.crc32):
        return Seen.SAME
    composite = content.composite_crc32()
    if composite is not None and found in {composite, composite.partition("-")[0]}:
        return Seen.SAME
    return Seen.SILENT if "-" in found else Seen.OTHER  # of other parts, perhaps of the same bytes


def judge(answer: Answer, seen: Seen | None, tried: Tried, *, guarded: bool) -> Verdict:  # noqa: C901, PLR0911  a table
    """Decide what a response means.

    Args:
        answer: to the request that makes the object visible.
        seen: by HEAD; None if the response is proof by itself.
        tried: by an earlier attempt.
        guarded: the request cannot overwrite another object: it has a condition, or the key is derived from the
            content.
    """
    match answer, seen:
        case (Answer.PROVEN, _) | (Answer.UNPROVEN | Answer.GONE, Seen.SAME):
            return Verdict.UPLOADED
        case _, Seen.SAME:
            return Verdict.ALREADY_STORED
        case Answer.UNPROVEN | Answer.GONE, Seen.ABSENT | Seen.OTHER:
            return Verdict.RETRY
        case _, Seen.ABSENT:
            return Verdict.SEND
        case _, Seen.OTHER:
            return Verdict.COLLISION
        case Answer.GONE, _ if tried is Tried.NEVER:
            return Verdict.RETRY
        case Answer.NONE, Seen.SILENT | Seen.REFUSED if tried is Tried.PROVEN:
            return Verdict.ALREADY_STORED
        case Answer.NONE, Seen.REFUSED if guarded and tried is not Tried.ACKNOWLEDGED:
            return Verdict.SEND
        case Answer.NONE, Seen.REFUSED if tried is Tried.NEVER:
            return Verdict.OWN_KEY
        case Answer.NONE | Answer.TAKEN, _ if tried is Tried.NEVER:
            return Verdict.COLLISION
        case _:
            return Verdict.UNDECIDABLE


def advise(seen: Seen, *, sends_checksums: bool) -> str:
    """Return which permission or setting would provide a proof."""
    checksum = "" if sends_checksums else "set CHECKSUM=when_supported, or "
    if seen is Seen.OTHER:
        return (
            "HEAD shows another length or checksum than was sent, under two keys; use a store or an encryption "
            "whose HEAD shows those of the object"
        )
    if seen is Seen.REFUSED:
        return f"{checksum}allow s3:GetObject, which HEAD needs (docs/iam.md)"
    return (
        f"{checksum}use a store or an encryption whose HEAD shows a checksum or an MD5 as ETag"
        if checksum
        else "HEAD shows no checksum and its ETag is not the MD5; use a store or an encryption that shows one of them"
    )

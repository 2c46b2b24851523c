"""Owns the multipart upload of one object: begin or resume, send parts side by side, complete, prove.

Parts that the store already has are not sent again: their checksum is compared with what would be sent, so a
resumed upload is as sound as a fresh one. What fails for a reason that can pass is left in the store to be resumed.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isal import isal_zlib

from core_dump_collector.errors import RetryableError
from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3.client import SENDERS
from core_dump_collector.s3.store import ConflictError, Store, StoredPart, TakenError, etag_of
from core_dump_format.crc32 import encode_crc32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.s3.parts import Part

PART_TRIES = 4
FIRST_PAUSE_SECONDS = 0.2
_TRANSIENT = frozenset({RetryReason.NETWORK, RetryReason.SERVER, RetryReason.THROTTLED})
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the store has taken."""

    number: int
    size_bytes: int
    crc32: int
    etag: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The object that the parts make."""

    parts: tuple[SentPart, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the object."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def crc32(self) -> int:
        """CRC-32 of the object, from those of its parts."""
        crc = 0
        for part in self.parts:
            crc = isal_zlib.crc32_combine(crc, part.crc32, part.size_bytes)
        return crc

    @property
    def composite_crc32(self) -> str:
        """Return what stores without full-object checksums report: the checksum of the checksums."""
        joined = b"".join(part.crc32.to_bytes(4, "big") for part in self.parts)
        return f"{encode_crc32(isal_zlib.crc32(joined))}-{len(self.parts)}"

    @property
    def etag(self) -> str | None:
        """Return the ETag of most stores, the MD5 of the parts' MD5s; None when theirs are no MD5s."""
        etags = [part.etag.strip('"').lower() for part in self.parts]
        if not all(_MD5.fullmatch(etag) for etag in etags):
            return None
        joined = b"".join(bytes.fromhex(etag) for etag in etags)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"

    def listed(self, *, with_checksums: bool) -> list[dict[str, Any]]:
        """Return the list that CompleteMultipartUpload takes."""
        items: list[dict[str, Any]] = [{"PartNumber": part.number, "ETag": part.etag} for part in self.parts]
        if with_checksums:
            for item, part in zip(items, self.parts, strict=True):
                item["ChecksumCRC32"] = encode_crc32(part.crc32)
        return items

    def is_matched_by(self, crc32: str | None, etag: str) -> bool | None:
        """Tell whether a checksum or ETag that a store reports is this object's; None when neither says."""
        if crc32 is not None:
            return crc32 == (self.composite_crc32 if "-" in crc32 else encode_crc32(self.crc32))
        return etag.strip('"').lower() == self.etag or None


def send_parts(
    store: Store, key: str, upload_id: str, parts: Iterator[Part], have: dict[int, StoredPart]
) -> Whole:
    """Send what the store has not, SENDERS at a time.

    Raises:
        GoneError, RetryableError, PermanentError, OSError: the first failure; nothing is being sent any more.
    """
    sent: list[SentPart] = []
    under_way: set[Future[SentPart]] = set()
    with ThreadPoolExecutor(SENDERS, thread_name_prefix="part") as threads:
        try:
            for part in parts:
                under_way.add(
                    threads.submit(_settle_part, store, key, upload_id, part, have.get(part.number))
                )
                if len(under_way) >= SENDERS:
                    sent += _collect(under_way)
            while under_way:
                sent += _collect(under_way)
        except BaseException:
            for future in under_way:
                future.cancel()
            raise
    return Whole(tuple(sorted(sent, key=lambda part: part.number)))


def _collect(under_way: set[Future[SentPart]]) -> list[SentPart]:
    done, rest = wait(under_way, return_when=FIRST_COMPLETED)
    under_way.intersection_update(rest)
    return [future.result() for future in done]


def _settle_part(store: Store, key: str, upload_id: str, part: Part, have: StoredPart | None) -> SentPart:
    """Make sure that the store has a part."""
    try:
        crc32 = part.crc32()
        if have is not None and _is_same(part, crc32, have):
            etag = have.etag
        else:
            etag = _put_part(store, key, upload_id, part, crc32)
        return SentPart(part.number, part.size_bytes, crc32, etag)
    finally:
        part.release()


def _put_part(store: Store, key: str, upload_id: str, part: Part, crc32: int) -> str:
    """Send a part; sending it twice does no harm, so what can pass is tried again at once."""
    for attempt in range(PART_TRIES - 1):
        try:
            return store.put_part(key, upload_id, part, crc32)
        except RetryableError as error:
            if error.reason not in _TRANSIENT | {RetryReason.CHECKSUM}:
                raise
        _pause(attempt)
    return store.put_part(key, upload_id, part, crc32)


def _is_same(part: Part, crc32: int, have: StoredPart) -> bool:
    if have.size_bytes != part.size_bytes:
        return False
    if have.crc32 is not None:
        return have.crc32 == encode_crc32(crc32)
    return have.etag.strip('"').lower() == part.md5()


def complete(store: Store, key: str, upload_id: str, whole: Whole) -> bool:
    """Make the object visible; tell whether the answer proves that it is whole.

    A lost answer is asked for again: the store then repeats it, or says that the upload is gone or the key taken.

    Raises:
        TakenError: `by_us` when a request before may have done it.
        GoneError, ConflictError, UnconditionalStoreError, RetryableError, PermanentError
    """
    listed = whole.listed(with_checksums=store.sends_checksums)
    unknown = False
    for attempt in range(PART_TRIES):
        try:
            answer = store.complete(key, upload_id, listed, crc32=whole.crc32, size_bytes=whole.size_bytes)
            matched = whole.is_matched_by(answer.get("ChecksumCRC32"), etag_of(answer))
            break
        except ConflictError:
            raise
        except TakenError as error:
            raise TakenError(by_us=unknown) from error
        except RetryableError as error:
            unknown = unknown or error.outcome_unknown
            if error.reason not in _TRANSIENT or attempt == PART_TRIES - 1:
                raise RetryableError(error.reason, str(error), outcome_unknown=unknown) from error
        _pause(attempt)
    if matched is False:
        raise RetryableError(RetryReason.CHECKSUM, "the store reports another checksum for the whole object")
    return matched is True


def _pause(attempt: int) -> None:
    """Wait briefly before the next try; longer waiting is the backlog's, which blocks nobody."""
    time.sleep(FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311  jitter

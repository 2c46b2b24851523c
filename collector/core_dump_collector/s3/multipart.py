"""Owns the multipart upload of one object: send parts side by side, complete, and what the parts make.

Parts that the store already has are not sent again: their checksum is compared with what would be sent, so a
resumed upload is as sound as a fresh one. What fails for a reason that can pass is left in the store to be resumed.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from isal import isal_zlib

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3 import tries
from core_dump_collector.s3.errors import ConflictError, GoneError, RetryableError, TakenError
from core_dump_collector.s3.flow import LOOK_SECONDS
from core_dump_collector.s3.verdict import Content, Found, Seen, compare
from core_dump_format.crc32 import encode_crc32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from core_dump_collector.s3.parts import Part
    from core_dump_collector.s3.store import Store

MOST_SENDERS = 16
"""Threads that send parts of one object; the flow decides how many of them send at a time."""
SPARE = 2
"""Parts in threads for each connection: those that wait show that more connections are wanted."""


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the store has accepted."""

    number: int
    size_bytes: int
    crc32: int
    etag: str
    proven: bool
    """The store has shown the checksum or the MD5 of this part."""


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
    def content(self) -> Content:
        """Return what identifies the object; one of a single part was sent with one request."""
        if len(self.parts) == 1:
            return Content(self.size_bytes, self.crc32, self._single_etag)
        return Content(self.size_bytes, self.crc32, self._etag, self._composite_crc32)

    def _composite_crc32(self) -> str:
        """Return what stores without full-object checksums report: the checksum of the checksums."""
        joined = b"".join(part.crc32.to_bytes(4, "big") for part in self.parts)
        return f"{encode_crc32(isal_zlib.crc32(joined))}-{len(self.parts)}"

    def _single_etag(self) -> str | None:
        return self._md5s()[0]

    def _etag(self) -> str | None:
        """Return the ETag of most stores, the MD5 of the parts' MD5s.

        It ties the object to its parts, so it proves as much as is proven of them: None if one is not.
        """
        md5s = self._md5s()
        if not all(md5 and "-" not in md5 for md5 in md5s):
            return None
        joined = b"".join(bytes.fromhex(str(md5)) for md5 in md5s)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(md5s)}"

    def _md5s(self) -> list[str | None]:
        return [Found(None, None, part.etag).md5 if part.proven else None for part in self.parts]

    def listed(self, *, with_checksums: bool) -> list[dict[str, Any]]:
        """Return the list that CompleteMultipartUpload takes."""
        items: list[dict[str, Any]] = [{"PartNumber": part.number, "ETag": part.etag} for part in self.parts]
        if with_checksums:
            for item, part in zip(items, self.parts, strict=True):
                item["ChecksumCRC32"] = encode_crc32(part.crc32)
        return items


def send_parts(
    store: Store, key: str, upload_id: str, parts: Iterator[Part], have: dict[int, Found]
) -> Whole:
    """Send the parts that the store does not have, as many at a time as the flow permits.

    Raises:
        GoneError, RetryableError, PermanentError, OSError: the first failure; nothing is being sent any more.
    """
    sent: list[SentPart] = []
    under_way: set[Future[SentPart]] = set()
    failed = threading.Event()
    with ThreadPoolExecutor(MOST_SENDERS, thread_name_prefix="part") as threads:
        try:
            for part in parts:
                settle = partial(
                    _settle_part, store, key, upload_id, part, have.get(part.number), failed.is_set
                )
                under_way.add(threads.submit(copy_context().run, settle))
                sent += _collect(under_way, 0)
                while len(under_way) >= min(MOST_SENDERS, SPARE * max(1, store.flow.connections)):
                    sent += _collect(under_way, LOOK_SECONDS)
            while under_way:
                sent += _collect(under_way, None)
        except BaseException:
            failed.set()
            for future in under_way:
                future.cancel()
            raise
    return Whole(tuple(sorted(sent, key=lambda part: part.number)))


def _collect(under_way: set[Future[SentPart]], seconds: float | None) -> list[SentPart]:
    """Return the parts that are sent, once there is one or the time is over; raise the first failure."""
    done, rest = wait(under_way, timeout=seconds, return_when=FIRST_COMPLETED)
    under_way.intersection_update(rest)
    return [future.result() for future in done]


def describe(parts: Iterable[Part]) -> Whole:
    """Return what the parts would make, from the dump alone."""
    described = []
    for part in parts:
        try:
            described.append(SentPart(part.number, part.size_bytes, part.crc32(), part.md5(), proven=True))
        finally:
            part.release()
    return Whole(tuple(described))


def _settle_part(  # noqa: PLR0913, PLR0917  what a part needs, and when to give up
    store: Store, key: str, upload_id: str, part: Part, have: Found | None, given_up: Callable[[], bool]
) -> SentPart:
    """Make sure that the store has a part."""
    try:
        with store.flow.permit(given_up):
            crc32 = part.crc32(with_sha256=have is None and store.signs_bodies)
            content = Content(part.size_bytes, crc32, part.md5)
            if have is not None and compare(have, content) is Seen.SAME:
                return SentPart(part.number, part.size_bytes, content.crc32, have.etag, proven=True)
            return _put_part(store, key, upload_id, part, content)
    finally:
        part.release()


def _put_part(store: Store, key: str, upload_id: str, part: Part, content: Content) -> SentPart:
    """Send a part. Sending it twice does no harm, so what can pass is tried again at once."""
    for number in range(tries.TRIES - 1):
        try:
            return _put_part_once(store, key, upload_id, part, content)
        except RetryableError as error:
            if error.reason not in tries.TRANSIENT | {RetryReason.CHECKSUM}:
                raise
        tries.pause(number)
    return _put_part_once(store, key, upload_id, part, content)


def _put_part_once(store: Store, key: str, upload_id: str, part: Part, content: Content) -> SentPart:
    found = store.put_part(key, upload_id, part, content.crc32)
    seen = compare(found, content)
    if seen is Seen.OTHER:
        raise RetryableError(RetryReason.CHECKSUM, "the store reports another CRC32 than was sent")
    return SentPart(part.number, part.size_bytes, content.crc32, found.etag, proven=seen is Seen.SAME)


def complete(store: Store, key: str, upload_id: str, whole: Whole, *, conditional: bool) -> Found:
    """Make the object visible; return what the response says of it.

    After a lost response the request is repeated: the store then repeats its response, or says that the upload is
    gone or the key taken.

    Raises:
        TakenError, GoneError: `by_us` if an earlier request of this call may have done it.
        ConflictError, ConditionRefusedError, RetryableError, PermanentError
    """
    listed, content = whole.listed(with_checksums=store.sends_checksums), whole.content
    unknown = False
    for number in range(tries.TRIES):
        try:
            return store.complete(key, upload_id, listed, content, conditional=conditional)
        except ConflictError:
            raise
        except (TakenError, GoneError) as error:
            raise type(error)(by_us=unknown) from error
        except RetryableError as error:
            unknown = unknown or error.outcome_unknown
            if error.reason not in tries.TRANSIENT or number == tries.TRIES - 1:
                raise RetryableError(error.reason, str(error), outcome_unknown=unknown) from error
        tries.pause(number)
    raise AssertionError("the last try returns or raises")

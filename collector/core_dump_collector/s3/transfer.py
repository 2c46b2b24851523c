"""Owns the way of one dump into the bucket: in one request or in parts, under the first key that is free.

An upload that was cut short is resumed if its record, or the store's list of unfinished uploads, names it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.metadata import StoredObject
from core_dump_collector.s3 import multipart
from core_dump_collector.s3.condition import learn
from core_dump_collector.s3.errors import (
    CollisionError,
    GoneError,
    HeadRefusedError,
    OwnKeyNeededError,
    PermanentError,
    RetryableError,
    UnprovenError,
)
from core_dump_collector.s3.publish import Candidate, Publisher
from core_dump_collector.s3.record import Attempt, State, UploadRecord
from core_dump_collector.s3.verdict import Content, Found, Tried
from core_dump_format.names import content_mark, with_copy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.parts import Part
    from core_dump_collector.s3.sources import Source
    from core_dump_collector.s3.store import Store

MOST_COPIES = 100
"""Keys tried for dumps of one name."""
MOST_UNSEEN = 3
"""Keys tried where HEAD is refused: each may cost a whole upload."""

_STARTS_AGAIN = frozenset({RetryReason.CHECKSUM, RetryReason.SERVER})
"""The store refuses to complete for such a reason: it would refuse the same parts again."""
_LEFT_BEHIND = (
    "a multipart upload that was cut short may be left: allow s3:ListBucketMultipartUploads, or let a lifecycle "
    "rule (AbortIncompleteMultipartUpload) remove it"
)


class Transfer:
    """One dump on its way."""

    def __init__(
        self, store: Store, dump: DumpFile, source: Source, earlier: Attempt | None, headers: dict[str, Any]
    ) -> None:
        """Take the dump, its bytes as they are sent, and what an earlier attempt has left."""
        self._store = store
        self._dump = dump
        self._source = source
        self._headers = headers
        self._record = UploadRecord(dump, source, store.place, earlier)
        self.note = ""
        """What an operator should know although the upload went well."""

    def run(self, wanted_key: str) -> tuple[StoredObject, Outcome]:
        """Store the dump under the key, or under `-1`, `-2`, ... where other dumps have taken it.

        Raises:
            RetryableError, PermanentError, OSError
        """
        copy = self._first_copy(wanted_key)
        unseen = 0
        while True:
            own_key = isinstance(copy, str)
            try:
                return self._send(with_copy(wanted_key, copy), own_key=own_key)
            except OwnKeyNeededError as error:
                copy = content_mark(error.size_bytes, error.crc32)
            except CollisionError as error:
                if isinstance(copy, str):  # not even its own key is free
                    raise self._explain_taken(error) from error
                unseen += not error.seen
                last = unseen >= MOST_UNSEEN or copy + 1 >= MOST_COPIES
                stored = error.stored
                copy = content_mark(stored.size_bytes, stored.crc32) if last else copy + 1

    def _explain_taken(self, error: CollisionError) -> RetryableError:
        """Return why not even the dump's own key is free."""
        if error.seen:
            return RetryableError(RetryReason.SERVER, "all keys are taken by other dumps of this name")
        self._record.write(State.UNPROVEN, error.stored)
        return UnprovenError("its keys are taken by objects that nobody can look at: allow s3:GetObject")

    def _first_copy(self, wanted_key: str) -> int | str:
        """Return what distinguishes the key to start with; forget an attempt at older content or at another key."""
        earlier = self._record.earlier
        copy = _copy_of(wanted_key, earlier.key) if earlier is not None else None
        if earlier is None:
            return 0
        same_bytes = (earlier.modified_ns, earlier.order) == (
            self._dump.identity.modified_ns,
            self._source.order,
        )
        if copy is not None and same_bytes:
            return copy
        if earlier.upload_id:
            self._store.abort(earlier.key, earlier.upload_id)
        self._record.earlier = None
        return 0

    def _send(self, key: str, *, own_key: bool) -> tuple[StoredObject, Outcome]:
        publisher = Publisher(self._store, self._record, own_key=own_key)
        earlier = self._record.at(key)
        if earlier is not None and earlier.tried is not Tried.NEVER:
            stored = StoredObject(key, earlier.size, earlier.crc32)
            outcome = publisher.settle(stored, self._content_of(earlier))
            if outcome is not None:
                return stored, outcome
            if earlier.tried is Tried.PROVEN:
                self._record.earlier = (
                    None  # the store has lost it: nothing is known of what comes under the key
                )
        parts = self._source.parts(self._store.flow)
        first = next(parts)
        if first.last:
            try:
                return self._put_whole(publisher, key, first)
            finally:
                first.release()
        if not (own_key or self._store.condition.is_trusted_with_parts):
            self._require_visible(key)
        return self._put_parts(publisher, key, chain([first], parts))

    def _content_of(self, attempt: Attempt) -> Content:
        """Return what identifies the object of an earlier attempt; the dump is read only if needed."""

        @functools.cache
        def described() -> Content | None:
            if attempt.part_bytes != self._source.part_bytes:
                return None
            whole = multipart.describe(self._source.parts(self._store.flow))
            same = (whole.size_bytes, whole.crc32) == (attempt.size, attempt.crc32)
            return whole.content if same else None

        def etag() -> str | None:
            content = described()
            return content.etag() if content else None

        def composite_crc32() -> str | None:
            content = described()
            return content.composite_crc32() if content else None

        return Content(attempt.size, attempt.crc32, etag, composite_crc32)

    def _require_visible(self, key: str) -> None:
        """Choose the dump's own key before its parts are sent, where a free key cannot be told from a taken one."""
        try:
            self._store.look(key)
        except HeadRefusedError:
            if learn(self._store):
                return
            whole = multipart.describe(self._source.parts(self._store.flow))
            raise OwnKeyNeededError(whole.size_bytes, whole.crc32) from None

    # One request

    def _put_whole(self, publisher: Publisher, key: str, part: Part) -> tuple[StoredObject, Outcome]:
        crc32 = part.crc32(with_sha256=self._store.signs_bodies)
        stored = StoredObject(key, part.size_bytes, crc32)

        def send(conditional: bool) -> Found:  # noqa: FBT001  one parameter
            return self._store.put(key, part, crc32, self._headers, conditional=conditional)

        self._require_unchanged()
        return stored, publisher.publish(Candidate(stored, Content(part.size_bytes, crc32, part.md5), send))

    # Many requests

    def _put_parts(
        self, publisher: Publisher, key: str, parts: Iterator[Part]
    ) -> tuple[StoredObject, Outcome]:
        upload_id, have = self._begin(publisher, key)
        recorded = self._record_begun(key, upload_id)
        try:
            whole = multipart.send_parts(self._store, key, upload_id, parts, have)
            self._require_unchanged()
            return self._complete(publisher, key, upload_id, whole)
        except GoneError:
            self._give_up(key, upload_id)
            raise RetryableError(
                RetryReason.SERVER, "the multipart upload is gone; it starts again"
            ) from None
        except (CollisionError, OwnKeyNeededError, PermanentError, OSError):
            self._give_up(key, upload_id)
            raise
        except RetryableError:
            if not recorded:  # nobody could resume it
                self._store.abort(key, upload_id)
            raise

    def _begin(self, publisher: Publisher, key: str) -> tuple[str, dict[int, Found]]:
        """Return the id of a multipart upload and the parts that it has: an unfinished one, or a new one."""
        earlier = self._record.at(key)
        if earlier is not None and earlier.upload_id:
            same_parts = earlier.part_bytes == self._source.part_bytes
            try:
                have = self._resume(key, earlier.upload_id, same_parts=same_parts)
            except GoneError:
                have = None
                if earlier.tried is Tried.UNKNOWN:
                    stored = StoredObject(key, earlier.size, earlier.crc32)
                    publisher.require_not_completed(stored, self._content_of(earlier))
            if have is not None:
                return earlier.upload_id, have
        recorded = self._record_begun(key, "")
        if not recorded or (earlier is not None and not earlier.upload_id):
            # A collector that was killed may have created an upload whose id it could not record.
            found = self._find(key)
            if found is not None:
                return found
            if earlier is not None and not self._store.may_list:
                self.note = _LEFT_BEHIND
        return self._store.create_multipart(key, self._headers), {}

    def _record_begun(self, key: str, upload_id: str) -> bool:
        """Record an upload before it is created, and its id; keep what is known of an earlier attempt's outcome."""
        earlier = self._record.at(key)
        if earlier is not None and earlier.tried is not Tried.NEVER:
            return self._record.write(
                earlier.state, StoredObject(key, earlier.size, earlier.crc32), upload_id
            )
        return self._record.write(State.SENDING, StoredObject(key, 0, 0), upload_id)

    def _resume(self, key: str, upload_id: str, *, same_parts: bool) -> dict[int, Found] | None:
        """Return the parts of an unfinished upload; abort it and return None if it cannot be resumed.

        Raises:
            GoneError: it is finished.
        """
        try:
            have = self._store.list_parts(key, upload_id) if same_parts else None
        except RetryableError as error:
            if error.reason != RetryReason.FORBIDDEN:
                raise
            have = None
        if have is None:
            self._store.abort(key, upload_id)
        return have

    def _find(self, key: str) -> tuple[str, dict[int, Found]] | None:
        """Return the newest unfinished upload of a key, which only this node's dumps have; abort older ones."""
        uploads = self._store.find_uploads(key) or []
        for upload_id in uploads[1:]:
            self._store.abort(key, upload_id)
        for upload_id in uploads[:1]:
            with contextlib.suppress(GoneError):
                have = self._resume(key, upload_id, same_parts=True)
                if have is not None:
                    return upload_id, have
        return None

    def _complete(
        self, publisher: Publisher, key: str, upload_id: str, whole: multipart.Whole
    ) -> tuple[StoredObject, Outcome]:
        stored = StoredObject(key, whole.size_bytes, whole.crc32)

        def send(conditional: bool) -> Found:  # noqa: FBT001  one parameter
            try:
                return multipart.complete(self._store, key, upload_id, whole, conditional=conditional)
            except RetryableError as error:
                if not error.outcome_unknown and error.reason in _STARTS_AGAIN:
                    self._store.abort(key, upload_id)
                raise

        try:
            outcome = publisher.publish(Candidate(stored, whole.content, send, upload_id))
        except UnprovenError:
            self._store.abort(key, upload_id)  # it is completed, or another upload has taken the key
            raise
        if outcome is Outcome.ALREADY_STORED:
            self._store.abort(key, upload_id)
        return stored, outcome

    def _require_unchanged(self) -> None:
        if not self._dump.is_unchanged():
            raise OSError("the file was written to while it was read")

    def _give_up(self, key: str, upload_id: str) -> None:
        """Abort the upload and forget it, but not what is known of an earlier attempt's outcome."""
        self._store.abort(key, upload_id)
        earlier = self._record.at(key)
        if earlier is None or earlier.tried is Tried.NEVER:
            self._record.clear()
        else:
            self._record_begun(key, "")


def _copy_of(wanted_key: str, key: str) -> int | str | None:
    """Return the number of a copy's key, or the mark of its content; None if it is no copy of the wanted one."""
    if key == wanted_key:
        return 0
    found = re.search(r"-([1-9][0-9]{0,3}|[0-9a-f]{8}x[0-9a-f]{1,12})(?:\.gz)?$", key)
    if found is None:
        return None
    copy = found[1] if "x" in found[1] else int(found[1])
    return copy if with_copy(wanted_key, copy) == key else None

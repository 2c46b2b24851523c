"""Owns the sending of one dump under the first key that is free, and the judgement of what became of it.

The record (`attempt`) is written before a request whose answer may be lost. A key that is taken (412) is ours when
what lies there is the same, or, where we may not look, when an earlier attempt of ours may have put it there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from core_dump_collector.errors import PermanentError, RetryableError
from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.metadata import StoredObject
from core_dump_collector.s3 import multipart, record
from core_dump_collector.s3.record import Attempt, State
from core_dump_collector.s3.store import (
    Found,
    GoneError,
    Store,
    StoredPart,
    TakenError,
    UnconditionalStoreError,
)
from core_dump_format.crc32 import encode_crc32
from core_dump_format.names import with_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.parts import Part, Source

MOST_COPIES = 100
"""Keys tried for one dump before it is left for a later attempt."""

_BEGIN_ANEW = frozenset({RetryReason.CHECKSUM, RetryReason.SERVER})
"""The store refuses to complete for such a reason: the same parts would be refused again."""


class CollisionError(Exception):
    """Other bytes than ours lie under the key."""


class BlindError(Exception):
    """The store knows no If-None-Match, and we may not look: nothing tells whether the key is free."""

    def __init__(self, crc32: int) -> None:
        """Keep what makes a key that hardly anything else can have."""
        super().__init__("the key may be taken")
        self.crc32 = crc32


@dataclass(frozen=True, slots=True)
class Sent:
    """An object that the store may have: what it is, and how to recognise it."""

    stored: StoredObject
    matches: Callable[[Found], bool | None]
    """None when what the store reports says nothing either way."""


class Transfer:
    """One dump on its way."""

    def __init__(
        self, store: Store, dump: DumpFile, source: Source, before: Attempt | None, headers: dict[str, Any]
    ) -> None:
        """Take what is sent, where, and what an earlier attempt has left."""
        self._store = store
        self._dump = dump
        self._source = source
        self._before = before
        self._headers = headers
        self._blind = False

    def run(self, wanted_key: str) -> tuple[StoredObject, Outcome]:
        """Store the dump under the key, or under `-1`, `-2`, ... where other dumps have taken it.

        Raises:
            RetryableError, PermanentError, OSError
        """
        self._drop_stale_attempt()
        before, first = self._before, 0
        if before is not None:
            keys = [with_copy(wanted_key, copy) for copy in range(MOST_COPIES)]
            if before.key in keys and before.state == State.STORED:
                return StoredObject(before.key, before.size, before.crc32), Outcome.ALREADY_STORED
            first = keys.index(before.key) if before.key in keys else 0
        for copy in range(first, MOST_COPIES):
            key = with_copy(wanted_key, copy)
            try:
                return self._send(key)
            except CollisionError:
                self._before = None
            except BlindError as error:
                self._blind = True
                return self._send(with_copy(wanted_key, 1000 + error.crc32 % 9000))
        raise RetryableError(RetryReason.SERVER, f"{MOST_COPIES} keys are taken by other dumps of this name")

    def _drop_stale_attempt(self) -> None:
        """Forget an attempt at what the file held before it was written to again."""
        before = self._before
        if before is not None and before.modified_ns != self._dump.identity.modified_ns:
            if before.upload_id:
                self._store.abort(before.key, before.upload_id)
            self._before = None

    def _send(self, key: str) -> tuple[StoredObject, Outcome]:
        parts = self._source.parts()
        first = next(parts)
        return self._put_whole(key, first) if first.last else self._put_parts(key, chain([first], parts))

    # One request

    def _put_whole(self, key: str, part: Part) -> tuple[StoredObject, Outcome]:
        crc32 = part.crc32()
        sent = Sent(StoredObject(key, part.size_bytes, crc32), lambda found: _is_part(part, crc32, found))
        tried = self._before is not None and self._before.is_same_object(key, part.size_bytes, crc32)
        if not self._store.conditional and self._is_there(sent, tried=tried):
            return sent.stored, Outcome.ALREADY_STORED
        self._require_unchanged()
        self._record(State.SENT, sent.stored)
        try:
            proven = self._store.put(key, part, crc32, self._headers)
        except TakenError:
            return self._recognise(sent, tried=tried)
        except UnconditionalStoreError:
            return self._put_whole(key, part)
        except (RetryableError, PermanentError) as error:
            known = not (isinstance(error, RetryableError) and error.outcome_unknown)
            if known and (not tried or _is_checksum(error)):
                record.clear(self._dump)
            raise
        if not proven:
            self._check_size(sent.stored)
        return sent.stored, Outcome.UPLOADED

    # Many requests

    def _put_parts(self, key: str, parts: Iterator[Part]) -> tuple[StoredObject, Outcome]:
        before = self._before
        upload_id, have = self._resume(key)
        if not upload_id:
            if before is not None and self._was_completed(key, before):
                return StoredObject(key, before.size, before.crc32), Outcome.ALREADY_STORED
            upload_id = self._store.create_multipart(key, self._headers)
        if (
            before is not None and before.key == key and before.state == State.SENT
        ):  # its outcome stays unknown
            self._record(State.SENT, StoredObject(key, before.size, before.crc32), upload_id)
        else:
            self._record(State.SENDING, StoredObject(key, 0, 0), upload_id)
        try:
            whole = multipart.send_parts(self._store, key, upload_id, parts, have)
            self._require_unchanged()
        except GoneError:
            self._give_up(key, upload_id)
            raise RetryableError(RetryReason.SERVER, "the multipart upload is gone; it begins anew") from None
        except (PermanentError, OSError):
            self._give_up(key, upload_id)
            raise
        return self._complete(key, upload_id, whole)

    def _resume(self, key: str) -> tuple[str, dict[int, StoredPart]]:
        """Return the id and the parts of an unfinished upload, or nothing when there is none to go on with."""
        before = self._before
        if before is None or before.key != key or not before.upload_id:
            return "", {}
        try:
            have = self._store.list_parts(key, before.upload_id)
        except GoneError:
            return "", {}
        except RetryableError as error:
            if error.reason != RetryReason.FORBIDDEN:
                raise
            self._store.abort(key, before.upload_id)
            return "", {}
        if before.part_bytes != self._source.part_bytes:
            self._store.abort(key, before.upload_id)
            return "", {}
        return before.upload_id, have

    def _was_completed(self, key: str, before: Attempt) -> bool:
        """Tell whether the upload that is gone was completed: spares sending it all again."""
        if before.state != State.SENT or before.key != key or not before.upload_id:
            return False
        try:
            found = self._store.look(key)
        except PermissionError:
            return False
        return found is not None and (found.size_bytes, found.crc32) == (
            before.size,
            encode_crc32(before.crc32),
        )

    def _complete(self, key: str, upload_id: str, whole: multipart.Whole) -> tuple[StoredObject, Outcome]:
        sent = Sent(
            StoredObject(key, whole.size_bytes, whole.crc32),
            lambda found: whole.is_matched_by(found.crc32, found.etag),
        )
        before = self._before
        tried = before is not None and before.is_same_object(key, whole.size_bytes, whole.crc32)
        self._record(State.SENT, sent.stored, upload_id)
        try:
            proven = self._complete_somehow(sent, upload_id, whole, tried=tried)
            if not proven:
                self._check_size(sent.stored)
        except TakenError as error:
            self._store.abort(key, upload_id)
            return self._recognise(sent, tried=tried or error.by_us)
        except GoneError as error:  # completed by a request whose answer was lost, or aborted by somebody
            return self._recognise_completed(sent, error)
        except (CollisionError, BlindError):
            self._give_up(key, upload_id)
            raise
        except RetryableError as error:
            if not error.outcome_unknown and error.reason in _BEGIN_ANEW:
                self._give_up(key, upload_id)
            elif not error.outcome_unknown and not tried:
                self._record(State.SENDING, StoredObject(key, 0, 0), upload_id)
            raise
        self._record(State.STORED, sent.stored)
        return sent.stored, Outcome.UPLOADED

    def _complete_somehow(self, sent: Sent, upload_id: str, whole: multipart.Whole, *, tried: bool) -> bool:
        """Complete on the condition that the key is free; look first where the store knows no conditions."""
        if self._store.conditional:
            with contextlib.suppress(UnconditionalStoreError):
                return multipart.complete(self._store, sent.stored.key, upload_id, whole)
        if self._is_there(sent, tried=tried):
            raise TakenError(by_us=True)
        return multipart.complete(self._store, sent.stored.key, upload_id, whole)

    # Judgement

    def _check_size(self, stored: StoredObject) -> None:
        """Look at the object where the answer says nothing of its content, if we may look."""
        try:
            found = self._store.look(stored.key)
        except PermissionError:
            return
        if found is None or found.size_bytes != stored.size_bytes:
            raise RetryableError(
                RetryReason.CHECKSUM, "the store does not have the object in its full length"
            )

    def _recognise_completed(self, sent: Sent, error: GoneError) -> tuple[StoredObject, Outcome]:
        """Tell whether an upload that is gone has become the object."""
        try:
            found = self._store.look(sent.stored.key)
        except PermissionError:
            found = None
        if found is None or found.size_bytes != sent.stored.size_bytes or not sent.matches(found):
            raise RetryableError(
                RetryReason.SERVER, "the multipart upload is gone; it begins anew"
            ) from error
        return sent.stored, Outcome.UPLOADED

    def _recognise(self, sent: Sent, *, tried: bool) -> tuple[StoredObject, Outcome]:
        """Tell whose object lies under a key that is taken.

        Raises:
            CollisionError: somebody else's.
        """
        if not self._is_there(sent, tried=tried):
            raise RetryableError(
                RetryReason.SERVER, "the store says that the key is taken, and that it is not"
            )
        return sent.stored, Outcome.ALREADY_STORED

    def _is_there(self, sent: Sent, *, tried: bool) -> bool:
        """Tell whether the store has this object; False when it has none under the key.

        Raises:
            CollisionError: it has another.
            BlindError: nobody can tell.
        """
        try:
            found = self._store.look(sent.stored.key)
        except PermissionError:
            if tried:
                return True
            if self._store.conditional:
                raise CollisionError from None
            if self._blind:
                return False
            raise BlindError(sent.stored.crc32) from None
        if found is None:
            return False
        same = sent.matches(found) if found.size_bytes == sent.stored.size_bytes else False
        if same or (same is None and tried):
            return True
        raise CollisionError

    def _require_unchanged(self) -> None:
        if not self._dump.is_unchanged():
            raise OSError("the file was written to while it was read")

    # The record

    def _record(self, state: State, stored: StoredObject, upload_id: str = "") -> None:
        record.write(
            self._dump,
            Attempt(
                state=state,
                key=stored.key,
                modified_ns=self._dump.identity.modified_ns,
                size=stored.size_bytes,
                crc32=stored.crc32,
                upload_id=upload_id,
                part_bytes=self._source.part_bytes,
            ),
        )

    def _give_up(self, key: str, upload_id: str) -> None:
        """Abort and forget: the next attempt begins anew."""
        self._store.abort(key, upload_id)
        record.clear(self._dump)


def _is_checksum(error: RetryableError | PermanentError) -> bool:
    return isinstance(error, RetryableError) and error.reason == RetryReason.CHECKSUM


def _is_part(part: Part, crc32: int, found: Found) -> bool | None:
    """Compare an object with the one part that it should be made of."""
    if found.crc32 is not None and "-" not in found.crc32:
        return found.crc32 == encode_crc32(crc32)
    return (found.etag.strip('"').lower() == part.md5()) or None

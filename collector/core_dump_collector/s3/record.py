"""Owns the upload record: an attribute of the dump that persists the upload in progress.

A restart, or a lost response, is resolved by it, so it is written before the request whose outcome may stay unknown.
Where the file system has no attributes there is no record: a restart begins again, and an object of unknown origin
under the key counts as another dump's. The record on a file that others can write to is neither read nor written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from core_dump_collector.s3.verdict import Tried
from core_dump_format.attributes import MOST_ATTRIBUTE_BYTES, UPLOAD_RECORD
from core_dump_format.reorder import ORDER_VERSION

if TYPE_CHECKING:
    from core_dump_collector.metadata import StoredObject
    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.sources import Source


class State(StrEnum):
    """How far an attempt has come."""

    SENDING = "sending"
    """A multipart upload was created, or is about to be if it has no id yet; its parts are being sent."""
    SENT = "sent"
    """The request that makes the object visible was sent; its outcome is unknown until the next state."""
    UNPROVEN = "unproven"
    """The store may have the object, by its own words, and nothing proves it."""
    STORED = "stored"
    """The store has proven that it has the whole object."""


class Place(NamedTuple):
    """Where a key is."""

    bucket: str
    host: str
    """Of the endpoint."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one key with one content."""

    state: State
    key: str
    modified_ns: int
    """Of the file; a record about older content is void."""
    size: int = 0
    """Of the object, in bytes; 0 while unknown."""
    crc32: int = 0
    """Of the whole object; 0 while unknown."""
    upload_id: str = ""
    part_bytes: int = 0
    order: int = 0
    """Of a raw core: the version of its order; 0 for the kernel's."""
    bucket: str = ""
    """Empty in a record of an older release, which did not write it."""
    host: str = ""
    """Of the endpoint; empty in a record of an older release."""
    moved: bool = False
    """The store has shown another object than was sent under one key, so this is the second."""

    @property
    def tried(self) -> Tried:
        """Return what is known of the object's outcome."""
        if self.state is State.SENDING:
            return Tried.NEVER
        if self.state is State.SENT:
            return Tried.UNKNOWN
        return Tried.PROVEN if self.state is State.STORED else Tried.ACKNOWLEDGED

    def is_of(self, place: Place) -> bool:
        """Tell whether the attempt was made at this bucket; a record that does not say counts as one of it."""
        return not self.bucket or (self.bucket, self.host) == place


_FIELDS = tuple(field.name for field in fields(Attempt))


def read(raw: dict[str, bytes], *, trusted: bool) -> Attempt | None:
    """Return the attempt recorded on a dump; None if there is none, if it is damaged or if others can have written it.

    Args:
        raw: the dump's attributes.
        trusted: nobody else can have written them.
    """
    if not trusted:
        return None
    try:
        content = json.loads(raw.get(UPLOAD_RECORD, b"null"))
        attempt = Attempt(**(content | {"state": State(content["state"])}))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (attempt.key, attempt.upload_id, attempt.bucket, attempt.host)
    numbers = (attempt.modified_ns, attempt.size, attempt.crc32, attempt.part_bytes, attempt.order)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return None
    possible = (
        type(attempt.moved) is bool
        and attempt.size >= 0
        and 0 <= attempt.crc32 < 1 << 32
        and 0 <= attempt.order <= ORDER_VERSION
    )
    return attempt if possible else None


class UploadRecord:
    """The record of one dump, as an earlier attempt left it and as this one writes it."""

    def __init__(self, dump: DumpFile, source: Source, place: Place, earlier: Attempt | None) -> None:
        """Take the earlier attempt, unless it was made at another bucket, which says nothing of this one."""
        self._dump = dump
        self._source = source
        self._place = place
        self.earlier = earlier if earlier is not None and earlier.is_of(place) else None
        self.moved = self.earlier is not None and self.earlier.moved
        """Whether the dump has left a key because the store showed another object than was sent."""

    def at(self, key: str) -> Attempt | None:
        """Return the earlier attempt at a key."""
        return self.earlier if self.earlier is not None and self.earlier.key == key else None

    def tried(self, stored: StoredObject) -> Tried:
        """Return what is known of an earlier attempt at these very bytes under this key."""
        earlier = self.at(stored.key)
        if earlier is None or (earlier.size, earlier.crc32) != (stored.size_bytes, stored.crc32):
            return Tried.NEVER
        return earlier.tried

    def write(self, state: State, stored: StoredObject, upload_id: str = "") -> bool:
        """Record the attempt; return False if it cannot be recorded, and then nothing is."""
        attempt = Attempt(
            state=state,
            key=stored.key,
            modified_ns=self._dump.identity.modified_ns,
            size=stored.size_bytes,
            crc32=stored.crc32,
            upload_id=upload_id,
            part_bytes=self._source.part_bytes,
            order=self._source.order,
            bucket=self._place.bucket,
            host=self._place.host,
            moved=self.moved,
        )
        content = {name: getattr(attempt, name) for name in _FIELDS}
        value = json.dumps(content, separators=(",", ":")).encode()
        fits = self._dump.is_trusted and len(value) <= MOST_ATTRIBUTE_BYTES
        if fits and self._dump.set_attribute(UPLOAD_RECORD, value):
            return True
        self.clear()
        return False

    def clear(self) -> None:
        """Forget the attempt: its outcome is known and it left nothing behind."""
        clear(self._dump)


def clear(dump: DumpFile) -> None:
    """Remove the record of a dump."""
    dump.remove_attribute(UPLOAD_RECORD)

"""Owns the upload record: an attribute of the dump that persists the upload in progress.

A restart, or a lost response, is resolved by it, so it is written before the request whose outcome may stay unknown.
Where the file system has no attributes there is no record: a restart begins again, and an object of unknown origin
under the key counts as another dump's. The record on a file that others can write to is neither read nor written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from core_dump_collector.s3.verdict import Tried
from core_dump_format.attributes import MOST_ATTRIBUTE_BYTES, UPLOAD_RECORD
from core_dump_format.reorder import ORDER_VERSION

if TYPE_CHECKING:
    from core_dump_collector.metadata import StoredObject
    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.parts import Source


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

    @property
    def tried(self) -> Tried:
        """Return what is known of the object's outcome."""
        if self.state is State.SENDING:
            return Tried.NEVER
        return Tried.UNKNOWN if self.state is State.SENT else Tried.ACKNOWLEDGED


def read(raw: dict[str, bytes], *, trusted: bool) -> Attempt | None:
    """Return the attempt recorded on a dump; None if there is none, if it is damaged or if others can have written it.

    Args:
        raw: the dump's attributes.
        trusted: nobody else can have written them.
    """
    if not trusted:
        return None
    try:
        fields = json.loads(raw.get(UPLOAD_RECORD, b"null"))
        attempt = Attempt(**(fields | {"state": State(fields["state"])}))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (attempt.key, attempt.upload_id)
    numbers = (attempt.modified_ns, attempt.size, attempt.crc32, attempt.part_bytes, attempt.order)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return None
    possible = attempt.size >= 0 and 0 <= attempt.crc32 < 1 << 32 and 0 <= attempt.order <= ORDER_VERSION
    return attempt if possible else None


class UploadRecord:
    """The record of one dump, as an earlier attempt left it and as this one writes it."""

    def __init__(self, dump: DumpFile, source: Source, earlier: Attempt | None) -> None:
        """Take the earlier attempt."""
        self._dump = dump
        self._source = source
        self.earlier = earlier

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
        )
        value = json.dumps(asdict(attempt), separators=(",", ":")).encode()
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

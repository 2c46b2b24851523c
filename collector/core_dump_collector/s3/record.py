"""Owns the record of the attempt under way, an attribute of the dump: what a restart, or a lost answer, is judged by.

It is written before the request whose outcome may stay unknown. Where the file system has no attributes there is
no record: a restart then begins anew, and an object of unknown origin under the key counts as somebody else's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from core_dump_format.attributes import MOST_ATTRIBUTE_BYTES, UPLOAD_RECORD

if TYPE_CHECKING:
    from core_dump_collector.node.dumpfile import DumpFile

ATTRIBUTE = UPLOAD_RECORD


class State(StrEnum):
    """How far an attempt has come."""

    SENDING = "sending"
    """Parts of a multipart upload are in the store."""
    SENT = "sent"
    """The request that makes the object visible was sent; its outcome is unknown until the next state."""
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

    def is_same_object(self, key: str, size: int, crc32: int) -> bool:
        """Tell whether this attempt was at these very bytes under this key, its outcome unknown or good."""
        return self.state != State.SENDING and (self.key, self.size, self.crc32) == (key, size, crc32)


def read(raw: dict[str, bytes], *, trusted: bool) -> Attempt | None:
    """Return the attempt recorded on a dump; None when there is none or it is damaged.

    Args:
        raw: the dump's attributes.
        trusted: nobody else can have written them. Otherwise a record is good for resuming, where every part is
            compared, and never for taking an object for ours.
    """
    try:
        fields = json.loads(raw.get(ATTRIBUTE, b"null"))
        attempt = Attempt(**(fields | {"state": State(fields["state"])}))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (attempt.key, attempt.upload_id)
    numbers = (attempt.modified_ns, attempt.size, attempt.crc32, attempt.part_bytes)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return None
    if not trusted:
        return replace(attempt, state=State.SENDING, size=0, crc32=0)
    return attempt


def write(dump: DumpFile, attempt: Attempt) -> None:
    """Record an attempt; one that would not fit is not recorded."""
    value = json.dumps(asdict(attempt), separators=(",", ":")).encode()
    if len(value) <= MOST_ATTRIBUTE_BYTES:
        dump.set_attribute(ATTRIBUTE, value)
    else:
        clear(dump)


def clear(dump: DumpFile) -> None:
    """Forget the attempt: its outcome is known and it left nothing behind."""
    dump.remove_attribute(ATTRIBUTE)

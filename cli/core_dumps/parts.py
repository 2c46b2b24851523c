"""Owns reading an object in ranges: one version of it, and on from where an answer was cut."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.gzip import DamagedError, inflate
from core_dump_format.text import printable
from core_dumps.client import BODY_ERRORS, explain
from core_dumps.errors import CliError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

PART_BYTES = 8 * 1024 * 1024
FETCHERS = 8
BLOCK_BYTES = 1024 * 1024
PIECE_BYTES = 64 * 1024
"""Length of a read from the network; a slow one is noticed after this much."""
MOST_CUTS = 4
"""So many answers in a row may end after less than a piece."""
_PARTIAL_CONTENT = 206


@dataclass(frozen=True, slots=True)
class Remote:
    """One version of a dump object; another version that replaces it is never read by mistake."""

    bucket: Bucket
    dump: Dump
    size_bytes: int
    etag: str | None
    """None reads whichever version is there."""
    crc32: str | None
    """Checksum of the whole object, if the store or the metadata has it."""

    def read(self, first: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of a range in pieces; an answer that ends early is continued.

        Raises:
            CliError: the store refuses, or its answers keep ending early.
        """
        at, cuts = first, 0
        while at < end:
            before, reason = at, "it sent fewer bytes than it announced"
            try:
                for piece in self._read_once(at, end):
                    at += len(piece)
                    yield piece
            except BODY_ERRORS as error:
                reason = printable(str(error))
            cuts = 0 if at - before >= PIECE_BYTES else cuts + 1
            if at < end and cuts > MOST_CUTS:
                raise CliError(f"the store's answers keep ending early ({reason}): run it again to resume")
            if at < end:
                time.sleep(min(2.0, 0.05 * 2**cuts))

    def _read_once(self, first: int, end: int) -> Iterator[bytes]:
        request: dict[str, Any] = {"Range": f"bytes={first}-{end - 1}"}
        if self.etag is not None:
            request["IfMatch"] = self.etag
        try:
            answer = self.bucket.client.get_object(Bucket=self.bucket.name, Key=self.dump.key, **request)
        except (BotoCoreError, ClientError) as error:  # botocore has repeated the request
            raise explain(error, f"downloading {printable(self.dump.key)}") from error
        with contextlib.closing(answer["Body"]) as body:  # `with` alone would give the unchecked stream below
            if first and answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:
                raise RefusedError("the store ignores Range, so parts of an object cannot be read")
            at = first
            while at < end and (piece := body.read(min(PIECE_BYTES, end - at))):
                at += len(piece)
                yield piece


def open_remote(bucket: Bucket, dump: Dump) -> Remote:
    """Ask the store which version of a dump object it has.

    Raises:
        RefusedError: it is not the object that was listed.
        CliError: it cannot be read.
    """
    if dump.size_bytes is None:
        states = ", ".join(dump.states)
        raise RefusedError(f"{printable(dump.key)} is a record without a dump ({states})")
    try:
        answer = bucket.client.head_object(Bucket=bucket.name, Key=dump.key, ChecksumMode="ENABLED")
    except (BotoCoreError, ClientError) as error:
        raise explain(error, f"reading {printable(dump.key)}") from error
    if answer["ContentLength"] != dump.size_bytes:
        raise RefusedError("the object's size changed after it was listed: start again")
    whole = answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
    crc = answer.get("ChecksumCRC32", "")
    stored = crc if whole and crc and "-" not in crc else None
    return Remote(bucket, dump, dump.size_bytes, str(answer["ETag"]), dump.text("crc32") or stored)


def most_bytes(dump: Dump, promise: int | None) -> int:
    """Return the largest acceptable length of a dump: the smaller one of those in metadata and ELF headers.

    Raises:
        RefusedError: neither contains one.
    """
    promises = [number for number in (dump.number("bytes"), promise) if number is not None]
    if not promises:
        raise RefusedError(
            "neither its metadata nor an ELF header contains its length: --keep-compressed downloads it"
        )
    return min(promises)


def unpack(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed content of a gzip object.

    Raises:
        RefusedError: it is damaged, or ends early.
    """
    try:
        yield from inflate(blocks)
    except DamagedError as error:
        raise RefusedError(str(error)) from None

"""Owns reading an object in parts: which object it is, and ranges of that one alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.gzip import DamagedError, inflate
from core_dump_format.text import printable
from core_dumps.client import explain
from core_dumps.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

PART_BYTES = 8 * 1024 * 1024
FETCHERS = 8
BLOCK = 1024 * 1024


def identify(bucket: Bucket, dump: Dump) -> tuple[str, str | None]:
    """Return an object's ETag, and the CRC-32 of the whole where the store knows it.

    Raises:
        RefusedError: it is not the object that was listed.
        CliError: it cannot be read.
    """
    if dump.size_bytes is None:
        states = ", ".join(dump.states)
        raise RefusedError(f"{printable(dump.key)}: there is only a record, no dump ({states})")
    try:
        answer = bucket.client.head_object(Bucket=bucket.name, Key=dump.key, ChecksumMode="ENABLED")
    except (BotoCoreError, ClientError) as error:
        raise explain(error, f"reading {printable(dump.key)}") from error
    if answer["ContentLength"] != dump.size_bytes:
        raise RefusedError("the object's size changed since it was listed: start again")
    whole = answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
    crc = answer.get("ChecksumCRC32", "")
    return str(answer["ETag"]), crc if whole and crc and "-" not in crc else None


def read_part(bucket: Bucket, dump: Dump, etag: str, number: int) -> Iterator[bytes]:
    """Yield the bytes of a part in blocks.

    Raises:
        RefusedError: there were fewer than there should be.
        CliError: it cannot be read.
    """
    first = number * PART_BYTES
    at, end = first, min(first + PART_BYTES, dump.size_bytes or 0)
    try:
        answer = bucket.client.get_object(
            Bucket=bucket.name, Key=dump.key, Range=f"bytes={first}-{end - 1}", IfMatch=etag
        )
        with answer["Body"] as body:
            while at < end and (piece := body.read(min(BLOCK, end - at))):
                at += len(piece)
                yield piece
    except (BotoCoreError, ClientError) as error:
        raise explain(error, f"downloading {printable(dump.key)}") from error
    if at != end:
        raise RefusedError("the store sent fewer bytes than it was asked for: start again, it resumes")


def most_bytes(dump: Dump, promise: int | None) -> int:
    """Return how much may come out of a dump: what both the sidecar and the ELF headers promise.

    Raises:
        RefusedError: neither tells.
    """
    promises = [number for number in (dump.number("bytes"), promise) if number is not None]
    if not promises:
        raise RefusedError(
            "neither the sidecar nor an ELF header tells its length: --keep-compressed gets it"
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

"""Owns what a core in the bucket tells without being downloaded: its first blocks, by ranged GETs that grow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.core import Core, read_build_ids, read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.stream import Forward
from core_dump_format.text import printable
from core_dumps.client import explain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

FIRST_BYTES = 128 * 1024
MOST_BYTES = 8 * 1024 * 1024
"""So much of an object is read at most."""
MOST_CORE_BYTES = 64 * 1024 * 1024
"""And so much of what comes out of it."""


@dataclass(slots=True)
class Head:
    """What the front of a core says."""

    core: Core | None = None
    build_ids: dict[str, str] = field(default_factory=dict)
    """Of mapped files, as far as the front reaches."""
    problem: str | None = None


def ranges(bucket: Bucket, dump: Dump) -> Iterator[bytes]:
    """Yield the first blocks of an object, each twice as long as the one before."""
    at, size, end = 0, FIRST_BYTES, min(dump.size_bytes or 0, MOST_BYTES)
    while at < end:
        last = min(at + size, end) - 1
        try:
            answer = bucket.client.get_object(Bucket=bucket.name, Key=dump.key, Range=f"bytes={at}-{last}")
            with answer["Body"] as body:
                yield body.read(last + 1 - at)
        except (BotoCoreError, ClientError) as error:
            raise explain(error, f"reading {printable(dump.key)}") from error
        at, size = last + 1, size * 2


def read_head(bucket: Bucket, dump: Dump) -> Head:
    """Read what the front of a core says; a damaged one says why instead."""
    blocks = ranges(bucket, dump)
    pieces = inflate_until_damage(blocks) if dump.compressed else blocks
    source = Forward.over(pieces, MOST_CORE_BYTES)
    head = Head()
    try:
        head.core = read_core(source)
    except NotACoreError as error:
        head.problem = str(error)
        return head
    head.build_ids, _ = read_build_ids(head.core, source)
    return head

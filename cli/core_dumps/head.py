"""Owns reading the front of a core in the bucket without downloading it: its vital part, else growing ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from core_dump_format.core import Core, read_build_ids, read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.stream import Forward
from core_dumps.errors import CliError
from core_dumps.parts import Remote
from core_dumps.vital import read_vital, vital_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

FIRST_BYTES = 128 * 1024
MOST_BYTES = 8 * 1024 * 1024
"""The most that is read of an object, unless its vital part is longer."""
MOST_CORE_BYTES = 64 * 1024 * 1024
"""The most that is decompressed."""


@dataclass(slots=True)
class Head:
    """The front of a core."""

    core: Core | None = None
    build_ids: dict[str, str] = field(default_factory=dict)
    """Build IDs of the mapped files that the front reaches, by path."""
    problem: str | None = None
    """Why there is no core."""


def ranges(bucket: Bucket, dump: Dump, at: int = 0) -> Iterator[bytes]:
    """Yield blocks of an object from an offset on; each block is twice as long as the previous one."""
    remote = Remote(bucket, dump, dump.size_bytes or 0, None, None)
    size, end = FIRST_BYTES, min(remote.size_bytes, MOST_BYTES)
    while at < end:
        after = min(at + size, end)
        yield b"".join(remote.read(at, after))
        at, size = after, size * 2


def read_head(bucket: Bucket, dump: Dump) -> Head:
    """Read the front of a core, or its vital part whole and verified; if that fails, the result says why.

    The vital part holds the headers, the notes and the first pages of modules. More of the object is read only for the
    first page of a module that was not in the memory of the crashed process, because that page lies further back.
    """
    head = Head()
    try:
        vital = vital_bytes(dump)
        blocks = ranges(bucket, dump, vital or 0)
        if vital is not None:
            blocks = chain([read_vital(bucket, dump)], blocks)
        pieces = inflate_until_damage(blocks) if vital or dump.compressed else blocks
        source = Forward.over(pieces, MOST_CORE_BYTES)
        head.core = read_core(source)
        head.build_ids, _ = read_build_ids(head.core, source)
    except (NotACoreError, CliError) as error:
        head.problem = str(error)
    return head

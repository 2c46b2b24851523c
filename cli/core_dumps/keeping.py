"""Owns the modules of a bucket as a whole: finding those with wrong content, and those that no dump needs."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from core_dump_format.keys import MODULES_LIST_SUFFIX, module_key
from core_dump_format.modules import MOST_LIST_BYTES, MOST_MODULE_BYTES
from core_dumps import stored
from core_dumps.errors import RefusedError
from core_dumps.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.client import Row
    from core_dumps.fetch import Progress

READERS = 24
VERIFIERS = 4
BATCH = 1000
"""Number of lists whose results are in memory at a time."""
YOUNG_DAYS = 30
YOUNG_SECONDS = YOUNG_DAYS * 86400
"""A node sends a file again only after 7 days, and a list waits for its dump: up to three weeks cost no module."""
_SHA256 = re.compile(rb"[0-9a-f]{64}")


def modules_of(bucket: Bucket) -> Iterator[tuple[str, Row]]:
    """Yield the SHA-256 and the object of each module; other objects in their folder are left out."""
    folder = module_key(bucket.prefix, "")
    for row in bucket.objects(folder):
        sha256 = row.key.removeprefix(folder)
        if _SHA256.fullmatch(sha256.encode()):
            yield sha256, row


def find_wrong(bucket: Bucket, progress: Progress) -> tuple[int, dict[str, str]]:
    """Read every module; return their number, and the key and the problem of each with wrong content.

    Raises:
        CliError: one of them cannot be read.
    """
    every = list(modules_of(bucket))
    progress.start("verify", sum(row.size_bytes for _, row in every))

    def check(sha256: str) -> str | None:
        try:
            for _ in stored.content_of(bucket, sha256, MOST_MODULE_BYTES, progress):
                pass
        except stored.AbsentError:
            return None
        except RefusedError as error:
            return str(error)
        return None

    with Pool(VERIFIERS) as pool:
        found = zip(every, pool.map(check, [sha256 for sha256, _ in every]), strict=True)
        return len(every), {row.key: problem for (_, row), problem in found if problem}


class Lists:
    """The lists of modules in a bucket that were read so far."""

    def __init__(self, bucket: Bucket) -> None:
        """Prepare; no list is read."""
        self._bucket = bucket
        self._known: set[str] = set()
        self._needed: set[bytes] = set()

    def read_new(self) -> None:
        """Read the lists that were not read yet; a list need not be well-formed, every SHA-256 in it counts.

        Raises:
            CliError: a list cannot be read, so nothing is known to be unneeded.
        """
        bucket = self._bucket
        own = module_key(bucket.prefix, "")
        keys = [
            row.key
            for row in bucket.objects(bucket.prefix)
            if row.key.endswith(MODULES_LIST_SUFFIX) and not row.key.startswith(own)
        ]
        new = [key for key in keys if key not in self._known]

        def read(key: str) -> set[bytes]:  # not whole lists: a fleet has gigabytes of them
            return set(_SHA256.findall(bucket.small_object(key, MOST_LIST_BYTES))) - self._needed

        for at in range(0, len(new), BATCH):
            with Pool(READERS) as pool:
                for found in pool.map(read, new[at : at + BATCH]):
                    self._needed |= found
        self._known.update(new)

    def need(self, sha256: str) -> bool:
        """Tell whether one of the lists that were read names a module."""
        return sha256.encode() in self._needed


def find_unneeded(bucket: Bucket, lists: Lists) -> tuple[int, dict[str, str]]:
    """Return the number of modules, and the keys of those that are old enough and in no list, by SHA-256.

    Raises:
        CliError: a list cannot be read, so nothing is known to be unneeded.
    """
    every = list(modules_of(bucket))  # before the lists: a module that arrives later is young
    lists.read_new()
    oldest = time.time() - YOUNG_SECONDS
    return len(every), {
        sha256: row.key
        for sha256, row in every
        if not lists.need(sha256) and 0 < row.modified_seconds < oldest
    }

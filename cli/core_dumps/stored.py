"""Owns the modules in the bucket: the list of a dump, and files by their SHA-256, verified before they are used.

Anybody with write access to the bucket can store any bytes under the name of a module. Content whose SHA-256 differs
from the key is never used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from itertools import chain
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.gzip import DamagedError, inflate
from core_dump_format.keys import MODULES_LIST_SUFFIX, module_key
from core_dump_format.modules import MOST_LIST_BYTES, ListError, parse_list
from core_dump_format.text import printable
from core_dumps.client import error_code, explain
from core_dumps.dump import Dump
from core_dumps.errors import CliError, RefusedError
from core_dumps.parts import Remote
from core_dumps.pool import Pool
from core_dumps.show import size as sized
from core_dumps.workfile import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from core_dump_format.modules import Module, ModuleList
    from core_dumps.bucket import Bucket
    from core_dumps.fetch import Progress

FETCHERS = 6
SUFFIX = ".module"
_ABSENT = frozenset({"404", "NoSuchKey", "403", "AccessDenied"})
"""Without the permission s3:ListBucket, S3 answers 403 for an object that does not exist."""


class AbsentError(CliError):
    """The bucket has no such module."""


def read_list(bucket: Bucket, dump: Dump) -> ModuleList | None:
    """Return the list of a dump's modules; None if the bucket has none.

    Raises:
        CliError: it cannot be read, or is not a list.
    """
    if not dump.has_modules:
        return None
    key = dump.key + MODULES_LIST_SUFFIX
    content = bucket.small_object(key, MOST_LIST_BYTES)
    try:
        return parse_list(content)
    except ListError as error:
        raise CliError(f"{printable(key)} is not a list of modules: {error}") from None


def find(bucket: Bucket, sha256: str) -> int | None:
    """Return the size of a module's object; None if the bucket has none, or refuses to tell.

    Raises:
        CliError: the store cannot be asked.
    """
    key = module_key(bucket.prefix, sha256)
    try:
        return int(bucket.client.head_object(Bucket=bucket.name, Key=key)["ContentLength"])
    except ClientError as error:
        if error_code(error) in _ABSENT:
            return None
        raise explain(error, f"reading {printable(key)}") from error
    except BotoCoreError as error:
        raise explain(error, f"reading {printable(key)}") from error


def content_of(
    bucket: Bucket, sha256: str, most_bytes: int, progress: Progress | None = None
) -> Iterator[bytes]:
    """Yield the decompressed content of a module; some stores decompress it themselves.

    Raises:
        AbsentError: the bucket does not have it.
        RefusedError: it has another SHA-256, or more bytes; the yielded bytes must not be used.
        CliError: it cannot be read.
    """
    size = find(bucket, sha256)
    if size is None:
        raise AbsentError("not in the bucket")
    remote = Remote(bucket, Dump(module_key(bucket.prefix, sha256), size, 0, False, {}), size, None, None)
    blocks = _counted(remote.read(0, size), progress)
    first = next(blocks, b"")
    blocks = chain([first], blocks)
    digest, length = hashlib.sha256(), 0
    try:
        for piece in inflate(blocks) if first.startswith(b"\x1f\x8b") else blocks:
            digest.update(piece)
            length += len(piece)
            if length > most_bytes:
                raise RefusedError(f"it has more than {most_bytes} bytes")
            yield piece
    except DamagedError as error:
        raise RefusedError(str(error)) from None
    if digest.hexdigest() != sha256:
        raise RefusedError("its content has another SHA-256 than its name")


def _counted(blocks: Iterator[bytes], progress: Progress | None) -> Iterator[bytes]:
    for block in blocks:
        if progress is not None:
            progress.advance(len(block))
        yield block


def fetch_modules(
    bucket: Bucket, wanted: Iterable[Module], cache: str, progress: Progress, note: Callable[[str], None]
) -> dict[str, str]:
    """Return the places of modules in the cache by SHA-256; those that the bucket does not have are left out.

    Args:
        bucket: where they are stored.
        wanted: rows of a list.
        cache: a directory that only this user can write to.
        progress: is told about the download.
        note: is called with a line for each module that is refused or cannot be read.
    """
    by_sha = {module.sha256: module for module in wanted if module.sha256}
    found: dict[str, str] = {}
    missing = []
    for sha256, module in by_sha.items():
        path = os.path.join(cache, sha256 + SUFFIX)
        if os.path.isfile(path):
            os.utime(path)
            found[sha256] = path
        else:
            missing.append(module)
    if not missing:
        return found
    needed, free = sum(module.size_bytes for module in missing), shutil.disk_usage(cache).free
    if needed > free:
        note(
            f"{len(missing)} modules are not fetched: they need {sized(needed)}, and {cache} has {sized(free)} free"
        )
        return found
    progress.start("modules", None)
    return found | _fetch_all(missing, lambda module: _fetch(bucket, module, cache, progress), note)


def _fetch_all(
    modules: Iterable[Module], fetch: Callable[[Module], str], note: Callable[[str], None]
) -> dict[str, str]:
    """Fetch several modules at a time; return the paths of those that the bucket has and that were verified."""
    found = {}
    with Pool(FETCHERS) as pool:
        loads = [(module, pool.submit(fetch, module)) for module in modules]
        for module, load in loads:
            try:
                found[module.sha256] = load.result()
            except AbsentError:
                continue
            except CliError as error:
                note(f"module {printable(module.path.decode('utf-8', 'replace'))}: {error}")
    return found


def _fetch(bucket: Bucket, module: Module, cache: str, progress: Progress) -> str:
    """Download one module into the cache; the file gets its name after the content was verified."""
    path = os.path.join(cache, module.sha256 + SUFFIX)
    try:
        with whole_file(path, ".module-") as file:
            file.writelines(content_of(bucket, module.sha256, module.size_bytes, progress))
    except OSError as error:
        raise CliError(f"{cache}: {error.strerror}") from error
    return path

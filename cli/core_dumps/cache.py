"""Owns the cache of cores and executables that debuggers read: for its owner alone, and emptied of what is unused."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from hashlib import sha256
from typing import TYPE_CHECKING

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.errors import UsageError
from core_dumps.fetch import fetch
from core_dumps.tree import PREFIX
from core_dumps.vital import fetch_vital, vital_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump
    from core_dumps.fetch import Progress

KEEP_SECONDS = 7 * 86400
"""Files that were unused for longer are deleted, because dumps contain secrets."""


def cache_directory() -> str:
    """Return the cache directory; make it if it does not exist.

    Raises:
        UsageError: it cannot be made, or somebody else can write to it.
    """
    path = _chosen()
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise UsageError(
            f"cannot make the cache directory {printable(path)} ({error.strerror}): "
            "set CORE_DUMPS_CACHE to a directory of your own"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UsageError(
            f"the cache directory {printable(path)} must belong to you, and nobody else may write to it: "
            "set CORE_DUMPS_CACHE to another one"
        )
    _remove_unused(path)
    return path


def names() -> frozenset[str]:
    """Return the names of the files in the cache."""
    return frozenset(os.listdir(cache_directory()))


def _chosen() -> str:
    """Return the configured path. XDG_CACHE_HOME must be absolute; other values are ignored (XDG Base Directory)."""
    own = os.environ.get("CORE_DUMPS_CACHE")
    if own:
        if not os.path.isabs(own):
            raise UsageError(f"CORE_DUMPS_CACHE={printable(own)}: takes an absolute path")
        return own
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "core-dumps")


def _remove_unused(path: str) -> None:
    oldest = time.time() - KEEP_SECONDS
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another command renamed or removed it
                if entry.stat(follow_symlinks=False).st_mtime >= oldest:
                    continue
                if entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)
                elif entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)


def load(bucket: Bucket, dump: Dump, progress: Progress, note: Callable[[str], None], *, full: bool) -> str:
    """Return the path of a core in the cache: of the whole dump, or of its vital part, with a note, if it has one."""
    identity = f"{bucket.name}/{dump.key}/{dump.size_bytes}/{dump.text('crc32')}"
    path = os.path.join(cache_directory(), f"{sha256(identity.encode()).hexdigest()[:32]}.core")
    size = vital_bytes(dump)
    if os.path.isfile(path):
        os.utime(path)
    elif full or size is None:
        fetch(bucket, dump, path, progress, keep_compressed=False, force=False)
    else:
        path = path.removesuffix(".core") + ".vital"
        if os.path.isfile(path):
            os.utime(path)
        else:
            fetch_vital(bucket, dump, path, progress)
        rest = "the other memory that was kept" if dump.trimmed else "the heap"
        note(
            f"this part of {show.size(size)} (of {show.size(dump.size_bytes)}) has every stack; "
            f"--full also downloads {rest}"
        )
    return path

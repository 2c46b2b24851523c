"""Owns the debugger: the cache that a dump is read from, and the command lines of gdb and lldb."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import time
from hashlib import sha256
from typing import TYPE_CHECKING

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.buildid import Modules, read_modules
from core_dumps.errors import CliError, UsageError
from core_dumps.fetch import fetch
from core_dumps.vital import fetch_vital, vital_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump
    from core_dumps.fetch import Progress

KEEP_SECONDS = 7 * 86400
"""What is in the cache longer, unused, is deleted: dumps hold secrets."""
MOST_LISTED = 20


def cache_directory() -> str:
    """Return the cache, made for its owner alone.

    Raises:
        CliError: somebody else's directory is in its place.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.environ.get("CORE_DUMPS_CACHE") or os.path.join(base, "core-dumps")
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise CliError(f"{path} is not a directory of yours alone: CORE_DUMPS_CACHE names another")
    oldest = time.time() - KEEP_SECONDS
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                os.unlink(entry.path)
    return path


def load(bucket: Bucket, dump: Dump, progress: Progress, *, full: bool) -> str:
    """Return the path of a core in the cache: of the whole dump, or of its vital part if it has one."""
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
        show.note(
            f"read {show.size(size)} of {show.size(dump.size_bytes)}: every stack; --full also fetches the heap"
        )
    return path


def check(program: str, roots: Sequence[str]) -> None:
    """Check what was asked for before anything is downloaded.

    Raises:
        UsageError: no such debugger or directory.
    """
    if shutil.which(program) is None:
        raise UsageError(
            f"{printable(program)} is not installed: --debugger takes gdb or lldb, or a path of one"
        )
    for root in roots:
        if not os.path.isdir(root) or any(c in root for c in '\n\r:"'):
            raise UsageError(
                f"--sysroot {printable(root)}: takes a directory (its name without ':' and '\"')"
            )


def modules(core: str, dump: Dump, roots: Sequence[str]) -> Modules:
    """Find the files the core was made of, and say which are missing and how to get them."""
    found = read_modules(core, dump.text("exe"), roots, cache_directory())
    missing = found.missing
    if found.executable is None or found.executable.found is None:
        path = found.executable.path if found.executable else dump.program
        build_id = (found.executable.build_id if found.executable else None) or "unknown"
        show.note(f"the executable {path} (build ID {build_id}) is not here")
    for module in missing[:MOST_LISTED]:
        show.note(f"missing: {module.path} (build ID {module.build_id})")
    if missing:
        show.note(
            "to get them: unpack the image the process ran in and give --sysroot DIR, "
            "or set DEBUGINFOD_URLS to a server that has these build IDs"
        )
    return found


def command(  # noqa: PLR0913  all that is on it
    debugger: str, core: str, found: Modules, roots: Sequence[str], arguments: str, *, batch: bool
) -> list[str]:
    """Return the command line of a debugger that `check` knows."""
    program = shutil.which(debugger) or debugger
    executable = found.executable.found if found.executable else None
    extra = shlex.split(arguments)
    if "lldb" in os.path.basename(program):
        root = ["-O", f'platform select --sysroot "{os.path.abspath(roots[0])}" host'] if roots else []
        run = ["--batch", "-o", "thread backtrace all"] if batch else []
        return [program, *root, *run, *extra, *([executable] if executable else []), "--core", core]
    root = ["-iex", f"set sysroot {os.path.abspath(roots[0])}"] if roots else []
    quiet = ["-nx", "-batch", "-ex", "thread apply all bt"] if batch else []
    asks = ["-iex", "set debuginfod enabled " + ("on" if os.environ.get("DEBUGINFOD_URLS") else "off")]
    files = [f"--exec={executable}", f"--symbols={executable}"] if executable else []
    return [program, "-q", *asks, *root, *quiet, *extra, *files, f"--core={core}"]


def run(line: Sequence[str]) -> int:
    """Run a debugger on this terminal and return its exit code."""
    try:
        return subprocess.run(line, check=False).returncode  # noqa: S603  a list, no shell
    except KeyboardInterrupt:
        return 130


def backtrace(line: Sequence[str]) -> tuple[int, str]:
    """Run a debugger in batch and return its exit code and what it says."""
    done = subprocess.run(line, check=False, capture_output=True, stdin=subprocess.DEVNULL)  # noqa: S603  likewise
    text = done.stdout.decode("utf-8", "backslashreplace")
    if done.returncode:
        text += done.stderr.decode("utf-8", "backslashreplace")
    return done.returncode, text

"""Owns asking debuginfod servers for executables by build ID (debuginfod(8)); every response is checked."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING

from core_dumps import show
from core_dumps.buildid import BUILD_ID, read_build_id
from core_dumps.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MOST_DOWNLOAD_BYTES = 4 * 1024**3
TIMEOUT_SECONDS = 60
DOWNLOAD_SECONDS = 1800
BLOCK_BYTES = 256 * 1024
FETCHERS = 6
_NOT_FOUND = 404


def fetch_all(
    build_ids: Iterable[str], cache: str, note: Callable[[str], None] = show.note
) -> dict[str, str]:
    """Return the files in the cache of all build IDs that a server knows; several are downloaded at a time."""
    wanted = [build_id for build_id in dict.fromkeys(build_ids) if BUILD_ID.fullmatch(build_id)]
    silent: set[str] = set()
    with Pool(FETCHERS) as pool:
        found = list(pool.map(lambda build_id: debuginfod(build_id, cache, silent, note), wanted))
    return {build_id: path for build_id, path in zip(wanted, found, strict=True) if path is not None}


def debuginfod(
    build_id: str,
    cache: str,
    silent: set[str] | None = None,
    note: Callable[[str], None] = show.note,
) -> str | None:
    """Ask the servers in DEBUGINFOD_URLS for an executable; a file with another build ID is not used.

    Args:
        build_id: of the file.
        cache: the directory for downloaded files.
        silent: servers that did not answer and are not asked again; the function adds to it.
        note: is called with a line about each failure.
    """
    silent = set() if silent is None else silent
    target = os.path.join(cache, f"{build_id}.executable")
    if os.path.isfile(target):
        return target
    for server in os.environ.get("DEBUGINFOD_URLS", "").split():
        if not server.startswith(("http://", "https://")) or server in silent:
            continue
        partial = f"{target}.{os.getpid()}"
        try:
            _download(f"{server.rstrip('/')}/buildid/{build_id}/executable", partial)
            if read_build_id(partial) == build_id:
                os.replace(partial, target)
                return target
            note(f"{server} sent a file with another build ID: not used")
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
            if getattr(error, "code", 0) != _NOT_FOUND and server not in silent:
                note(f"{server}: {error}")
            if not isinstance(error, (urllib.error.HTTPError, HTTPException, ValueError)):
                silent.add(server)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return None


def _download(url: str, target: str) -> None:
    """Download a file.

    Raises:
        ValueError: it is too long, or takes too long.
        HTTPException: the answer is damaged.
        OSError: the server does not answer, or the file cannot be written.
    """
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "xb") as file:  # noqa: S310  http(s) alone
        while piece := answer.read1(BLOCK_BYTES):
            file.write(piece)
            if file.tell() > MOST_DOWNLOAD_BYTES:
                raise ValueError("too long for an executable")
            if time.monotonic() > deadline:
                raise ValueError(f"the download takes longer than {DOWNLOAD_SECONDS} s")
        if answer.length:  # bytes that were announced and did not come
            raise ValueError("the answer ended early")

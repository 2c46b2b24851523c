"""Owns gathering the files of a dump: from this machine, then from the bucket, then from debuginfod."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from core_dump_format.text import printable
from core_dumps import stored
from core_dumps.buildid import read_build_id
from core_dumps.cache import cache_directory
from core_dumps.debuginfod import fetch_all
from core_dumps.errors import CliError
from core_dumps.wanted import read_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from core_dumps.bucket import Bucket
    from core_dumps.buildid import Module, Modules
    from core_dumps.dump import Dump
    from core_dumps.fetch import Progress


def gather(  # noqa: PLR0913, PLR0917  a dump, its core, and where files come from
    bucket: Bucket,
    dump: Dump,
    core: str,
    roots: Sequence[str],
    progress: Progress,
    note: Callable[[str], None],
) -> Modules:
    """Return the files of a dump, as many as can be found.

    Args:
        bucket: where the dump is.
        dump: the dump.
        core: its core on this machine.
        roots: directories that the user named.
        progress: is told about downloads.
        note: is called with a line about each failure; a debugger can do without the file.
    """
    listed = None
    try:
        listed = stored.read_list(bucket, dump)
    except CliError as error:
        note(str(error))
    modules = read_modules(core, dump.executable, roots, listed)
    cache = cache_directory()
    missing = {module.sha256 for module in modules.missing if module.sha256}
    if listed is not None and missing:
        rows = [row for row in listed.modules if row.sha256 in missing]
        places = stored.fetch_modules(bucket, rows, cache, progress, note)
        for module in _misplaced(modules, places):
            note(f"{printable(module.path)}: the dump's list names a file with another build ID: not used")
            del places[module.sha256]
        modules = modules.with_found(places)
    if os.environ.get("DEBUGINFOD_URLS"):
        build_ids = [module.build_id for module in modules.missing if module.build_id]
        modules = modules.with_found(fetch_all(build_ids, cache, note))
    return modules


def _misplaced(modules: Modules, places: Mapping[str, str]) -> list[Module]:
    """Return the modules, one for each SHA-256, whose file from the bucket has not the build ID of the core."""
    wrong = {
        module.sha256: module
        for module in modules.missing
        if module.build_id and module.sha256 in places
        if read_build_id(places[module.sha256]) != module.build_id
    }
    return list(wrong.values())

"""Owns the list of modules of a dump that was stored.

The helper's list is published by a pass over `.modules/`, which needs the dump's key. For a raw core, which has no such
list, this module makes one: it names the mapped files, and none of them was kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_dump_collector.node.modulefiles import Receipt, note_stored
from core_dump_collector.s3 import documents
from core_dump_format.core import DELETED, read_build_ids, read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.keys import MODULES_LIST_SUFFIX
from core_dump_format.modules import (
    BUILD_ID,
    MOST_MODULES,
    MOST_PATH_BYTES,
    Module,
    ModuleList,
    render_list,
)
from core_dump_format.names import is_compressed
from core_dump_format.stream import Seekable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.s3.store import Store
    from core_dump_format.core import Core

SECONDS = 2.0


def pass_on(store: Store, dump: DumpFile, directory: str, key: str, sensitive: str) -> None:
    """Leave a receipt for the helper's list, or publish one for a raw core. Never fails: a dump must not wait for it.

    Args:
        store: the bucket.
        dump: the dump, which is stored.
        directory: the watch directory.
        key: the dump's key.
        sensitive: why the dump is sensitive, or empty.
    """
    receipt = Receipt(store.place.bucket, key)
    if (dump.is_trusted and note_stored(directory, dump.name, receipt)) or is_compressed(dump.name):
        return
    try:
        content = list_raw(dump.fd, dump.name, sensitive)
        if content is not None:
            documents.put(store, key + MODULES_LIST_SUFFIX, content)
    except Exception:  # noqa: BLE001  neither hostile bytes nor the store may keep the dump on disk
        return


def list_raw(descriptor: int, name: str, sensitive: str) -> bytes | None:
    """Return the list of the files of a raw core; None if it is not a core or names no files.

    Args:
        descriptor: the core.
        name: its name in the watch directory.
        sensitive: why the dump is sensitive, or empty.
    """
    source = Seekable(descriptor, SECONDS)
    try:
        core = read_core(source)
    except NotACoreError:
        return None
    build_ids, _ = read_build_ids(core, source)
    found = list(_modules(core, build_ids))
    if not found:
        return None
    listed = ModuleList(name, tuple(found[:MOST_MODULES]), max(0, len(found) - MOST_MODULES), sensitive)
    return render_list(listed)


def _modules(core: Core, build_ids: dict[str, str]) -> Iterable[Module]:
    """Return each file with executable pages in memory."""
    first: dict[str, Module] = {}
    code: set[str] = set()
    for file in core.files:
        path = (file.path + (DELETED if file.deleted else "")).encode("utf-8", "backslashreplace")
        known = first.get(file.path)
        if known is None:
            build_id = build_ids.get(file.path, "")
            build_id = build_id if BUILD_ID.fullmatch(build_id) else ""
            known = Module(path, file.start, file.end, file.offset_bytes, build_id, missing="not_captured")
        first[file.path] = known._replace(end=max(known.end, file.end))
        if core.is_code(file.start):
            code.add(file.path)
    return (
        module
        for path, module in first.items()
        if path in code and 0 < len(module.path) <= MOST_PATH_BYTES and module.start < module.end
    )

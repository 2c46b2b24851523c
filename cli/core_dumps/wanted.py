"""Owns the list of files that a debugger needs: from the core's notes, the loader's list and the list in the bucket."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from core_dump_format.core import read_build_ids, read_core, read_memory
from core_dump_format.elf import PAGE, NotACoreError, build_id_of
from core_dump_format.modules import ModuleList
from core_dump_format.stream import Seekable
from core_dumps.buildid import Module, Modules, Search
from core_dumps.dump import DELETED
from core_dumps.loader import read_loaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core_dump_format import modules as contract
    from core_dump_format.core import Core
    from core_dump_format.stream import Forward

MOST_PAGES_BELOW_ENTRY = 262_144
"""1 GiB: the largest distance from a program's first instruction back to its ELF header."""
_NOTHING = ModuleList("")


def read_modules(
    core_path: str, executable: str | None, roots: Sequence[str], listed: ModuleList | None = None
) -> Modules:
    """List the files that a process had mapped, and find them on this machine.

    Args:
        core_path: a core on this machine.
        executable: the program's path in the metadata. The kernel leaves the list of mapped files out of a core if
            it is too long.
        roots: directories with the files of the node or image.
        listed: the list of modules in the bucket, if there is one.
    """
    descriptor = os.open(core_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = Seekable(descriptor)
        core = read_core(source)
        modules = _read(core, source, executable, listed or _NOTHING)
    except NotACoreError:
        return Modules(None, ())
    finally:
        os.close(descriptor)
    search = Search(roots)
    main = search.find(modules.executable) if modules.executable else None
    return replace(modules, executable=main, libraries=tuple(map(search.find, modules.libraries)))


def _read(core: Core, source: Forward, executable: str | None, listed: ModuleList) -> Modules:
    build_ids, _ = read_build_ids(core, source)
    found = {path: Module(path, build_id) for path, build_id in build_ids.items()}
    for path, row in _rows(core, listed):
        found[path] = _with_row(found.get(path, Module(path, None)), row)
    _add_loaded(core, source, found)
    program = core.executable() or executable
    main = found.pop(program, None) or Module(program, None) if program else None
    if main is not None:
        build_id = main.build_id or (None if core.files else _build_id_at_entry(core, source))
        main = replace(main, build_id=build_id, entry=core.entry, is_unproven=False)
    libraries = tuple(found[path] for path in sorted(found))
    return Modules(main, libraries, core.machine, bool(core.files), listed.left_out)


def _rows(core: Core, listed: ModuleList) -> Iterator[tuple[str, contract.Module]]:
    """Yield the rows of the list with the paths that the core gives for the same addresses."""
    for row in listed.modules:
        file = core.file_at(row.start)
        if file is not None:
            yield file.path, row
        elif not core.files:
            yield row.path.decode("utf-8", "backslashreplace").removesuffix(DELETED), row


def _with_row(module: Module, row: contract.Module) -> Module:
    """Return a module with the facts of the list, unless its build ID in the core shows that it is another file."""
    if module.build_id is not None and row.build_id and row.build_id != module.build_id:
        return module
    build_id = module.build_id or row.build_id or None
    return replace(
        module, build_id=build_id, sha256=row.sha256, size_bytes=row.size_bytes, reason=row.missing
    )


def _add_loaded(core: Core, source: Forward, found: dict[str, Module]) -> None:
    """Add the names in the loader's list to the modules, and add modules that only that list has."""
    for loaded in read_loaded(core, source):
        file = core.file_at(loaded.dynamic)
        path = file.path if file else loaded.name.decode("utf-8", "backslashreplace")
        module = found.get(path)
        if module is None and not core.files and path.startswith("/"):
            build_id = build_id_of(read_memory(core, source, loaded.base, PAGE))
            module = Module(path, build_id, is_unproven=build_id is None)
        if module is not None:
            found[path] = replace(module, names=(*module.names, loaded.name))


def _build_id_at_entry(core: Core, source: Forward) -> str | None:
    """Return the build ID in the first ELF header at or below the program's first instruction."""
    if core.entry is None:
        return None
    top = core.entry // PAGE * PAGE
    for address in range(top, max(-1, top - MOST_PAGES_BELOW_ENTRY * PAGE), -PAGE):
        page = read_memory(core, source, address, PAGE)
        if page.startswith(b"\x7fELF"):
            return build_id_of(page)
    return None

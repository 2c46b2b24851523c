"""Owns everything that a debugger needs to open a dump: the tree of its files, and the command line."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from core_dump_format.stream import Seekable
from core_dump_format.text import printable
from core_dumps import tools
from core_dumps.backtrace import MOST_FRAMES
from core_dumps.buildid import Module, Modules, read_build_id
from core_dumps.cache import cache_directory
from core_dumps.dump import DELETED
from core_dumps.missing import note_missing
from core_dumps.neutral import neutralise
from core_dumps.tree import DEBUG_DIRECTORY, Tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from core_dumps.dump import Dump
    from core_dumps.tools import Files


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a debugger needs to open a dump; a context manager that removes the tree."""

    program: str
    """Path of the debugger."""
    core: str
    modules: Modules
    tree: Tree
    executable: str | None
    """Path of the program's file for the debugger."""
    files: Files

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the tree."""
        self.tree.__exit__(kind, error, trace)

    def command(self, arguments: str, *, batch: bool) -> list[str]:
        """Return the command line; `batch` prints a backtrace of all threads."""
        extra, name = shlex.split(arguments), os.path.basename(self.program)
        program = [self.executable] if self.executable else []
        if name == tools.DRGN:
            return self._for_drgn(batch=batch) + extra
        if "lldb" in name:
            return [self.program, *self._for_lldb(batch=batch), *extra, *program, "--core", self.core]
        if "eu-stack" in name:
            # eu-stack asks the server for libraries only if no program is named; it finds a served one by build ID.
            served = {module.build_id for module in self.modules.every if module.found is not None}
            named = [f"--executable={path}" for path in program if read_build_id(path) not in served - {None}]
            limit = [f"-n{MOST_FRAMES + 1}"] if batch else []
            return [self.program, *limit, *named, *extra, f"--core={self.core}"]
        options = [f"--exec={path}" for path in program] + [f"--symbols={path}" for path in self._symbols()]
        return [self.program, "-q", *self._for_gdb(batch=batch), *extra, *options, f"--core={self.core}"]

    def _symbols(self) -> list[str]:
        """Return the file with the program's symbols: the program itself, unless the user named another one."""
        named = [path for path in self.files.symbols if read_build_id(path) is None]
        return named[:1] or ([self.executable] if self.executable else [])

    def shorten(self, line: str) -> str:
        """Return a line of output without the path of the tree, so that files have the paths of the process."""
        return line.replace(self.tree.root + "/", "/")

    def _for_drgn(self, *, batch: bool) -> list[str]:
        """Return a command line that imports nothing from the working directory (`-P`)."""
        python = [sys.executable, "-P", "-m"]
        if batch:
            symbols = next(iter(self._symbols()), "")
            words = [self.core, self.tree.path, self.executable or "", symbols, str(MOST_FRAMES + 1)]
            return [*python, "core_dumps.drgnstacks", *words]
        found = [module.found for module in self.modules.every if module.found is not None]
        files = [word for path in [*found, *self.files.symbols] for word in ("-s", path)]
        places = ["--debug-directory", self.tree.symbols, "--no-symbols-by", "module-name"]
        return [*python, tools.DRGN, "-q", "-c", self.core, *places, *files]

    def _for_lldb(self, *, batch: bool) -> list[str]:
        tree = self.tree
        settings = ["settings set target.load-script-from-symbol-file false"]
        settings += ["settings set target.load-cwd-lldbinit false"]
        settings += [f'settings append target.exec-search-paths "{tree.flat}"']
        settings += [f'settings append target.debug-file-search-paths "{tree.symbols}"']
        settings += [f'platform select --sysroot "{tree.root}" host']
        words = [word for setting in settings for word in ("-O", setting)]
        return words + (["--batch", "-o", f"thread backtrace -c {MOST_FRAMES + 1} all"] if batch else [])

    def _for_gdb(self, *, batch: bool) -> list[str]:
        """Return options that keep gdb from running code of the dump's files; `$sdir` is the system's own libraries."""
        settings = ["set auto-load no", "set auto-load libthread-db on", "set libthread-db-search-path $sdir"]
        settings.append("set debuginfod enabled " + ("on" if os.environ.get("DEBUGINFOD_URLS") else "off"))
        settings.append(f"set sysroot {self.tree.root}")
        settings.append(f"set solib-search-path {self.tree.flat}")
        beside = [os.path.join(os.path.abspath(root), "usr/lib/debug") for root in self.files.roots]
        settings.append(f"set debug-file-directory {':'.join([self.tree.symbols, *beside, DEBUG_DIRECTORY])}")
        words = [word for setting in settings for word in ("-iex", setting)]
        return words + (
            ["-nx", "-batch", "-ex", f"thread apply all -ascending bt {MOST_FRAMES + 1}"] if batch else []
        )


def prepare(core: str, dump: Dump, modules: Modules, files: Files, note: Callable[[str], None]) -> Session:
    """Make the tree of a dump's files, and find a debugger that reads it; tell the user which files are missing."""
    if files.executable is not None:
        modules = _with_executable(modules, files.executable, note)
    descriptor = os.open(core, os.O_RDONLY | os.O_CLOEXEC)
    try:
        neutralise(core, Seekable(descriptor))
    finally:
        os.close(descriptor)
    note_missing(modules, dump, note)
    program = tools.for_machine(files.program, modules.machine, note)
    tree = Tree(cache_directory())
    try:
        executable = _fill(tree, modules, files, note)
    except BaseException:
        tree.__exit__(None, None, None)
        raise
    return Session(program, core, modules, tree, executable, files)


def _fill(tree: Tree, modules: Modules, files: Files, note: Callable[[str], None]) -> str | None:
    """Put all files that were found into a tree; return the place of the executable."""
    executable = None
    for module in modules.every:
        if module.found is None:
            continue
        place = tree.add(module.path.removesuffix(DELETED), module.found)
        for name in module.names:
            tree.add(name, module.found)
        if module is modules.executable:
            executable = place or os.path.abspath(module.found)
    tree.merge_usr()
    known = {module.build_id for module in modules.every}
    for path in files.symbols:
        build_id = read_build_id(path)
        if build_id is not None:
            tree.add_symbols(build_id, path)
        if build_id not in known or build_id is None:
            note(f"nothing proves that {printable(path)} belongs to this dump: no file has its build ID")
    return executable


def _with_executable(modules: Modules, path: str, note: Callable[[str], None]) -> Modules:
    """Use a file that the user named, with a note unless its build ID proves it."""
    known = modules.executable.build_id if modules.executable else None
    build_id = read_build_id(path)
    if known is None:
        note(f"nothing proves that {path} is the executable of this dump: its build ID is not known")
    elif build_id != known:
        note(f"{path} has build ID {build_id or 'none'}, but the dump's executable has {known}")
    place = modules.executable.path if modules.executable else path
    names = modules.executable.names if modules.executable else ()
    named = Module(place, known, os.path.abspath(path), names=names)
    return replace(modules, executable=named)

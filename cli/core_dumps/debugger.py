"""Owns the debugger: which one is run, its command line, and the judgement of its backtrace."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Self

from core_dump_format.stream import Seekable
from core_dump_format.text import printable
from core_dumps import show
from core_dumps.buildid import Module, Modules, read_build_id
from core_dumps.cache import cache_directory
from core_dumps.dump import DELETED
from core_dumps.errors import UsageError
from core_dumps.missing import note_missing
from core_dumps.neutral import neutralise
from core_dumps.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from core_dumps.dump import Dump

MOST_LINE_BYTES = 64 * 1024
MOST_SKIPPED = 1000
"""Lines before a backtrace that are kept, in case there is none."""
MOST_FRAMES = 256
"""Frames of a thread in a backtrace; a stack overflow has tens of thousands."""
DEBUG_DIRECTORY = "/usr/lib/debug"
"""Where distributions put separate symbols, and gdb looks for them by default."""
_MULTIARCH = "gdb-multiarch"
_READS = {"x86_64": {"x86-64", "i386"}, "aarch64": {"aarch64", "arm"}}
"""Cores that gdb reads on a machine, by the machine's name in uname(2)."""
_RESOLVED = re.compile(
    r" *#\d+ +(?:(?:0x[0-9a-f]+|<unavailable>) in )?(?!0x|\?\?|<unavailable>|<signal handler)\S"
    r"| *(?:\* )?frame #\d+: .*`"
    r"|#\d+ +0x[0-9a-f]+ (?:- \d+ )?(?!in |-)\S"
)
"""A frame of gdb, lldb or eu-stack with a function."""
_BEGINNING = re.compile(r"Thread \d|[* ] thread #|TID \d+:")
"""The first line of a backtrace of gdb, lldb or eu-stack: the heading of a thread."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files that the user names, and the debugger that reads them."""

    program: str
    """Name or path of the debugger."""
    roots: Sequence[str] = ()
    executable: str | None = None
    symbols: Sequence[str] = ()
    """Files with separate symbols."""


def check(files: Files) -> None:
    """Check the command line before anything is downloaded.

    Raises:
        UsageError: the debugger, a file or a directory does not exist.
    """
    program = files.program
    if shutil.which(program) is None:
        raise UsageError(
            f"{printable(program)} is not installed: --debugger takes gdb, lldb, eu-stack or the path of one"
        )
    if files.executable is not None and not os.path.isfile(files.executable):
        raise UsageError(f"--exe {printable(files.executable)}: there is no such file")
    for path in files.symbols:
        if not os.path.isfile(path):
            raise UsageError(f"--symbols {printable(path)}: there is no such file")
    for root in files.roots:
        if not os.path.isdir(root) or any(c in root for c in '\n\r:"'):
            raise UsageError(
                f"--sysroot {printable(root)}: takes a directory whose path has no ':' and no '\"'"
            )


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
        if "lldb" in name:
            return [self.program, *self._for_lldb(batch=batch), *extra, *program, "--core", self.core]
        if "eu-stack" in name:
            # eu-stack asks the server for libraries only if no program is named; it finds a served one by build ID.
            served = {module.build_id for module in self.modules.every if module.found is not None}
            named = [f"--executable={path}" for path in program if read_build_id(path) not in served - {None}]
            return [self.program, *named, *extra, f"--core={self.core}"]
        options = [f"--exec={path}" for path in program] + [f"--symbols={path}" for path in self._symbols()]
        return [self.program, "-q", *self._for_gdb(batch=batch), *extra, *options, f"--core={self.core}"]

    def _symbols(self) -> list[str]:
        """Return the file with the program's symbols: the program itself, unless the user named another one."""
        named = [path for path in self.files.symbols if read_build_id(path) is None]
        return named[:1] or ([self.executable] if self.executable else [])

    def shorten(self, line: str) -> str:
        """Return a line of output without the path of the tree, so that files have the paths of the process."""
        return line.replace(self.tree.root + "/", "/")

    def _for_lldb(self, *, batch: bool) -> list[str]:
        tree = self.tree
        settings = ["settings set target.load-script-from-symbol-file false"]
        settings += ["settings set target.load-cwd-lldbinit false"]
        settings += [f'settings append target.exec-search-paths "{tree.flat}"']
        settings += [f'settings append target.debug-file-search-paths "{tree.symbols}"']
        settings += [f'platform select --sysroot "{tree.root}" host']
        words = [word for setting in settings for word in ("-O", setting)]
        return words + (["--batch", "-o", f"thread backtrace -c {MOST_FRAMES} all"] if batch else [])

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
            ["-nx", "-batch", "-ex", f"thread apply all -ascending bt {MOST_FRAMES}"] if batch else []
        )


def prepare(core: str, dump: Dump, modules: Modules, files: Files) -> Session:
    """Make the tree of a dump's files, and find a debugger that reads it; list the missing files for the user."""
    if files.executable is not None:
        modules = _with_executable(modules, files.executable)
    descriptor = os.open(core, os.O_RDONLY | os.O_CLOEXEC)
    try:
        neutralise(core, Seekable(descriptor))
    finally:
        os.close(descriptor)
    note_missing(modules, dump)
    program = _debugger_for(files.program, modules.machine)
    tree = Tree(cache_directory())
    try:
        executable = _fill(tree, modules, files)
    except BaseException:
        tree.__exit__(None, None, None)
        raise
    return Session(program, core, modules, tree, executable, files)


def _fill(tree: Tree, modules: Modules, files: Files) -> str | None:
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
            show.note(f"nothing proves that {printable(path)} belongs to this dump: no file has its build ID")
    return executable


def _with_executable(modules: Modules, path: str) -> Modules:
    """Use a file that the user named, with a note unless its build ID proves it."""
    known = modules.executable.build_id if modules.executable else None
    build_id = read_build_id(path)
    if known is None:
        show.note(f"nothing proves that {path} is the executable of this dump: its build ID is not known")
    elif build_id != known:
        show.note(f"{path} has build ID {build_id or 'none'}, but the dump's executable has {known}")
    place = modules.executable.path if modules.executable else path
    names = modules.executable.names if modules.executable else ()
    named = Module(place, known, os.path.abspath(path), names=names)
    return replace(modules, executable=named)


def _debugger_for(program: str, machine: str | None) -> str:
    path = shutil.which(program) or program
    known = _READS.get(platform.machine())
    if machine is None or known is None or machine in known or os.path.basename(path) != "gdb":
        return path
    multiarch = shutil.which(_MULTIARCH)
    if multiarch is None:
        show.note(f"this core is of {machine}, which gdb on this machine may not read: install {_MULTIARCH}")
    return multiarch or path


def run(line: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run a debugger on this terminal and return its exit status. Ctrl-C is for the debugger alone."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler ends at exec(2), SIG_IGN would not
    try:
        return subprocess.run(line, check=False, env=environ).returncode  # noqa: S603  a list, no shell
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(output: IO[bytes] | None) -> Iterator[bytes]:
    while output is not None and (line := output.readline(MOST_LINE_BYTES)):
        yield line


class Backtrace:
    """The output of a debugger from its first thread on; the lines before it are progress, and repeat `info`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """Write lines with `write`."""
        self._write = write
        self._skipped: deque[str] = deque(maxlen=MOST_SKIPPED)
        self._begun = False
        self.resolved = False
        """Whether a frame names a function."""

    def run(self, line: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
        """Run a debugger in batch mode, write its backtrace line by line, and return its exit status."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": environ}
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(line, stderr=errors, **pipes) as process:  # noqa: S603  likewise
                try:
                    for raw in _lines(process.stdout):
                        self._take(raw.decode("utf-8", "backslashreplace").rstrip("\n"))
                except BaseException:
                    process.kill()
                    raise
            errors.seek(0)
            self._explain(
                process.returncode, errors.read(MOST_LINE_BYTES).decode("utf-8", "backslashreplace")
            )
        return process.returncode

    def _take(self, text: str) -> None:
        self._begun = self._begun or _BEGINNING.match(text) is not None
        self.resolved = self.resolved or _RESOLVED.match(text) is not None
        if self._begun:
            self._write(text)
        else:
            self._skipped.append(text)

    def _explain(self, code: int, errors: str) -> None:
        """Write what was skipped if there was no backtrace, and the errors if the debugger failed."""
        for text in [*(() if self._begun else self._skipped), *(errors.splitlines() if code else ())]:
            self._write(text)

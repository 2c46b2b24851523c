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
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from core_dump_format.stream import Seekable
from core_dump_format.text import printable
from core_dumps import show
from core_dumps.buildid import Module, Modules, read_build_id, read_modules
from core_dumps.cache import cache_directory
from core_dumps.errors import UsageError
from core_dumps.neutral import neutralise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from core_dumps.dump import Dump

MOST_LISTED = 20
MOST_LINE_BYTES = 64 * 1024
MOST_SKIPPED = 1000
"""Lines before a backtrace that are kept, in case there is none."""
MOST_FRAMES = 256
"""Frames of a thread in a backtrace; a stack overflow has tens of thousands."""
_MULTIARCH = "gdb-multiarch"
_READS = {"x86_64": {"x86-64", "i386"}, "aarch64": {"aarch64", "arm"}}
"""Cores that gdb reads on a machine, by the machine's name in uname(2)."""
_RESOLVED = re.compile(
    r" *#\d+ +(?:(?:0x[0-9a-f]+|<unavailable>) in )?(?!0x|\?\?|<unavailable>|<signal handler)\S"
    r"| *(?:\* )?frame #\d+: .*`"
)
"""A frame of gdb or lldb with a function."""
_BEGINNING = re.compile(r"Thread \d|[* ] thread #")
"""The first line of a backtrace of gdb or lldb: the heading of a thread."""


def check(program: str, roots: Sequence[str], executable: str | None) -> None:
    """Check the command line before anything is downloaded.

    Raises:
        UsageError: the debugger, the executable or a directory does not exist.
    """
    if shutil.which(program) is None:
        raise UsageError(
            f"{printable(program)} is not installed: --debugger takes gdb, lldb or the path of one"
        )
    if executable is not None and not os.path.isfile(executable):
        raise UsageError(f"--exe {printable(executable)}: there is no such file")
    for root in roots:
        if not os.path.isdir(root) or any(c in root for c in '\n\r:"'):
            raise UsageError(
                f"--sysroot {printable(root)}: takes a directory whose path has no ':' and no '\"'"
            )


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a debugger needs to open a dump."""

    program: str
    """Path of the debugger."""
    core: str
    modules: Modules
    roots: Sequence[str]

    def command(self, arguments: str, *, batch: bool) -> list[str]:
        """Return the command line; `batch` prints a backtrace of all threads."""
        found = self.modules.executable.found if self.modules.executable else None
        extra = shlex.split(arguments)
        if "lldb" in os.path.basename(self.program):
            return [
                self.program,
                *self._for_lldb(batch=batch),
                *extra,
                *([found] if found else []),
                "--core",
                self.core,
            ]
        files = [f"--exec={found}", f"--symbols={found}"] if found else []
        return [self.program, "-q", *self._for_gdb(batch=batch), *extra, *files, f"--core={self.core}"]

    def _for_lldb(self, *, batch: bool) -> list[str]:
        words = ["-O", "settings set target.load-script-from-symbol-file false"]
        words += ["-O", "settings set target.load-cwd-lldbinit false"]
        if self.roots:
            words += ["-O", f'platform select --sysroot "{os.path.abspath(self.roots[0])}" host']
        return words + (["--batch", "-o", f"thread backtrace -c {MOST_FRAMES} all"] if batch else [])

    def _for_gdb(self, *, batch: bool) -> list[str]:
        """Return options that keep gdb from running code of the dump's files; `$sdir` is the system's own libraries."""
        settings = ["set auto-load no", "set auto-load libthread-db on", "set libthread-db-search-path $sdir"]
        settings.append("set debuginfod enabled " + ("on" if os.environ.get("DEBUGINFOD_URLS") else "off"))
        if self.roots:
            settings.append(f"set sysroot {os.path.abspath(self.roots[0])}")
        if directories := self._other_directories():
            settings.append(f"set solib-search-path {':'.join(directories)}")
        words = [word for setting in settings for word in ("-iex", setting)]
        return words + (
            ["-nx", "-batch", "-ex", f"thread apply all -ascending bt {MOST_FRAMES}"] if batch else []
        )

    def _other_directories(self) -> list[str]:
        """Return the directories of libraries that were found below the second root and further ones.

        gdb takes one sysroot. Paths from an image may hold anything, so only those that gdb cannot misread are given.
        """
        found = (module.found for module in self.modules.libraries if module.found is not None)
        tops = tuple(os.path.join(root, "") for root in self.roots[1:])
        paths = (os.path.abspath(os.path.dirname(path)) for path in found if path.startswith(tops))
        return [path for path in dict.fromkeys(paths) if path.isprintable() and ":" not in path]


def prepare(program: str, core: str, dump: Dump, roots: Sequence[str], executable: str | None) -> Session:
    """Find the files of a core and a debugger that reads it; print what is missing and how to get it."""
    modules = read_modules(core, dump.executable, roots, cache_directory())
    if executable is not None:
        modules = _with_executable(modules, executable)
    descriptor = os.open(core, os.O_RDONLY | os.O_CLOEXEC)
    try:
        neutralise(core, Seekable(descriptor))
    finally:
        os.close(descriptor)
    _note_missing(modules, dump)
    return Session(_debugger_for(program, modules.machine), core, modules, roots)


def _with_executable(modules: Modules, path: str) -> Modules:
    """Use a file that the user named, with a note unless its build ID proves it."""
    known = modules.executable.build_id if modules.executable else None
    build_id = read_build_id(path)
    if known is None:
        show.note(f"nothing proves that {path} is the executable of this dump: its build ID is not known")
    elif build_id != known:
        show.note(f"{path} has build ID {build_id or 'none'}, but the dump's executable has {known}")
    named = Module(modules.executable.path if modules.executable else path, known, os.path.abspath(path))
    return Modules(named, modules.libraries, modules.machine, has_files=modules.has_files)


def _debugger_for(program: str, machine: str | None) -> str:
    path = shutil.which(program) or program
    known = _READS.get(platform.machine())
    if machine is None or known is None or machine in known or os.path.basename(path) != "gdb":
        return path
    multiarch = shutil.which(_MULTIARCH)
    if multiarch is None:
        show.note(f"this core is of {machine}, which gdb on this machine may not read: install {_MULTIARCH}")
    return multiarch or path


def _note_missing(modules: Modules, dump: Dump) -> None:
    executable, missing = modules.executable, modules.missing
    if executable is None or executable.found is None:
        path, build_id = (executable.path, executable.build_id) if executable else (dump.program, None)
        show.note(
            f"the executable {path} (build ID {build_id or 'unknown'}) was not found; --exe FILE names it"
        )
    if not modules.has_files:
        show.note(
            "the kernel left the list of mapped files out of this core, so libraries cannot be verified"
        )
    for module in missing[:MOST_LISTED]:
        show.note(f"missing: {module.path} (build ID {module.build_id})")
    if len(missing) > MOST_LISTED:
        show.note(f"and {len(missing) - MOST_LISTED} more")
    if missing:
        show.note(
            "to get them: unpack the image that the process ran in and give --sysroot DIR, "
            "or set DEBUGINFOD_URLS to a server that has these build IDs"
        )


def run(line: Sequence[str]) -> int:
    """Run a debugger on this terminal and return its exit status. Ctrl-C is for the debugger alone."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler ends at exec(2), SIG_IGN would not
    try:
        return subprocess.run(line, check=False).returncode  # noqa: S603  a list, no shell
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

    def run(self, line: Sequence[str]) -> int:
        """Run a debugger in batch mode, write its backtrace line by line, and return its exit status."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
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

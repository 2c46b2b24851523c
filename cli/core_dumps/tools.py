"""Owns the choice of a debugger: which one is run, and whether the command line names files that exist."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core_dump_format.text import printable
from core_dumps.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DRGN = "drgn"
"""It is a package of this Python, not a program."""
_KNOWN = ("gdb", DRGN, "lldb", "eu-stack")
"""Debuggers in the order in which they are chosen."""
_MULTIARCH = "gdb-multiarch"
_READS = {"x86_64": {"x86-64", "i386"}, "aarch64": {"aarch64", "arm"}}
"""Cores that gdb reads on a machine, by the machine's name in uname(2)."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files that the user names, and the debugger that reads them."""

    program: str
    """Name or path of the debugger."""
    roots: Sequence[str] = ()
    executable: str | None = None
    symbols: Sequence[str] = ()
    """Files with separate symbols."""


def choose(named: str | None, note: Callable[[str], None]) -> str:
    """Return the debugger that the user named, else the first one that is installed.

    Raises:
        UsageError: the named debugger is not installed, or no debugger is.
    """
    if named is not None:
        if os.path.basename(named) == DRGN and shutil.which(named):
            named = DRGN  # its script only starts the package
        if not _is_installed(named):
            raise UsageError(f"{printable(named)} is not installed: --debugger takes {_choices()}")
        return named
    found = next(filter(_is_installed, _KNOWN), None)
    if found is None:
        raise UsageError("no debugger is installed: install gdb, or on Linux (x86-64) `pip install drgn`")
    if found != _KNOWN[0]:
        note(f"gdb is not installed: using {found}")
    return found


def _choices() -> str:
    return f"{', '.join(_KNOWN)} or the path of one"


def _is_installed(program: str) -> bool:
    return (
        importlib.util.find_spec(DRGN) is not None if program == DRGN else shutil.which(program) is not None
    )


def check(files: Files) -> None:
    """Check the command line before anything is downloaded.

    Raises:
        UsageError: a file or a directory does not exist.
    """
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


def for_machine(program: str, machine: str | None, note: Callable[[str], None]) -> str:
    """Return the path of a debugger; gdb-multiarch instead of gdb if the core is of another machine."""
    if program == DRGN:
        return program
    path = shutil.which(program) or program
    known = _READS.get(platform.machine())
    if machine is None or known is None or machine in known or os.path.basename(path) != "gdb":
        return path
    multiarch = shutil.which(_MULTIARCH)
    if multiarch is None:
        note(f"this core is of {machine}, which gdb on this machine may not read: install {_MULTIARCH}")
    return multiarch or path

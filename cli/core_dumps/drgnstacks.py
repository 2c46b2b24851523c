"""Prints the backtraces of a core in gdb's form: `python -m core_dumps.drgnstacks CORE TREE PROGRAM SYMBOLS FRAMES`.

It is a process of its own, because drgn is a native library that reads a stranger's core. Executables and libraries
come only from the tree; PROGRAM and SYMBOLS may be empty; FRAMES is the largest number of frames of a thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import drgn

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.dump import DELETED
from core_dumps.tree import DEBUG_DIRECTORY, FLAT, ROOT, SYMBOLS, inside

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_NAME = 2000
_ERRORS = (LookupError, ValueError, NotImplementedError, OSError, drgn.FaultError, drgn.BadDataError)
"""The exceptions of drgn for a core that it cannot read."""


def main() -> None:
    """Print the backtraces of all threads, the crashed one first."""
    core, tree, program, symbols, most_frames = sys.argv[1:]
    show.never_fail_on_a_character()
    prog = drgn.Program()
    try:
        prog.set_core_dump(core)
        _load(prog, tree, program, symbols)
        threads = _threads(prog)
    except _ERRORS as error:
        sys.exit(f"drgn: {error}")
    for number, thread in enumerate(threads, start=1):
        _write("\n" * (number > 1) + f"Thread {number} (LWP {thread.tid}):")
        for line in _lines(prog, thread, int(most_frames)):
            _write(line.replace("\n", "\\n"))  # a name with a line break must not look like another frame


def _write(line: str) -> None:
    """Write a line in UTF-8, whatever the encoding of the terminal is: `backtrace` reads it."""
    sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + b"\n")


def _load(prog: Any, tree: str, program: str, symbols: str) -> None:  # noqa: ANN401  drgn is not typed on all machines
    """Give drgn the files of the tree; it compares build IDs, and a file without one is used under its name."""
    options = prog.debug_info_options
    options.directories = (os.path.join(tree, SYMBOLS), DEBUG_DIRECTORY)
    options.try_module_name = False
    with contextlib.suppress(*_ERRORS):  # a damaged list of modules
        prog.create_loaded_modules()
    for module in prog.modules():
        files = [program, symbols] if isinstance(module, drgn.MainModule) else []
        for file in filter(None, [*files, *_in_tree(tree, module.name)]):
            with contextlib.suppress(Exception):  # not an ELF file, or one that drgn does not read
                module.try_file(file, force=module.build_id is None)
    known = [module for module in prog.modules() if module.build_id is not None]
    with contextlib.suppress(drgn.MissingDebugInfoError):
        prog.load_module_debug_info(*known)


def _in_tree(tree: str, name: str) -> list[str]:
    raw = inside(name.removesuffix(DELETED))
    if raw is None:
        return []
    path = os.fsdecode(raw)
    places = [os.path.join(tree, ROOT, path), os.path.join(tree, FLAT, os.path.basename(path))]
    return [path for path in places if os.path.isfile(path)][:1]


def _threads(prog: Any) -> list[Any]:  # noqa: ANN401  likewise
    """Return the crashed thread and the others."""
    first = prog.crashed_thread()
    return [first, *sorted((t for t in prog.threads() if t.tid != first.tid), key=lambda thread: thread.tid)]


def _lines(prog: Any, thread: Any, most_frames: int) -> Iterator[str]:  # noqa: ANN401  likewise
    """Yield a line for each frame up to `main`, as gdb does."""
    try:
        frames = thread.stack_trace()
    except _ERRORS as error:
        yield f"Backtrace stopped: {error}"
        return
    for number in range(min(len(frames), most_frames)):
        frame = frames[number]
        address = _address(frame)
        if address is None:
            return
        yield f"#{number:<2} {'' if frame.is_inline else f'{address:#018x} in '}{_place(prog, frame, address)}"
        with contextlib.suppress(UnicodeDecodeError):
            if frame.function_name == "main":
                return


def _address(frame: Any) -> int | None:  # noqa: ANN401  likewise
    try:
        return int(frame.pc)
    except LookupError:
        return None


def _place(prog: Any, frame: Any, address: int) -> str:  # noqa: ANN401  likewise
    """Return a frame's function, and its line or its file."""
    name = _name(frame)
    with contextlib.suppress(LookupError, UnicodeDecodeError):
        source = frame.source()
        return f"{name} () at {_shown(source.filename)}:{source.line}"
    with contextlib.suppress(LookupError):
        return f"{name} () from {_shown(prog.module(address).name)}"
    return f"{name} ()"


def _name(frame: Any) -> str:  # noqa: ANN401  likewise
    """Return the name of a frame's function; the program chose its bytes."""
    try:
        name: str = frame.name
    except UnicodeDecodeError as error:
        name = bytes(error.object).decode("utf-8", "backslashreplace")
    return "??" if name.startswith("0x") else _shown(name)


def _shown(name: str) -> str:
    """Return a name that cannot steer a terminal; bytes that are not UTF-8 become escapes."""
    return printable(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), MOST_NAME)


if __name__ == "__main__":
    main()

"""Owns the pager: the output of a command on a terminal goes through `less`, as with coredumpctl and git."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT = "less"
_LESS = {"LESS": "FRSXMK", "LESSSECURE": "1"}
"""Options of less(1), as systemd sets them: leave at once if one screen is enough, show colours, cut long lines; and
start no editor or shell from the pager."""

NoPager = Annotated[bool, typer.Option("--no-pager", help="Do not send the output to $PAGER")]


class _TerminalStream(io.TextIOWrapper):
    """A text stream into the pager; writers format for the terminal, because the pager shows it there."""

    def isatty(self) -> bool:
        return True


@contextmanager
def paged(*, off: bool) -> Iterator[None]:
    """Send standard output through the pager, if it is a terminal; notes follow when the user has left it.

    Args:
        off: print directly, as without a terminal.

    Raises:
        typer.Exit: the user left the pager before the output ended; this is no failure.
    """
    command = None if off else _command()
    process = _start(command) if command else None
    if process is None or process.stdin is None:
        yield
        return
    stream = _TerminalStream(process.stdin, encoding=sys.stdout.encoding, errors="backslashreplace")
    notes = io.StringIO()
    try:
        with redirect_stdout(stream), redirect_stderr(notes):
            yield
            stream.flush()
    except BrokenPipeError:
        raise typer.Exit from None
    finally:
        _finish(process, stream)
        sys.stderr.write(notes.getvalue())


def _command() -> list[str] | None:
    """Return the arguments of the pager; None if there is no terminal, or the user wants none."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    words = shlex.split(os.environ.get("PAGER", DEFAULT))
    if not words or words == ["cat"]:
        return None
    program = shutil.which(words[0])
    return [program, *words[1:]] if program else None


def _start(command: list[str]) -> subprocess.Popen[bytes] | None:
    """Start the pager; return None if it does not start."""
    sys.stdout.flush()
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=_LESS | os.environ)  # noqa: S603  the user's own program
    except OSError:
        return None


def _finish(process: subprocess.Popen[bytes], stream: io.TextIOWrapper) -> None:
    """Wait until the user leaves the pager, which handles Ctrl-C itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with suppress(BrokenPipeError):
            stream.close()
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)

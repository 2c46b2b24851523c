"""Owns what is undone when a program ends, even by SIGKILL: another process outlives it and does that."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

WAIT = "import sys\nsys.stdin.buffer.read()\n"
"""The read ends when the last writer of the pipe is gone: nobody but the guarded program has it."""
REMOVE = "import shutil\nshutil.rmtree(sys.argv[1], ignore_errors=True)\n"


@contextlib.contextmanager
def guardian(code: str, *arguments: str, keep: Sequence[int] = ()) -> Iterator[None]:
    """Run Python code in another process when the block, or this process, ends.

    Args:
        code: standard library only; `sys` is imported.
        arguments: its `sys.argv[1:]`.
        keep: descriptors that stay open until the code has run.

    Raises:
        RuntimeError: the code failed.
    """
    command = [sys.executable, "-IS", "-c", WAIT + code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=keep, start_new_session=True) as process:
        yield
    if process.returncode:
        raise RuntimeError(f"the guardian exited with {process.returncode}: {code} {arguments}")


@contextlib.contextmanager
def temporary_directory(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """Make a directory that is removed however this process ends."""
    path = tempfile.mkdtemp(prefix=prefix, dir=parent)
    with guardian(REMOVE, path):
        yield Path(path)


def exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into an ordinary exit, so that every `finally` runs."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def guarded(command: Sequence[str]) -> list[str]:
    """Return the command with setpriv(1) in front, so that it dies with the process that starts it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)

"""Owns the messages of core-dump-setup and the exception that ends it."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


class SetupError(Exception):
    """The host cannot be set up as asked; the text says why and what to do."""


def say(text: str) -> None:
    """Print one message."""
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Print one warning."""
    _print("warning: " + text, sys.stderr)


def complain(text: str) -> None:
    """Print one error."""
    _print(text, sys.stderr)


def escape_unprintable() -> None:
    """Let messages show what the encoding of the output lacks as an escape sequence."""
    for file in (sys.stdout, sys.stderr):
        if file is not None:
            file.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _print(text: str, file: TextIO | None) -> None:
    """Print to a file that may be closed, full, or None because it was closed at the start: that never ends a run."""
    if file is None:
        return
    try:
        print("core-dump-setup: " + text, file=file, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, file.fileno())  # else Python's own flush at exit fails again, and with it the run
        os.close(null)

"""Owns the messages of core-dump-setup and the exception that ends it."""

from __future__ import annotations

import sys


class SetupError(Exception):
    """The host cannot be set up as asked; the text says why and what to do."""


def say(text: str) -> None:
    """Print one message."""
    print("core-dump-setup: " + text, flush=True)


def warn(text: str) -> None:
    """Print one warning."""
    print("core-dump-setup: warning: " + text, file=sys.stderr, flush=True)

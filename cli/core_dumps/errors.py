"""Owns the errors that end a command: one line for people, and an exit status.

CliError
├── NoMatchError            raised by commands; no dump matches
├── RefusedError            raised while a dump is read; the object is not what it claims to be
├── InterruptedByUserError  raised by `fetch`; Ctrl-C
└── UsageError              raised while options and environment are read
All are caught in `options.ending`.
"""

from __future__ import annotations

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class CliError(Exception):
    """The command cannot continue; the message is one line that says what to do."""

    exit_code = FAILED


class NoMatchError(CliError):
    """No dump matches."""


class RefusedError(CliError):
    """An object in the bucket is not what it claims to be, or would be dangerous to use."""


class InterruptedByUserError(CliError):
    """The user pressed Ctrl-C."""

    exit_code = INTERRUPTED


class UsageError(CliError):
    """The command line or the environment is wrong."""

    exit_code = USAGE

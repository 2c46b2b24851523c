"""What ends a command early: one line for people, and an exit code."""

from __future__ import annotations

FAILED, USAGE = 1, 2


class CliError(Exception):
    """The command cannot go on; the message is one line that says what to do."""

    exit_code = FAILED


class NoMatchError(CliError):
    """No dump matches."""


class RefusedError(CliError):
    """What the bucket holds is not what it claims, or would be dangerous to use."""


class UsageError(CliError):
    """The command line or the environment has to be changed."""

    exit_code = USAGE

"""Owns how far the kernel log was read, kept in an extended attribute of the watch directory.

An attribute is replaced whole, needs no file among the dumps, and goes where the dumps go. Where the file system has
none, a restarted collector begins at the end of the log.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

ATTRIBUTE = "user.coredump.kernel_log"
_FORM = re.compile(rb"1 ([0-9a-f-]{1,64}) (-1|\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,19})")


@dataclass(frozen=True, slots=True)
class Position:
    """Times are microseconds of the kernel's clock, which starts with the system that `boot_id` names."""

    boot_id: str
    sequence: int = -1
    """Number of the last record that was read; -1 if unknown."""
    needed: int = 0
    """Everything up to here is done with: counted, and stored where it is stored."""
    read: int = 0
    """Losses up to here are counted."""
    judged: int = 0
    """Faults up to here are counted, or explained."""


def load(directory: str) -> Position | None:
    """Return the position that an earlier collector saved; None if there is none."""
    try:
        value = os.getxattr(directory, ATTRIBUTE)
    except OSError:
        return None
    match = _FORM.fullmatch(value)
    return (
        None
        if match is None
        else Position(match[1].decode(), *(int(number) for number in match.groups()[1:]))
    )


def save(directory: str, position: Position) -> bool:
    """Save a position; return False if the file system has no such attributes.

    Raises:
        OSError: it cannot be saved for another reason.
    """
    numbers = (position.sequence, position.needed, position.read, position.judged)
    value = " ".join(map(str, ("1", position.boot_id, *numbers)))
    try:
        os.setxattr(directory, ATTRIBUTE, value.encode())
    except OSError as error:
        if error.errno in {errno.ENOTSUP, errno.ENOSYS}:
            return False
        raise
    return True

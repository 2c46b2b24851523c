"""Owns who can have made or changed a file: the difference between evidence and a stranger's claim."""

from __future__ import annotations

import os

OTHERS_WRITE = 0o022
"""Mode bits that let the group or everybody write."""
OTHERS_USE = 0o077
"""Mode bits that let the group or everybody do anything."""


def is_trusted(status: os.stat_result) -> bool:
    """Tell whether only root and this user can have made or changed a file."""
    return status.st_uid in {0, os.geteuid()} and not status.st_mode & OTHERS_WRITE


def is_private(status: os.stat_result) -> bool:
    """Tell whether only root and this user can read or change a file or directory."""
    return status.st_uid in {0, os.geteuid()} and not status.st_mode & OTHERS_USE


def is_roots_alone(status: os.stat_result) -> bool:
    """Tell whether only root can change a file or directory."""
    return status.st_uid == 0 and not status.st_mode & OTHERS_WRITE

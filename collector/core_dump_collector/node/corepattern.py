"""Owns what the collector knows of kernel.core_pattern: reading it, and whether it leads to us."""

from __future__ import annotations

import os

PATH = "/proc/sys/kernel/core_pattern"
HELPER = "core-dump-helper"


def read(path: str = PATH) -> str:
    """Return the pattern, empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read(256)).rstrip("\n")
    except OSError:
        return ""


def leads_to(directory: str) -> bool:
    """Tell whether the kernel's pattern leads to a directory."""
    return is_ours(read(), directory)


def is_ours(pattern: str, directory: str) -> bool:
    """Tell whether a pattern pipes into our helper, or puts files into the directory (or one of its name).

    The directory may be mounted under another parent in a container, so its last component counts.
    """
    if pattern.startswith("|"):
        program, *arguments = pattern[1:].split() or [""]
        if os.path.basename(program) == HELPER:
            return True
        targets = [a.removeprefix("of=") for a in arguments if a.startswith("of=")]
    else:
        targets = [pattern]
    last = os.path.basename(directory.rstrip("/"))
    return any(t.startswith("/") and last == os.path.basename(os.path.dirname(t)) for t in targets)

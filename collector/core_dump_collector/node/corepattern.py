"""Owns what the collector knows of kernel.core_pattern: whether a crash on this node leads to the watch directory.

Inside a container the node's files are out of sight: there the pattern alone is judged.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import StrEnum

from core_dump_collector.node.ownership import is_trusted

PATH = "/proc/sys/kernel/core_pattern"
HELPER = "core-dump-helper"
SOCKET_DIRECTORY = "core-dump-listener"
"""Directory of the socket at which the helper listens."""
CONFIG = "/etc/core-dump-handler/helper.conf"
WATCH_DIR = "/core_dumps"
"""Where the helper writes if its configuration does not say."""
_MOST_CONFIG_BYTES = 1 << 16
_INITIAL_NAMESPACES = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}
"""Inode numbers of the node's own namespaces (include/linux/proc_ns.h); a container has others."""


class Target(StrEnum):
    """Where a crash on this node leads."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    """The pattern names another program or directory."""
    NO_PROGRAM = "no_program"
    """The pattern names our helper, which is missing or cannot be executed, or its socket, which is missing."""
    OTHER_DIRECTORY = "other_directory"
    """Our helper writes to another directory than the one that is watched."""


@dataclass(frozen=True, slots=True)
class HelperCall:
    """Our helper as a pattern calls it."""

    program: str
    config: str


def read(path: str = PATH) -> str:
    """Return the pattern; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read(256)).rstrip("\n")
    except OSError:
        return ""


def helper_call(pattern: str) -> HelperCall | None:
    """Return program and configuration file of a pattern that pipes into our helper."""
    words = pattern[1:].split() if pattern.startswith("|") else []
    if not words or os.path.basename(words[0]) != HELPER:
        return None
    configs = [word[2:] for word in words[1:] if word.startswith("-C")]
    return HelperCall(words[0], configs[0] if configs else CONFIG)


def socket_path(pattern: str) -> str:
    """Return the path at which our helper listens, on the node or in a container; empty for another pattern."""
    path = pattern.removeprefix("@").removeprefix("@")
    is_ours = pattern.startswith("@") and os.path.basename(os.path.dirname(path)) == SOCKET_DIRECTORY
    return path if is_ours else ""


def target(pattern: str, directory: str) -> Target:
    """Tell where a crash leads, as far as this process can see."""
    helper = helper_call(pattern)
    path = socket_path(pattern)
    if helper is None and not path:
        return Target.HERE if _writes_to(pattern, directory) else Target.ELSEWHERE
    if is_contained():
        return Target.HERE
    if not (_is_executable(helper.program) if helper else _is_socket(path)):
        return Target.NO_PROGRAM
    config = helper.config if helper else CONFIG
    return Target.HERE if _is_same(configured_directory(config), directory) else Target.OTHER_DIRECTORY


def leads_to(directory: str) -> bool:
    """Tell whether a crash on this node leads to the directory now."""
    return is_ours(read(), directory)


def is_ours(pattern: str, directory: str) -> bool:
    """Tell whether a crash on this node leads to the directory."""
    return target(pattern, directory) is Target.HERE


def is_contained() -> bool:
    """Tell whether this process runs in a container, where the node's programs are out of sight."""
    try:
        found = {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in _INITIAL_NAMESPACES}
    except OSError:
        return True
    return found != _INITIAL_NAMESPACES


def configured_directory(config: str) -> str:
    """Return the WATCH_DIR that the helper takes from a configuration file; the default where it takes none.

    The helper uses no file that others than root can change.
    """
    directory = WATCH_DIR
    try:
        with open(config, "rb") as file:
            status = os.fstat(file.fileno())
            if not is_trusted(status):
                return directory
            lines = os.fsdecode(file.read(_MOST_CONFIG_BYTES)).splitlines()
    except OSError:
        return directory
    for line in lines:
        name, _, value = (part.strip() for part in line.partition("="))
        if name == "WATCH_DIR" and value.startswith("/"):
            directory = value
    return directory


def _writes_to(pattern: str, directory: str) -> bool:
    """Tell whether a file pattern, or dd, writes to the directory or to one of its name.

    The directory may be mounted below another parent in a container, so only its last component counts.
    """
    targets = [pattern]
    if pattern.startswith("|"):
        targets = [word.removeprefix("of=") for word in pattern.split()[1:] if word.startswith("of=")]
    last = os.path.basename(directory.rstrip("/"))
    return any(t.startswith("/") and last == os.path.basename(os.path.dirname(t)) for t in targets)


def _is_executable(program: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(program).st_mode) and os.access(program, os.X_OK)
    except (OSError, ValueError):
        return False


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.stat(other))
    except (OSError, ValueError):
        return False

"""Owns the cgroup that helpers move into: half of the host's memory, so that many crashes at once never take it all.

The kernel starts helpers in the root cgroup, where nothing limits them. The cgroup goes with each boot, so
core-dump-cgroup.service makes it again; helper.conf names the link, whose target depends on the cgroup version.
"""

from __future__ import annotations

import os

from core_dump_setup.disk import NEW, remove_any
from core_dump_setup.errors import SetupError, say, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from core_dump_setup.files import Tree

NAME = "core-dump-helper"
LINK = "/run/core-dump-handler/cgroup"
"""CGROUP in helper.conf."""
UNIT_NAME = "core-dump-cgroup.service"
UNIT = "/usr/lib/systemd/system/" + UNIT_NAME
WANTED = "/etc/systemd/system/sysinit.target.wants/" + UNIT_NAME
MEMORY_SHARE = 2
"""The cgroup gets the host's memory divided by this."""


def prepare() -> str:
    """Make the cgroup and the link to it; return the cgroup's directory.

    Raises:
        SetupError: this host has no memory controller, or its cgroups cannot be changed.
    """
    try:
        root, limit = _memory_hierarchy()
        path = os.path.join(root, NAME)
        os.makedirs(path, 0o755, exist_ok=True)
        _write(os.path.join(path, limit), str(_host_bytes() // MEMORY_SHARE))
        os.makedirs(os.path.dirname(LINK), 0o755, exist_ok=True)
        new = LINK + NEW + str(os.getpid())
        os.symlink(path, new)
        os.rename(new, LINK)
    except OSError as error:
        raise SetupError("no cgroup for the helper: %s" % error) from error
    return path


def use(tree: Tree) -> None:
    """Make the cgroup now; without one, helpers stay in the root cgroup."""
    if tree.dry_run:
        say("would make a cgroup for the helper: " + LINK)
        return
    if not os.path.lexists(LINK):
        tree.on_failure(remove)
    try:
        prepare()
    except SetupError as error:
        warn(str(error))


def remove() -> None:
    """Remove the cgroup and the link; a cgroup that a helper is in stays until the next boot."""
    path = os.path.realpath(LINK)
    if os.path.basename(path) == NAME and os.path.isdir(path):
        try:
            os.rmdir(path)
        except OSError as error:
            warn("%s stays until the next boot: %s" % (path, error.strerror))
    folder = os.path.dirname(LINK)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith(os.path.basename(LINK)):
            remove_any(os.path.join(folder, name))
    if os.path.isdir(folder):
        os.rmdir(folder)


def _memory_hierarchy() -> tuple[str, str]:
    """Return the root of the hierarchy with the memory controller, and the name of the file with its limit."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split(" ") for line in file]
    for _, path, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return path, "memory.limit_in_bytes"
    for _, path, kind, *_ in mounts:
        if kind == "cgroup2" and "memory" in _read(os.path.join(path, "cgroup.controllers")).split():
            control = os.path.join(path, "cgroup.subtree_control")
            if "memory" not in _read(control).split():
                _write(control, "+memory")
            return path, "memory.max"
    raise SetupError("no cgroup for the helper: this host has no memory controller")


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)

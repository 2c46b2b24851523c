"""Owns the files that name the watch directory for systemd: tmpfiles.d, and a drop-in for the collector's unit.

WATCH_DIR in helper.conf is the one setting; both follow it whenever the helper is activated.
"""

from __future__ import annotations

import os
import re
import subprocess

from core_dump_helper.settings import Settings
from core_dump_setup import directory, systemd
from core_dump_setup.errors import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from core_dump_setup.files import Tree

DEFAULT = Settings.WATCH_DIR
UNIT = "core-dump-collector.service"
DROP_IN = "/etc/systemd/system/%s.d/watch-directory.conf" % UNIT
TMPFILES = "/etc/tmpfiles.d/core-dump-handler.conf"
PACKAGED = "/usr/lib/tmpfiles.d/core-dump-handler.conf"
"""Where a package keeps the file for DEFAULT; the one in /etc hides it."""
WRITTEN = b"# core-dump-setup writes this file from WATCH_DIR in helper.conf.\n"
LINE = b"d %s 0700 root root -\n"
NAMES = re.compile("/[A-Za-z0-9._/+@-]+")
"""Paths that mean the same in units, in tmpfiles.d and in a shell."""
SETTING = re.compile(rb"^[ \t]*WATCH_DIR[ \t]*=.*$", re.MULTILINE)


def choose(tree: Tree, name: str, shipped: bytes) -> None:
    """Write WATCH_DIR into helper.conf, unless that is its value already."""
    if name == directory.settings(tree).WATCH_DIR:
        return
    text = tree.read(directory.CONFIG)
    if text is None and tree.exists(directory.CONFIG):
        raise SetupError(tree.path(directory.CONFIG) + " is not a regular file: set WATCH_DIR where it leads")
    text = SETTING.sub(b"", shipped if text is None else text).rstrip(b"\n")
    tree.place(directory.CONFIG, text + b"\nWATCH_DIR=" + os.fsencode(name) + b"\n")


def check(name: str) -> None:
    """Raise SetupError if systemd would not understand the path as we do."""
    if not NAMES.fullmatch(name):
        raise SetupError("WATCH_DIR=%s: must be a path of letters, digits and . _ / + @ -" % ascii(name))


def follow(tree: Tree, name: str, shipped: bytes) -> str:
    """Write both files for this directory; return the former directory of the collector's unit, if it was another.

    Args:
        tree: where they are written.
        name: the watch directory.
        shipped: the file of tmpfiles.d as we ship it; empty where an installed copy does not know it.
    """
    before = _watched(tree)
    if name != DEFAULT:
        check(name)
    if name == DEFAULT and tree.exists(PACKAGED):
        if (tree.read(TMPFILES) or b"").startswith(WRITTEN):
            tree.remove(TMPFILES)
    elif shipped or name != before:
        tree.configure(TMPFILES, tmpfiles(name, shipped or tree.read(PACKAGED) or LINE % DEFAULT.encode()))
    if name != DEFAULT:
        tree.place(DROP_IN, drop_in(name))
    else:
        tree.remove(DROP_IN)
    return before if before != name else ""


def tmpfiles(name: str, shipped: bytes) -> bytes:
    """Return the file of tmpfiles.d that makes this directory at boot."""
    if name == DEFAULT:
        return shipped
    return WRITTEN + shipped.replace(LINE % DEFAULT.encode(), LINE % name.encode())


def drop_in(name: str) -> bytes:
    """Return the drop-in by which the collector's unit watches this directory, not DEFAULT (systemd.unit(5))."""
    lines = """[Unit]
RequiresMountsFor=%s
ConditionPathIsDirectory=
ConditionPathIsDirectory=%s

[Service]
Environment=WATCH_DIR=%s
ReadWritePaths=
ReadWritePaths=%s
"""
    return WRITTEN + os.fsencode(lines % ((name,) * 4))


def _watched(tree: Tree) -> str:
    """Return the directory that the collector's unit watches."""
    found = re.search(rb"^Environment=WATCH_DIR=(.+)$", tree.read(DROP_IN) or b"", re.MULTILINE)
    return os.fsdecode(found.group(1)) if found else DEFAULT


def finish(tree: Tree, before: str, name: str, *, live: bool) -> None:
    """Restart a collector that watches the former directory, and name the dumps that wait there."""
    if not before or tree.dry_run:
        return
    tree.remove_empty(os.path.dirname(DROP_IN))
    if live and systemd.is_running():
        subprocess.run([systemd.SYSTEMCTL, "try-restart", "--no-block", UNIT], check=False, timeout=30)
    path = tree.path(before)
    names = os.listdir(path) if os.path.isdir(path) else []
    if any(entry.startswith("core") for entry in names):
        say("%s still holds dumps: move them to %s, and the collector uploads them" % (path, tree.path(name)))


def remove(tree: Tree) -> None:
    """Remove the drop-in; the file of tmpfiles.d is removed as a configuration file."""
    tree.remove(DROP_IN)
    tree.remove_empty(os.path.dirname(DROP_IN))

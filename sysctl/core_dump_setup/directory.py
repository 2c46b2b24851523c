"""Owns the watch directory: where helper.conf puts it, and that it is root's alone."""

from __future__ import annotations

import os
import stat

from core_dump_helper.settings import Settings
from core_dump_setup.errors import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from core_dump_setup.files import Tree

CONFIG = "/etc/core-dump-handler/helper.conf"
SYSTEM = frozenset(
    [
        "/",
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/home",
        "/lib",
        "/lib64",
        "/media",
        "/mnt",
        "/opt",
        "/proc",
        "/root",
    ]
    + ["/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/dev/shm", "/run/lock"]
    + ["/usr/" + name for name in ("bin", "lib", "lib64", "libexec", "local", "sbin", "share")]
    + [
        "/var/" + name
        for name in ("cache", "crash", "lib", "lock", "log", "mail", "opt", "run", "spool", "tmp")
    ]
)
"""Directories of the system: giving one of them to root alone breaks it."""
ROOT_ALONE = (0o700, 0, 0)
OUR_NAMES = (".helper", ".modules", "quarantine", "lost+found")


def _refuse(problem: str) -> None:
    raise SetupError(problem)


def settings(tree: Tree) -> Settings:
    """Return the settings exactly as the helper reads them.

    Raises:
        SetupError: helper.conf holds something that the helper would ignore.
    """
    found = Settings()
    if tree.read(CONFIG) is not None:
        found.load(tree.path(CONFIG), _refuse)
    return found


def watch_directory(tree: Tree) -> str:
    """Return WATCH_DIR.

    Raises:
        SetupError: a setting is wrong, or the directory cannot be one for dumps.
    """
    name = settings(tree).WATCH_DIR
    parts = name.split("/")
    if ".." in parts or not name.startswith("/"):
        raise SetupError("helper.conf: WATCH_DIR=%s: must be an absolute path without '..'" % name)
    if os.path.normpath("/" + name.lstrip("/")) in SYSTEM:
        raise SetupError(
            "helper.conf: WATCH_DIR=%s: must be a directory of its own, not one of the system" % name
        )
    return name


def check(tree: Tree) -> str:
    """Return the watch directory's name.

    Raises:
        SetupError: it cannot be made, or cannot be given to root alone.
    """
    name = watch_directory(tree)
    path = tree.path(name)
    if os.path.islink(path.rstrip("/")):
        raise SetupError(
            name + " is a symbolic link, and the helper follows none: name its target as WATCH_DIR"
        )
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise SetupError(name + " is not a directory: move it away, or name another WATCH_DIR")
        if _access(path) != ROOT_ALONE:
            _refuse_foreign_files(path)
    return name


def make(tree: Tree) -> str:
    """Make the watch directory, or give it to root alone; return its name."""
    name = check(tree)
    path = tree.path(name)
    if tree.dry_run:
        say("would make %s, or give it to root alone" % path)
        return name
    if not os.path.isdir(path):
        tree.make_directory(name.rstrip("/"))
        tree.on_failure(lambda: remove_state(path))
    before = _access(path)
    if before != ROOT_ALONE:
        tree.on_failure(lambda: _set_access(path, *before))
        _set_access(path, *ROOT_ALONE)
    return name


def _access(path: str) -> tuple[int, int, int]:
    status = os.stat(path, follow_symlinks=False)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def _refuse_foreign_files(path: str) -> None:
    """Raise SetupError where somebody else keeps files: closing the directory would take them away."""
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("core") and entry.name not in OUR_NAMES:
                raise SetupError(
                    "%s holds other files (%s) and is open to others: name another WATCH_DIR, or chmod it to 0700"
                    % (path, ascii(entry.name))
                )


def _set_access(path: str, mode: int, uid: int, gid: int) -> None:
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def remove_state(path: str) -> None:
    """Remove the helper's state from a watch directory; dumps stay."""
    state = os.path.join(path, ".helper")
    if os.path.isdir(state) and not os.path.islink(state):
        for name in os.listdir(state):
            os.unlink(os.path.join(state, name))
        os.rmdir(state)

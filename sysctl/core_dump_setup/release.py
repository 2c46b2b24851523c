"""Owns the programs on the host: one folder for each release, and the launchers that name it.

A helper that is running keeps the files it was started from. The kernel starts one launcher or the other, never a
mixture, because a launcher is replaced by rename after its release is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time

from core_dump_helper import VERSION
from core_dump_setup.disk import NEW, remove_any, sync_directory
from core_dump_setup.errors import SetupError, say, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from core_dump_setup.files import Tree

FOLDER = "/usr/libexec/core-dump-handler"
HELPER = FOLDER + "/core-dump-helper"
SETUP = FOLDER + "/core-dump-setup"
LAUNCHERS = {HELPER: "helper/core-dump-helper", SETUP: "sysctl/core-dump-setup"}
PACKAGES = ("helper/core_dump_helper", "format/core_dump_format", "sysctl/core_dump_setup")
OPTIONAL = ("format/core_dump_format",)
RELEASE_NAME = re.compile(r"\d[\w.]*-[\w.-]+")
GRACE_SECONDS = 600
"""Whoever was started from an older release has imported it long before; the next installation removes it."""


def install(tree: Tree, source: str) -> None:
    """Install the programs of a checkout."""
    modules = _modules(source)
    _repair_folder(tree)
    name = _place_release(tree, modules)
    replaced = _named_by(tree.read(HELPER) or b"")
    if replaced not in ("", name) and not tree.dry_run and tree.exists(FOLDER + "/" + replaced):
        os.utime(tree.path(FOLDER + "/" + replaced))  # GRACE_SECONDS begin
    for launcher, path in LAUNCHERS.items():
        tree.place(launcher, _with_release(_read(os.path.join(source, path)), name), 0o755)


def remove(tree: Tree) -> None:
    """Remove launchers first, then every release."""
    for launcher in LAUNCHERS:
        tree.remove(launcher)
    for name in releases(tree):
        if tree.dry_run:
            say("would remove " + tree.path(FOLDER + "/" + name))
        else:
            remove_any(tree.path(FOLDER + "/" + name))
    tree.remove_empty(FOLDER)


def releases(tree: Tree) -> list[str]:
    """Return the names of the releases that are there."""
    folder = tree.path(FOLDER + "/")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if RELEASE_NAME.fullmatch(name) and NEW not in name]


def is_running() -> bool:
    """Say whether a process of this host was started from the helper's launcher."""
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                words = _read("/proc/%s/cmdline" % process).split(b"\0", 3)
            except OSError:  # it has ended
                continue
            if os.fsencode(HELPER) in words[:3]:
                return True
    return False


def _modules(source: str) -> dict[str, bytes]:
    """Return the content of every module of a checkout by its path in a release."""
    found = {}
    for package in PACKAGES:
        folder = os.path.join(source, package)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        if not names and package not in OPTIONAL:
            raise SetupError(folder + " is missing: run install.sh from a whole copy of the project")
        for name in names:
            if name.endswith(".py"):
                found[os.path.basename(package) + "/" + name] = _read(os.path.join(folder, name))
    return found


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _named_by(launcher: bytes) -> str:
    """Return the release that a launcher names, or nothing."""
    found = re.search(rb'^RELEASE = "(.*)"$', launcher, flags=re.MULTILINE)
    name = found.group(1).decode("ascii", "replace") if found else ""
    return name if RELEASE_NAME.fullmatch(name) else ""


def _with_release(launcher: bytes, name: str) -> bytes:
    text, count = re.subn(
        rb'^RELEASE = ".*"$', b'RELEASE = "%s"' % name.encode(), launcher, flags=re.MULTILINE
    )
    if count != 1:
        raise SetupError("a launcher names no release: run install.sh from a whole copy of the project")
    return text


def _place_release(tree: Tree, modules: dict[str, bytes]) -> str:
    """Make the folder of a release, complete or not at all; return its name, which follows from its content."""
    digest = hashlib.sha256()
    for path, data in sorted(modules.items()):
        digest.update(b"%s %d\n" % (path.encode(), len(data)) + data)
    base = name = "%s-%s" % (VERSION, digest.hexdigest()[:12])
    copy = 0
    while tree.exists(FOLDER + "/" + name):
        if _is_intact(tree.path(FOLDER + "/" + name), modules):
            return name
        copy += 1  # somebody else changed that folder: never run it again
        name = "%s-%d" % (base, copy)
    target = tree.path(FOLDER + "/" + name)
    if tree.dry_run:
        say("would install " + target)
        return name
    new = target + NEW + str(os.getpid())
    tree.on_failure(lambda: remove_any(new))
    _write_release(new, modules)
    tree.on_failure(lambda: remove_any(target))
    os.rename(new, target)
    sync_directory(os.path.dirname(target))
    tree.relabel(target)
    return name


def _write_release(folder: str, modules: dict[str, bytes]) -> None:
    os.mkdir(folder, 0o755)
    for path, data in modules.items():
        package = os.path.join(folder, os.path.dirname(path))
        os.makedirs(package, 0o755, exist_ok=True)
        with open(os.path.join(folder, path), "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for package in sorted(os.listdir(folder)):
        sync_directory(os.path.join(folder, package))
    sync_directory(folder)


def _is_intact(folder: str, modules: dict[str, bytes]) -> bool:
    """Say whether a release holds these modules, what Python made of them, and nothing that others can change."""
    found: set[str] = set()
    for directory, folders, files in os.walk(folder):
        paths = [directory] + [os.path.join(directory, name) for name in folders + files]
        if not all(_is_private(path) for path in paths):
            return False
        if os.path.basename(directory) != "__pycache__":
            found.update(os.path.relpath(os.path.join(directory, name), folder) for name in files)
    return found == set(modules) and all(
        _read(os.path.join(folder, path)) == data for path, data in modules.items()
    )


def _is_private(path: str) -> bool:
    """Say whether only root can change a file or directory; a symbolic link is none."""
    status = os.lstat(path)
    kind = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return kind and status.st_uid == 0 and not status.st_mode & 0o022


def _repair_folder(tree: Tree) -> None:
    """Give the folder of the programs to root alone; what lies in it is checked after that."""
    if tree.dry_run:
        return
    tree.make_directory(FOLDER)
    path = tree.path(FOLDER)
    if os.path.islink(path):
        raise SetupError(path + " is a symbolic link: remove it")
    os.chown(path, 0, 0)
    os.chmod(path, 0o755)


def remove_replaced(tree: Tree) -> None:
    """Remove the releases that were replaced long enough ago; one that cannot be removed stays."""
    used = _named_by(tree.read(HELPER) or b"")
    for name in releases(tree):
        path = tree.path(FOLDER + "/" + name)
        if name != used and time.time() - os.lstat(path).st_mtime > GRACE_SECONDS and not tree.dry_run:
            try:
                remove_any(path)
            except OSError as error:
                warn("an older release stays: %s" % error)


def remove_leftovers(tree: Tree) -> None:
    """Remove what killed runs left: files and releases being written, copies of the crashing program."""
    folder = tree.path(FOLDER + "/")
    if tree.dry_run or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if NEW in name or name.startswith("coretest-"):
            remove_any(folder + name)

"""Owns the files below one root: replaced atomically, undone on failure, under one lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import time

from core_dump_setup import disk, interrupts
from core_dump_setup.errors import SetupError, say, warn

TYPE_CHECKING = False  # importing typing costs more than it gives
if TYPE_CHECKING:
    from collections.abc import Callable

STATE = "/var/lib/core-dump-handler"
RECORD = STATE + "/installed-files"
LOCK = STATE + "/lock"
LOCK_SECONDS = 120
DIST = ".dist"
"""After a file's name: the version we ship, beside one that was edited."""
SAVE = ".save"
"""After a file's name: an edited file whose program was removed."""
UNRECORDED = frozenset(
    [
        "2bb7544b95a31d9e5885f2812eb5b7433e4da6113501fb477ffcf16f62968810",  # 69-core-dump.conf
        "b5c77d366112a650ff32c12461ac3f4c71a45b1972cf29c1d15f30d0930c074f",  # tmpfiles.conf
        "6181169fe7b6344e67fed9901ce8b90f1ec109c2cf9ca8c73df146c6d5a31c66",  # limits.conf
        "c4d523352b40a1f7369a53e2913613e5b71dfd4fa618a6753f7e08f413a5438d",  # helper.conf
    ]
)
"""Checksums of the configuration files of release 0.1.0, which recorded none when it installed them."""


class Tree:
    """Files below a root directory; names are absolute, as the host sees them."""

    def __init__(self, root: str, *, dry_run: bool = False) -> None:
        """Take `root` ("" for this host's own); with `dry_run`, only say what would be done."""
        self.root, self.dry_run = root, dry_run
        self.is_final = False
        self._undo: list[Callable[[], object]] = []
        self._after_unlock: list[Callable[[], object]] = []
        self._lock = -1

    def path(self, name: str) -> str:
        """Return where a name lies.

        Raises:
            SetupError: a symbolic link leads out of the root.
        """
        path = self.root + name
        if self.root:
            real, root = os.path.realpath(os.path.dirname(path)), os.path.realpath(self.root)
            if not (real + "/").startswith(root.rstrip("/") + "/"):
                raise SetupError(path + ": a symbolic link leads out of " + self.root)
        return path

    def read(self, name: str) -> bytes | None:
        """Return the content of a regular file, None for anything else."""
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def exists(self, name: str) -> bool:
        """Say whether anything has this name."""
        return os.path.lexists(self.path(name))

    def place(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Make a file of root's with this content and mode, unless it is there already."""
        path = self.path(name)
        if self.read(name) == data and disk.is_private(path, mode):
            return
        if self.dry_run:
            say("would install " + path)
            return
        self.make_directory(os.path.dirname(name))
        self._remember(name)
        disk.write(path, data, mode, (0, 0))
        self.relabel(path)

    def relabel(self, path: str) -> None:
        """Give what was installed on this host the SELinux label of its place."""
        program = shutil.which("restorecon", path="/usr/sbin:/sbin:/usr/bin")
        if program and not self.root:
            subprocess.run([program, "-R", path], check=False)

    def remove(self, name: str) -> None:
        """Remove a file or a symbolic link, if it exists."""
        if not self.exists(name):
            return
        if self.dry_run:
            say("would remove " + self.path(name))
            return
        self._remember(name)
        os.unlink(self.path(name))

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link where nothing is."""
        if self.dry_run:
            say("would link %s to %s" % (self.path(name), target))
            return
        self.make_directory(os.path.dirname(name))
        self._remember(name)
        os.symlink(target, self.path(name))

    def make_directory(self, name: str) -> None:
        """Make a directory and its parents, as far as they are missing."""
        path = self.path(name)
        if os.path.isdir(path):
            return
        if name.strip("/"):
            self.make_directory(os.path.dirname(name))
        self.on_failure(lambda: disk.remove_empty(path))
        os.mkdir(path, 0o755)

    def remove_empty(self, *names: str) -> None:
        """Remove directories that hold nothing."""
        for name in names:
            if not self.dry_run:
                disk.remove_empty(self.path(name))

    def is_edited(self, name: str, shipped: bytes) -> bool:
        """Say whether a configuration file is neither the one we ship nor the one we installed."""
        current = self.read(name)
        known = UNRECORDED.union((self._records().get(name), _digest(shipped)))
        return self.exists(name) and (current is None or _digest(current) not in known)

    def configure(self, name: str, shipped: bytes) -> None:
        """Install a configuration file; if it was edited, keep it and put ours beside it."""
        if self.is_edited(name, shipped):
            self.place(name + DIST, shipped)
            say("kept %s, which was edited; our version is %s" % (self.path(name), self.path(name + DIST)))
            return
        self.place(name, shipped)
        self.remove(name + DIST)
        if self._records().get(name) != _digest(shipped):
            self._record(name, _digest(shipped))

    def discard(self, name: str, shipped: bytes, *, purge: bool) -> None:
        """Remove a configuration file; one that was edited stays as NAME.save unless `purge` is given.

        Anything but a regular file stays, because it cannot be told from an edit; `purge` removes a symbolic link.
        """
        path, current = self.path(name), self.read(name)
        if current is None and self.exists(name) and not (purge and os.path.islink(path)):
            say(path + " is not a regular file: kept")
        else:
            if not purge and current is not None and self.is_edited(name, shipped):
                self.place(name + SAVE, current)
                say("%s was edited: kept as %s" % (path, path + SAVE))
            self.remove(name)
        self.remove(name + DIST)
        if purge:
            self.remove(name + SAVE)
        if name in self._records():
            self._record(name, "")

    def _records(self) -> dict[str, str]:
        lines = (self.read(RECORD) or b"").decode("ascii", "replace").splitlines()
        return {name: digest for digest, _, name in (line.partition(" ") for line in lines)}

    def _record(self, name: str, digest: str) -> None:
        """Remember what was installed under a name; forget the name if `digest` is empty."""
        records = dict(self._records(), **{name: digest})
        lines = ["%s %s\n" % (records[n], n) for n in sorted(records) if records[n]]
        if lines:
            self.place(RECORD, "".join(lines).encode())
        else:
            self.remove(RECORD)

    def on_failure(self, action: Callable[[], object]) -> None:
        """Run this when the changes are undone; the last one runs first."""
        self._undo.append(action)

    def keep(self) -> None:
        """Make the changes final; from here on nothing may fail the run, so signals are ignored."""
        interrupts.ignore()
        self.is_final = True
        self._undo.clear()

    def is_changed(self) -> bool:
        """Say whether there is anything to undo."""
        return bool(self._undo)

    def undo(self) -> list[str]:
        """Undo every change, unless they are final; return what could not be undone."""
        failures = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # noqa: BLE001 - the other changes are undone in any case
                failures.append(str(error) or type(error).__name__)
        return failures

    def _remember(self, name: str) -> None:
        """Let `undo` bring back what a name holds now."""
        path = self.path(name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            self.on_failure(lambda: disk.unlink(path))
            return
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(path)
            self.on_failure(lambda: disk.link_again(path, target))
            return
        data = self.read(name)
        if data is None:
            raise SetupError(path + " is no file: remove it")
        mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        self.on_failure(lambda: disk.write(path, data, mode, owner))

    def lock(self) -> None:
        """Hold the lock of this root until the process ends, or raise SetupError after LOCK_SECONDS."""
        if self.dry_run:
            return
        self._make_lock_directory()
        end, waiting = time.monotonic() + LOCK_SECONDS, False
        while not self._try_lock():
            if not waiting:
                say("waiting for another installation or removal to end")
                waiting = True
            if time.monotonic() > end:
                raise SetupError("another installation or removal holds " + self.path(LOCK))
            time.sleep(0.05)

    def _try_lock(self) -> bool:
        """Lock the file that has the name now: whoever held the lock may have removed it."""
        path = self.path(LOCK)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # a removal that has just ended took the directory too
            self._make_lock_directory()
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                self._lock = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return False

    def _make_lock_directory(self) -> None:
        """Make the lock's directory; `unlock` removes what is made here, `undo` does not."""
        undo, self._undo = self._undo, []
        self.make_directory(STATE)
        self._after_unlock, self._undo = self._undo, undo

    def unlock(self) -> None:
        """Remove the lock and the directories that hold nothing else, and let go."""
        if self._lock < 0:
            return
        try:
            disk.unlink(self.path(LOCK))
            disk.remove_empty(self.path(STATE))
            while self._after_unlock:
                self._after_unlock.pop()()
        except (OSError, SetupError) as error:
            warn("the lock stays: %s" % error)
        os.close(self._lock)

    def remove_leftovers(self, *names: str) -> None:
        """Remove what a killed run left beside these files. The lock must be held."""
        if self.dry_run:
            return
        for name in names:
            directory = self.path(os.path.dirname(name) + "/")
            base = os.path.basename(name)
            for entry in disk.entries(directory):
                if entry.startswith(base) and disk.NEW in entry[len(base) :]:
                    disk.remove_any(os.path.join(directory, entry))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

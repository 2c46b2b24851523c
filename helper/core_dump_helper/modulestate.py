"""Owns the state of modules: the files that were copied, and how much each origin has used of its budget.

Both are hints: losing them costs copies, not modules. They are kept in `.helper/modules`.
"""

from __future__ import annotations

import os
import time
from hashlib import blake2b

from core_dump_helper.modules import STATE
from core_dump_helper.system import NEW_FILE, exists, lock, read_file, replace_file

KNOWN_SECONDS = 7 * 24 * 3600
MAX_KNOWN = 8192
MAX_ORIGINS = 1000
MAX_STATE_BYTES = 4 << 20
LOCK_SECONDS = 10
HOUR_SECONDS = 3600
BUDGET_BYTES = 1 << 30
"""Of files that each origin may let the helper read in an hour."""
LEAST_CHARGE_BYTES = 1 << 20
"""A small file costs time, too."""


class Known:
    """The content of a file as it was when it was copied."""

    def __init__(self, sha256: str, build_id: str, is_sensitive: bool, seen: int) -> None:
        """Store the digest, the build ID (empty if there is none) and Unix seconds."""
        self.sha256, self.build_id, self.is_sensitive, self.seen = sha256, build_id, is_sensitive, seen


class ModuleState:
    """The known files and the budgets."""

    def __init__(self, directory: int) -> None:
        """Store the descriptor of `.helper`."""
        self._directory = directory
        self.files: dict[str, Known] = {}
        """By `identity`."""
        self._used: dict[str, tuple[int, int]] = {}
        """Hour and bytes, by digits for an origin."""

    def charge(self, origin: bytes, sizes: list[int]) -> int:
        """Take as many of `sizes` as fit from an origin's budget for this hour; return their number; raises OSError."""
        with _Lock(self._directory):
            self._load()
            key, hour = _digits(origin), int(time.time()) // HOUR_SECONDS
            used = self._used[key][1] if self._used.get(key, (0, 0))[0] == hour else 0
            count = 0
            for size in sizes:
                used += max(size, LEAST_CHARGE_BYTES)
                if used > BUDGET_BYTES:
                    used -= max(size, LEAST_CHARGE_BYTES)
                    break
                count += 1
            self._used = {name: value for name, value in self._used.items() if value[0] == hour}
            if key not in self._used and len(self._used) >= MAX_ORIGINS:
                return 0
            self._used[key] = hour, used
            self._save()
            return count

    def load(self) -> None:
        """Read the known files and the budgets; raises OSError."""
        with _Lock(self._directory):
            self._load()

    def add(self, files: dict[str, Known]) -> None:
        """Remember files; the oldest go if there are too many; raises OSError.

        If the state is gone since `charge`, the modules have been removed, too.
        """
        with _Lock(self._directory):
            if not exists(STATE, self._directory):
                return
            self._load()
            self.files.update(files)
            self._save()

    def _load(self) -> None:
        self.files, self._used = {}, {}
        oldest = time.time() - KNOWN_SECONDS
        try:
            lines = read_file(STATE, MAX_STATE_BYTES, self._directory).decode("ascii", "replace").split("\n")
        except FileNotFoundError:
            return
        for line in lines:
            words = line.split(" ")
            try:
                if words[0] == "file" and oldest < int(words[5]) <= time.time() + HOUR_SECONDS:
                    _, key, sha256, build_id, sensitive, seen = words
                    self.files[key] = Known(sha256, build_id.strip("-"), sensitive == "1", int(seen))
                elif words[0] == "used":
                    self._used[words[1]] = int(words[2]), int(words[3])
            except (ValueError, IndexError):  # a damaged line costs one entry
                continue

    def _save(self) -> None:
        newest = sorted(self.files.items(), key=lambda item: item[1].seen)[-MAX_KNOWN:]
        lines = [
            "file %s %s %s %d %d" % (key, f.sha256, f.build_id or "-", f.is_sensitive, f.seen)
            for key, f in newest
        ]
        lines += ["used %s %d %d" % (key, hour, used) for key, (hour, used) in self._used.items()]
        replace_file(STATE, ("\n".join(lines) + "\n").encode(), self._directory)


class _Lock:
    """Holds the lock of the state within a block; raises TimeoutError."""

    def __init__(self, directory: int) -> None:
        self._guard = os.open(STATE + ".lock", NEW_FILE, 0o600, dir_fd=directory)

    def __enter__(self) -> None:
        if not lock(self._guard, LOCK_SECONDS):
            os.close(self._guard)
            raise TimeoutError(110, "another helper locks the state of modules")

    def __exit__(self, *_: object) -> None:
        os.close(self._guard)


def identity(status: os.stat_result) -> str:
    """Return a text that changes with a file's content: nobody can set `st_ctime`."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return "%d:%d:%d:%d:%d" % (status.st_dev, status.st_ino, status.st_size, *times)


def _digits(origin: bytes) -> str:
    return blake2b(origin, digest_size=16).hexdigest()

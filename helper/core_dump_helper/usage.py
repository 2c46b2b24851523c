"""Owns how many bytes the files in the watch directory take, in all and for each origin; imported only if that matters.

Counting a million names takes seconds, so the result is kept in `.helper/usage`. Dumps add to it as they grow. The
files are counted again after a dump when the count is old, and before it refuses a dump.
"""

from __future__ import annotations

import os
import time
from stat import S_ISREG

from core_dump_helper.system import lock, read_file, replace_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.records import Records

ATTRIBUTE = "user.coredump.origin"
LOCK_SECONDS = 2
MAX_ORIGINS = 200
MAX_BYTES = 1 << 17


class Usage:
    """The bytes in the watch directory, as far as they are known."""

    def __init__(self, directory: int, records: Records | None) -> None:
        """Store the watch directory and the state, without which nothing is kept for the next crash."""
        self._directory, self._records = directory, records
        self.total = 0
        self.origins: dict[bytes, int] = {}
        self._counted, self._cost = 0.0, 0.0
        """Monotonic seconds of the last count, and how many it took."""

    def load(self) -> bool:
        """Read what is known; return False if nothing is, or it is of another boot."""
        if not self._records:
            return False
        try:
            first, *lines = read_file("usage", MAX_BYTES, self._records.directory).split(b"\n")
            counted, cost, total = first.split()
            values = float(counted), float(cost), int(total)
            pairs = [line.partition(b" ") for line in lines if line]
            origins = {origin: int(held) for held, _, origin in pairs}
        except (OSError, ValueError):
            return False
        if not 0 <= values[0] <= time.monotonic():
            return False
        self._counted, self._cost, self.total = values
        self.origins = origins
        return True

    def refresh(self, seconds: float, patience: float, limit: float) -> bool:
        """Count again unless the last count is younger than `seconds`, or `patience` times what it took.

        Returns:
            Whether it counted within `limit` seconds; of several helpers, one does.
        """
        if time.monotonic() - self._counted < max(seconds, patience * self._cost):
            return False
        guard = self._open("usage.count")
        try:
            return (guard < 0 or lock(guard, 0)) and self.count(limit)
        finally:
            if guard >= 0:
                os.close(guard)

    def count(self, limit: float, *, partial: bool = False) -> bool:
        """Look at every file of the directory and keep the result; return whether `limit` seconds were enough.

        What was counted until then is forgotten, or kept if `partial` is better than nothing.
        """
        started, known = time.monotonic(), (self.total, self.origins)
        self.total, self.origins, complete = 0, {}, True
        with os.scandir(self._directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # the collector has removed it
                    continue
                self._count_file(entry.name, status)
                if time.monotonic() - started > limit:
                    complete = False
                    break
        if not complete and not partial:
            self.total, self.origins = known
            return False
        self._cost = time.monotonic() - started
        self._counted = started + self._cost if complete else 0.0  # a partial one is old from the start
        self._update(None, 0)
        return complete

    def _count_file(self, name: str, status: os.stat_result) -> None:
        held = status.st_blocks * 512
        self.total += held
        if status.st_uid not in (0, os.geteuid()):
            origin = b"user:%d" % status.st_uid
        elif S_ISREG(status.st_mode) and name.startswith("core"):
            try:
                path = "/proc/self/fd/%d/%s" % (self._directory, name)
                origin = os.getxattr(path, ATTRIBUTE, follow_symlinks=False)
            except OSError:
                return
        else:
            return
        self.origins[origin] = self.origins.get(origin, 0) + held

    def add(self, origin: bytes, held: int) -> None:
        """Add what a dump has grown by, to what is known by now."""
        self._update(origin, held)

    def _update(self, origin: bytes | None, held: int) -> None:
        """Change the file `usage`: replace it after a count, otherwise add to it."""
        guard = self._open("usage.lock")
        try:
            locked = guard >= 0 and lock(guard, LOCK_SECONDS)
            if origin is not None:
                if locked:
                    self.load()
                self.total += held
                self.origins[origin] = self.origins.get(origin, 0) + held
            if locked and self._records:
                self._save(self._records)
        except OSError:  # a full disk: it is counted again when it is old
            pass
        finally:
            if guard >= 0:
                os.close(guard)

    def _save(self, records: Records) -> None:
        largest = sorted(self.origins.items(), key=lambda item: item[1], reverse=True)[:MAX_ORIGINS]
        lines = [b"%d %s" % (held, origin) for origin, held in largest if b"\n" not in origin]
        text = b"%f %f %d\n" % (self._counted, self._cost, self.total) + b"\n".join(lines) + b"\n"
        replace_file("usage", text, records.directory)

    def _open(self, name: str) -> int:
        """Return the descriptor of a file of the state, or -1."""
        try:
            return self._records.open_file(name) if self._records else -1
        except OSError:
            return -1

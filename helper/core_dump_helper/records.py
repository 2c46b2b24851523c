"""Owns `.helper`, the helper's state in the watch directory, and the suppressed-crash records that it holds.

The collector reads the records and reports them: docs/contracts.md.
"""

from __future__ import annotations

import os
import time

from core_dump_helper.system import DIRECTORY, NEW_FILE, PLAIN, exists, lock, read_file, write_all

MAX_RECORDS = 1000
LOCK_SECONDS = 2


class Record:
    """How many dumps of one workload were kept and suppressed, for one reason, in one window of time."""

    def __init__(self, workload: dict[str, bytes], reason: str, seconds: int) -> None:
        """Start an empty record; `seconds` is the length of its window."""
        self.workload, self.reason, self.seconds = workload, reason, seconds
        self.kept = self.suppressed = 0
        self.first = self.last = 0
        """Unix seconds."""

    def name(self) -> str:
        """Return the name of the record's file."""
        from _blake2 import blake2b

        identity = b"\0".join([*self.workload.values(), self.reason.encode()])
        return str(blake2b(identity, digest_size=12).hexdigest())

    def load(self, text: bytes) -> None:
        """Read the counts from a record's file; raises ValueError for a number with too many digits."""
        pairs = {key: value for key, _, value in (line.partition(b"=") for line in text.split(b"\n"))}
        numbers = [pairs.get(key, b"") for key in (b"kept", b"suppressed", b"first")]
        counts = [int(number) if number.isdigit() else 0 for number in numbers]
        self.kept, self.suppressed, self.first = counts

    def count(self, kept: bool, now: int) -> None:
        """Count one dump."""
        self.kept += kept
        self.suppressed += not kept
        self.last = now

    def open_window(self, now: int) -> None:
        """Start a new window if the current one is over."""
        if not 0 <= now - self.first < self.seconds:
            self.kept = self.suppressed = 0
            self.first = now

    def render(self) -> bytes:
        """Return the text of the record's file: `key=value` lines, values percent-encoded."""
        counts = {"kept": self.kept, "suppressed": self.suppressed, "first": self.first, "last": self.last,
                  "seconds": self.seconds}  # fmt: skip
        fields = {**self.workload, "reason": self.reason.encode()}
        fields.update({key: b"%d" % value for key, value in counts.items()})
        return "".join("%s=%s\n" % (key, percent(fields[key])) for key in fields).encode()


class Records:
    """The suppressed-crash records, in the directory `.helper`."""

    def __init__(self, directory: int) -> None:
        """Store the descriptor of `.helper`."""
        self.directory = directory

    def open_file(self, name: str, flags: int = 0) -> int:
        """Open or create a file of the state."""
        return os.open(name, NEW_FILE | flags, 0o600, dir_fd=self.directory)

    def update(self, record: Record, max_kept: int) -> bool:
        """Count a dump in the record; keep it if fewer than `max_kept` were kept in this window.

        Raises:
            OSError: the state cannot be read or written.
            ValueError: the record is damaged.
        """
        guard = self.open_file("lock")
        try:
            if not lock(guard, LOCK_SECONDS):
                return max_kept > 0
            self._limit_number(record)
            now = int(time.time())
            record.load(self._read(record.name()))
            record.open_window(now)
            kept = record.kept < max_kept
            record.count(kept, now)
            self._save(record)
            return kept
        finally:
            os.close(guard)

    def _read(self, name: str) -> bytes:
        try:
            return read_file(name, 16384, self.directory)
        except FileNotFoundError:
            return b""

    def _save(self, record: Record) -> None:
        draft = self.open_file("draft", os.O_TRUNC)
        try:
            write_all(draft, record.render())
        finally:
            os.close(draft)
        os.rename("draft", record.name(), src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def _limit_number(self, record: Record) -> None:
        """Remove old records if there are too many; count all further executables in one record."""
        if exists(record.name(), self.directory):
            return
        names = [name for name in os.listdir(self.directory) if len(name) == len(record.name())]
        if len(names) < MAX_RECORDS:
            return
        for name in names:
            if os.stat(name, dir_fd=self.directory).st_mtime < time.time() - max(3600, record.seconds):
                os.unlink(name, dir_fd=self.directory)
        record.workload["exe"] = b"*"


def open_state(directory: int) -> int:
    """Open or create `.helper` in the watch directory; raises OSError unless it belongs to this user alone."""
    try:
        os.mkdir(".helper", 0o700, dir_fd=directory)
    except FileExistsError:
        pass
    state = os.open(".helper", DIRECTORY, dir_fd=directory)
    status = os.fstat(state)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(state)
        raise PermissionError(1, "it belongs to another user, or others may use it")
    return state


def workload_of(metadata: dict[str, bytes]) -> dict[str, bytes]:
    """Return what a record counts together: executable, container, pod and signal."""
    workload = {key: metadata.get(key, b"") for key in ("exe", "container_id", "pod_uid", "signal")}
    workload["exe"] = workload["exe"] or metadata.get("thread", b"")
    return workload


def percent(value: bytes) -> str:
    """Encode bytes that are not plain as %XX."""
    return "".join(chr(byte) if byte in PLAIN + b"/" else "%%%02X" % byte for byte in value)

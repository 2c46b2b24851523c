"""Owns `.helper`, the helper's state in the watch directory, and the suppressed-crash records that it holds.

The collector reads the records and reports them: docs/contracts.md. A record has a fixed size, and a few spare files
are kept, so that a loss can be recorded when the file system has no block and no inode left.
"""

from __future__ import annotations

import os
import time
from stat import S_ISREG

from core_dump_helper.system import NEW_FILE, PLAIN, exists, lock, open_own, read_file, write_all

MAX_RECORDS = 1000
"""Of workloads; beyond it, each origin still has one for each reason."""
MAX_FILES = 2000
RECORD_BYTES = 4096
MAX_EXE_BYTES = 1000
SPARES = ("spare-0", "spare-1", "spare-2")
RESERVED = (
    *("spare-3", "spare-4", "spare-5", "spare-6"),
    *("spare-7", "spare-8", "spare-9", "spare-10", "spare-11"),
)
"""For new records of all origins when no other spare file is left: as many as there are reasons to refuse a dump."""
LOCK_SECONDS = 2
OLD_SECONDS = 3600
NAME_DIGITS, ORIGIN_DIGITS = 24, 10


class Record:
    """How many dumps of one workload were kept and suppressed, for one reason, in one window of time."""

    def __init__(self, metadata: dict[str, bytes], reason: str, seconds: int) -> None:
        """Start an empty record of a crash's workload; `seconds` is the length of its window."""
        self.workload = {key: metadata.get(key, b"") for key in ("exe", "container_id", "pod_uid", "signal")}
        self.workload["exe"] = self.workload["exe"] or metadata.get("thread", b"")
        self.origin = metadata.get("origin", b"")
        self.reason, self.seconds = reason, seconds
        self.kept = self.suppressed = self.vital = 0
        """Dumps; `vital` of the suppressed ones kept their vital part."""
        self.first = self.last = 0
        """Unix seconds."""

    def name(self) -> str:
        """Return the name of the record's file: digits for its origin, then digits for its workload and reason."""
        from _blake2 import blake2b

        identity = b"\0".join([*self.workload.values(), self.reason.encode()])
        workload = blake2b(identity, digest_size=(NAME_DIGITS - ORIGIN_DIGITS) // 2).hexdigest()
        return str(blake2b(self.origin, digest_size=ORIGIN_DIGITS // 2).hexdigest() + workload)

    def merge_workloads(self) -> None:
        """Count for all further workloads of the origin."""
        self.workload.update(exe=b"*", signal=b"")

    def merge_origins(self) -> None:
        """Count for every origin."""
        self.origin = b"*"
        self.workload.update(exe=b"*", signal=b"", container_id=b"", pod_uid=b"")

    def is_shared(self) -> bool:
        """Return whether several origins are counted here."""
        return self.origin == b"*"

    def is_repeated(self) -> bool:
        """Return whether the last refusal is not the first one that kept nothing."""
        return self.suppressed - self.vital > 1

    def load(self, text: bytes) -> None:
        """Read the counts from a record's file; raises ValueError for a number with too many digits."""
        pairs = {key: value for key, _, value in (line.partition(b"=") for line in text.split(b"\n"))}
        numbers = [pairs.get(key, b"") for key in (b"kept", b"suppressed", b"vital", b"first")]
        counts = [int(number) if number.isdigit() else 0 for number in numbers]
        self.kept, self.suppressed, self.vital, self.first = counts

    def open_window(self, now: int) -> None:
        """Start a new window if the current one is over."""
        if not 0 <= now - self.first < self.seconds:
            self.kept = self.suppressed = self.vital = 0
            self.first = now

    def count(self, kept: bool, now: int) -> None:
        """Count one dump."""
        self.kept += kept
        self.suppressed += not kept
        self.last = now

    def render(self) -> bytes:
        """Return the text of the record's file: `key=value` lines, values percent-encoded, and a line of spaces."""
        numbers = {"kept": self.kept, "suppressed": self.suppressed, "vital": self.vital, "first": self.first,
                   "last": self.last, "seconds": self.seconds}  # fmt: skip
        fields = {**self.workload, "origin": self.origin, "reason": self.reason.encode()}
        fields["exe"] = fields["exe"][:MAX_EXE_BYTES]
        fields.update({key: b"%d" % value for key, value in numbers.items()})
        text = "".join("%s=%s\n" % (key, percent(fields[key])) for key in fields).encode()
        return text[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n"


class Records:
    """The suppressed-crash records, in the directory `.helper`."""

    def __init__(self, directory: int) -> None:
        """Store the descriptor of `.helper`."""
        self.directory = directory

    def open_file(self, name: str, flags: int = 0) -> int:
        """Open or create a file of the state."""
        return os.open(name, NEW_FILE | flags, 0o600, dir_fd=self.directory)

    def prepare(self) -> None:
        """Create the files without which a loss cannot be recorded later, on a full disk."""
        if all(map(self._is_spare, (*SPARES, RESERVED[-1]))):
            return
        guard = self.open_file("lock")
        try:
            if lock(guard, LOCK_SECONDS):
                for name in SPARES + RESERVED:
                    self._find_spare((name,))
        finally:
            os.close(guard)

    def update(self, record: Record, max_kept: int, vital: int = 0) -> bool:
        """Count a dump; keep it if fewer than `max_kept` were kept in this window. Change `record` to what is stored.

        Of one that is not kept whole, `vital` says whether its vital part is.

        Raises:
            OSError: the state cannot be read or written.
            ValueError: the record is damaged.
        """
        guard = self._lock()
        try:
            self._choose_file(record)
            if record.is_shared() and max_kept:
                return True  # a limit for one workload must not refuse another's dump
            now = int(time.time())
            record.load(self._read(record.name()))
            record.open_window(now)
            kept = record.kept < max_kept
            record.count(kept, now)
            record.vital += 0 if kept else vital
            self._save(record)
            return kept
        finally:
            os.close(guard)

    def take_back(self, record: Record) -> None:
        """Uncount a kept dump that could not be taken, in its own window; raises OSError, ValueError."""
        self._change(record, kept=-1)

    def add_vital(self, record: Record, count: int) -> None:
        """Note that the vital part of a refused dump is kept (1), or not after all (-1); raises OSError, ValueError."""
        self._change(record, vital=count)

    def _change(self, record: Record, kept: int = 0, vital: int = 0) -> None:
        first = record.first
        guard = self._lock()
        try:
            record.load(self._read(record.name()))
            if record.first == first and record.kept + kept >= 0 and record.vital + vital >= 0:
                record.kept += kept
                record.vital += vital
                self._save(record)
        finally:
            os.close(guard)

    def _lock(self) -> int:
        """Return the descriptor that holds the lock of the records."""
        guard = self.open_file("lock")
        if lock(guard, LOCK_SECONDS):
            return guard
        os.close(guard)
        raise TimeoutError(110, "another helper locks it")

    def _choose_file(self, record: Record) -> None:
        """Let the record count for more than its workload if there are too many records or no room for another.

        An origin may have as many records as are free, so that no origin can take the last ones.
        """
        if exists(record.name(), self.directory):
            return
        names = self._names()
        if len(names) >= MAX_RECORDS:
            names = self._remove_old(names, max(OLD_SECONDS, record.seconds))
        own = [name for name in names if name[:ORIGIN_DIGITS] == record.name()[:ORIGIN_DIGITS]]
        if len(own) >= MAX_RECORDS - len(names):
            record.merge_workloads()
        if exists(record.name(), self.directory):
            return
        if len(names) >= MAX_FILES or not self._find_spare(SPARES):
            record.merge_origins()

    def _names(self) -> list[str]:
        return [name for name in os.listdir(self.directory) if len(name) == NAME_DIGITS]

    def _remove_old(self, names: list[str], seconds: int) -> list[str]:
        """Remove the records that did not change for so long; return the names of the others."""
        old = time.time() - seconds
        kept = []
        for name in names:
            if os.stat(name, dir_fd=self.directory).st_mtime < old:
                os.unlink(name, dir_fd=self.directory)
            else:
                kept.append(name)
        return kept

    def _read(self, name: str) -> bytes:
        try:
            return read_file(name, 4 * RECORD_BYTES, self.directory)
        except FileNotFoundError:
            return b""

    def _save(self, record: Record) -> None:
        """Replace the record's file by a spare one; overwrite it if only reserved ones are left."""
        name = record.name()
        spare = self._find_spare(SPARES)
        if not spare and not exists(name, self.directory):
            spare = self._find_spare(RESERVED)
        self._overwrite(spare or name, record.render())
        if spare:
            os.rename(spare, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def _overwrite(self, name: str, text: bytes) -> None:
        """Write to a file that exists, whose block is allocated."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=self.directory)
        try:
            write_all(descriptor, text)
        finally:
            os.close(descriptor)

    def _find_spare(self, names: tuple[str, ...]) -> str:
        """Return the first of the spare files; create one if none is left; return an empty string if that fails."""
        for is_there in (self._is_spare, self._create_spare):
            for name in names:
                if is_there(name):
                    return name
        return ""

    def _is_spare(self, name: str) -> bool:
        try:
            status = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return S_ISREG(status.st_mode) and status.st_size == RECORD_BYTES

    def _create_spare(self, name: str) -> bool:
        try:
            descriptor = self.open_file(name)
        except OSError:
            return False
        try:
            write_all(descriptor, bytes(RECORD_BYTES))
        except OSError:
            os.unlink(name, dir_fd=self.directory)
            return False
        finally:
            os.close(descriptor)
        return True


def open_state(directory: int) -> int:
    """Open or create `.helper` in the watch directory; raises OSError unless it belongs to this user alone."""
    try:
        os.mkdir(".helper", 0o700, dir_fd=directory)
    except FileExistsError:
        pass
    return open_own(".helper", directory)


def percent(value: bytes) -> str:
    """Encode bytes that are not plain as %XX."""
    plain = PLAIN + b"/"
    return "".join(chr(byte) if byte in plain else "%%%02X" % byte for byte in value)

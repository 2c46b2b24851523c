"""Owns the directory `.helper`: what was refused, counted for the collector, and the slots of MAX_CONCURRENT."""

from __future__ import annotations

import os
import time

from core_dump_helper.naming import percent
from core_dump_helper.system import DIRECTORY, NEW_FILE, exists, lock, log, read_file, write_all

STATE_FILES = 1000


class State:
    """The directory `.helper`: what was refused, and the slots."""

    def __init__(self, directory: int) -> None:
        """Open or create it in the watch directory; raises OSError when it is not ours alone."""
        try:
            os.mkdir(".helper", 0o700, dir_fd=directory)
        except FileExistsError:
            pass
        self._directory = os.open(".helper", DIRECTORY, dir_fd=directory)
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, ".helper belongs to others, or others may use it")

    def _open(self, name: str, flags: int = 0) -> int:
        return os.open(name, NEW_FILE | flags, 0o600, dir_fd=self._directory)

    def take_slot(self, count: int, deadline: float) -> bool:
        """Wait for one of `count` slots, held until this process ends."""
        slots: list[int] = []
        try:
            slots.extend(self._open("slot-%d" % number) for number in range(count))
        except OSError as error:
            for descriptor in slots:
                os.close(descriptor)
            log("MAX_CONCURRENT does not hold: %s" % error.strerror)
            return True
        while time.monotonic() < deadline:
            if any(lock(descriptor, 0) for descriptor in slots):
                return True
            time.sleep(0.01)
        return False

    def tally(self, known: dict[str, bytes], reason: str, most: int, seconds: int) -> bool:
        """Count a dump in the record of its executable, container and signal; True for the first `most`."""
        guard = -1
        try:
            guard = self._open("lock")
            if not lock(guard, 2):
                return most > 0
            fields = {key: known.get(key, b"") for key in ("exe", "container_id", "pod_uid", "signal")}
            fields.update(exe=fields["exe"] or known.get("thread", b""), reason=reason.encode())
            name, now = self._record_name(fields, seconds), int(time.time())
            first, kept, suppressed = self._read(name)
            if not 0 <= now - first < seconds:
                first, kept, suppressed = now, 0, 0
            take = kept < most
            counts = {"kept": kept + take, "suppressed": suppressed + (not take), "first": first, "last": now,
                      "seconds": seconds}  # fmt: skip
            fields.update({key: b"%d" % value for key, value in counts.items()})
            draft = self._open("draft", os.O_TRUNC)
            try:
                write_all(draft, "".join("%s=%s\n" % (key, percent(fields[key])) for key in fields).encode())
            finally:
                os.close(draft)
            os.rename("draft", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return take
        except (OSError, ValueError) as error:  # ValueError: a damaged record
            log("%s is not counted: %s" % (reason, error))
            return most > 0
        finally:
            if guard >= 0:
                os.close(guard)

    def _record_name(self, fields: dict[str, bytes], seconds: int) -> str:
        """Return the record's name; where there are too many records, one counts for all executables."""
        from _blake2 import blake2b

        name = blake2b(b"\0".join(fields.values()), digest_size=12).hexdigest()
        if exists(name, self._directory):
            return str(name)
        records = [other for other in os.listdir(self._directory) if len(other) == len(name)]
        if len(records) >= STATE_FILES:
            for other in records:
                if os.stat(other, dir_fd=self._directory).st_mtime < time.time() - max(3600, seconds):
                    os.unlink(other, dir_fd=self._directory)
            fields["exe"] = b"*"
            name = blake2b(b"\0".join(fields.values()), digest_size=12).hexdigest()
        return str(name)

    def _read(self, name: str) -> tuple[int, int, int]:
        """Return first, kept, suppressed."""
        try:
            text = read_file(name, 16384, self._directory)
        except FileNotFoundError:
            return 0, 0, 0
        pairs = {key: value for key, _, value in (line.partition(b"=") for line in text.split(b"\n"))}
        numbers = [pairs.get(key, b"") for key in (b"first", b"kept", b"suppressed")]
        first, kept, suppressed = (int(number) if number.isdigit() else 0 for number in numbers)
        return first, kept, suppressed

"""Owns one crash from the kernel's arguments to the published dump: configuration, metadata, limits, copying."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms
import os
import time

from core_dump_helper.compress import start_writer
from core_dump_helper.core import LengthCheck, Memory, Reader
from core_dump_helper.crash import read_metadata
from core_dump_helper.dumpfile import RESULT_SPACE, create_partial, publish, set_attributes
from core_dump_helper.limits import DiskWatch, Limits
from core_dump_helper.settings import CONFIG, Settings
from core_dump_helper.system import CHUNK, DIRECTORY, DISK_FULL, Refused, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.compress import GzipWriter, PigzWriter, SparseWriter
    from core_dump_helper.crash import Crash

    Writer = GzipWriter | PigzWriter | SparseWriter

ALARM_SECONDS = 30
"""Beyond DEADLINE_SECONDS: then SIGALRM ends a helper that hangs, even in a read of /proc."""
NICE = 9


class Handler:
    """Turns one crash into a published dump."""

    def __init__(self, crash: Crash, core: int) -> None:
        """Store the crash and the descriptor to read the core from."""
        self.crash, self.core = crash, core
        self.started = time.monotonic()
        self.settings = Settings()
        self.metadata: dict[str, bytes] = {}
        self.announced = False
        self.warnings: list[str] = []
        """Logged with the crash, so that a refusal which is only counted logs none of them."""

    def run(self) -> None:
        """Handle the crash; raises Refused or OSError if no dump is kept."""
        try:
            self.prepare()
            directory = self.open_watch_directory()
            limits = Limits(self.crash, self.metadata, directory, self.settings)
            limits.open()
            try:
                self.dump(directory, limits)
            finally:
                limits.close()
        except Refused as refused:
            if not refused.repeated:
                self.log_warnings()
            raise
        except Exception:
            self.log_warnings()
            raise

    def announce(self) -> None:
        """Log that the crash is dumped; from now on, its end is logged too."""
        self.announced = True
        self.log_warnings()
        log(self.crash.sentence() + "; dumping", 6)

    def log_warnings(self) -> None:
        """Log the warnings that were collected before it was clear whether the crash is logged."""
        for warning in self.warnings:
            log(warning)
        self.warnings = []

    def prepare(self) -> None:
        """Learn what is needed before the limits are checked; raises Refused for a signal that is ignored."""
        self.load_settings()
        self.keep_pidfd()
        self.metadata, warning = read_metadata(self.crash)
        self.warnings.extend(filter(None, [warning]))
        if self.crash.signal in self.settings.IGNORE_SIGNALS.replace(",", " ").split():
            raise Refused("", "IGNORE_SIGNALS names its signal")

    def load_settings(self) -> None:
        """Read helper.conf."""
        self.settings.load(self.crash.config or CONFIG, self.warnings.append)
        self.set_alarm()

    def set_alarm(self) -> None:
        """Let this process live for DEADLINE_SECONDS and a little longer from now on."""
        _signal.alarm(self.settings.DEADLINE_SECONDS + ALARM_SECONDS)

    def keep_pidfd(self) -> None:
        """Keep the kernel's pidfd from the compressor."""
        if not self.crash.pidfd:
            return
        try:
            os.set_inheritable(int(self.crash.pidfd), False)
        except (OSError, OverflowError) as error:
            self.warnings.append("%s: cannot use pidfd %s: %s" % (self.crash, self.crash.pidfd, error))

    def open_watch_directory(self) -> int:
        """Return the watch directory's descriptor; log it if others can write there."""
        path = self.settings.WATCH_DIR
        directory = os.open(path, DIRECTORY)
        status = os.fstat(directory)
        if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            self.warnings.append(
                "WATCH_DIR %a can be changed by others: chown it to root and chmod it to 0700" % path
            )
        return directory

    def dump(self, directory: int, limits: Limits) -> None:
        """Copy the core into the watch directory and publish it; raises Refused, OSError."""
        suffix = "" if self.settings.COMPRESSOR == "none" else ".gz"
        try:
            limits.check(self.started + self.settings.DEADLINE_SECONDS)
            dump, name, writer = self.create(directory, suffix)
            self.announce()
            watch = DiskWatch(dump, limits.disk)
            truncated, expected = self.copy_core(writer, watch)
            if not (writer.size and os.fstat(dump).st_size) and (
                truncated != "compressor_failed" or is_full(dump)
            ):
                os.unlink(name + ".partial", dir_fd=directory)
                reason = "disk_full" if truncated in ("disk_full", "compressor_failed") else ""
                raise Refused(reason, "nothing was written: " + truncated)
        except Refused as refused:
            limits.count(refused)
            refused.repeated = refused.repeated and not self.announced
            raise
        took_ms = int((time.monotonic() - self.started) * 1000)
        self.record_result(dump, writer, truncated, expected, took_ms)
        if truncated == "compressor_failed":
            raise Refused("", "%s failed; %s.partial holds what it wrote" % (writer.name, name))
        name = publish(directory, dump, name, self.crash, suffix)
        state = "truncated (%s)" % truncated if truncated else "complete"
        result = (self.crash, name, state, writer.size, writer.name, took_ms)
        log("%s: %s is %s: %d bytes by %s in %d ms" % result, 6)
        watch.finish()

    def create(self, directory: int, suffix: str) -> tuple[int, str, Writer]:
        """Return the dump's descriptor, its name and its writer; raises Refused if it cannot be created."""
        try:
            dump, name = create_partial(directory, self.crash, suffix)
            set_attributes(dump, self.metadata)
        except OSError as error:
            reason = "disk_full" if error.errno in DISK_FULL else "directory"
            raise Refused(reason, "cannot create the dump: %s" % error.strerror) from error
        try:
            return dump, name, start_writer(dump, self.settings, self.crash.config or CONFIG)
        except Refused:
            os.unlink(name + ".partial", dir_fd=directory)
            raise

    def copy_core(self, writer: Writer, watch: DiskWatch) -> tuple[str, int]:
        """Copy the core from the kernel to the writer.

        Returns:
            Why the dump is truncated, or an empty string; the number of bytes that a whole core has, or 0.
        """
        deadline = time.monotonic() + self.settings.DEADLINE_SECONDS
        reader = Reader(self.core, self.settings, Memory(self.settings.CGROUP), deadline)
        self.set_alarm()  # the wait for a slot must not shorten the dump
        length, failure, released = LengthCheck(), "", False
        for piece in reader.chunks():
            if reader.ended and not released:  # the crashed process waits for nothing more
                released = True
                os.setpriority(*writer.priority, NICE)
            if failure:
                continue
            length.feed(piece)
            writer.parallel = reader.is_full
            failure = self.write(writer, piece) or watch.check(writer.size)
            if failure:
                reader.stop(failure)
        self.set_alarm()
        failed = self.close(writer)
        incomplete = length.verdict(writer.size)
        return failed or (incomplete and (failure or reader.reason or incomplete)), length.expected

    def write(self, writer: Writer, piece: memoryview) -> str:
        """Write a piece; return the reason if it cannot be written."""
        try:
            writer.write(piece)
        except OSError as error:
            log("%s: cannot write with %s: %s" % (self.crash, writer.name, error))
            return "disk_full"
        return ""

    def close(self, writer: Writer) -> str:
        """End the file; return the reason if that fails, for example because its last bytes do not fit."""
        try:
            return writer.close()
        except OSError as error:
            log("%s: cannot end the dump with %s: %s" % (self.crash, writer.name, error))
            return "compressor_failed"

    def record_result(self, dump: int, writer: Writer, truncated: str, expected: int, took_ms: int) -> None:
        """Set the attributes that are known only now; mark a truncated dump even where it has no attributes."""
        from core_dump_helper import VERSION

        result = {
            "bytes": str(writer.size),
            "expected_bytes": str(expected or ""),
            "truncated": truncated,
            "compressor": writer.name,
            "duration_ms": str(took_ms),
            "helper_version": VERSION,
        }
        attributes = {name: value.encode() for name, value in result.items() if value}
        if not set_attributes(dump, attributes, RESULT_SPACE) and truncated:
            os.fchmod(dump, 0o1600)  # the collector reads the sticky bit as "truncated"


def is_full(descriptor: int) -> bool:
    """Return whether a file system has no room for one more piece of a core."""
    space = os.fstatvfs(descriptor)
    return space.f_bavail * space.f_frsize < CHUNK

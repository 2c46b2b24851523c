"""Owns one crash from the kernel's arguments to the published dump: configuration, metadata, limits.

The process is held while the imports at the top of this module are loaded, and those of the modules they name.
Everything else is imported after a small process is released.
"""

from __future__ import annotations

import os
import time

from core_dump_helper.crash import read_metadata
from core_dump_helper.held import Held
from core_dump_helper.settings import CONFIG, Settings
from core_dump_helper.system import CHUNK, DIRECTORY, DISK_FULL, Refused, is_private, log, set_alarm

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.corecopy import CoreCopy
    from core_dump_helper.crash import Crash
    from core_dump_helper.disk import DiskWatch
    from core_dump_helper.keep import Keep
    from core_dump_helper.limits import Limits
    from core_dump_helper.runtime import RuntimeFile


class Handler:
    """Turns one crash into a published dump."""

    def __init__(self, crash: Crash, core: int) -> None:
        """Store the crash and the descriptor to read the core from."""
        self.crash = crash
        self.started = time.monotonic()
        self.settings = Settings()
        self.metadata: dict[str, bytes] = {}
        self.announced = False
        self.warnings: list[str] = []
        """Logged with the crash, so that a refusal which is only counted logs none of them."""
        self.held = Held(crash, core, self.settings, self.warn)

    def handle(self) -> int:
        """Handle the crash and log its end; return an exit code."""
        crash = self.crash
        try:
            self.run()
        except Refused as refused:
            if not refused.repeated:
                log("%s; no dump: %s" % (crash.sentence(), refused))
            return 1
        except Exception as error:  # noqa: BLE001 - nobody reads a traceback here; exiting releases the process
            log("%s; no dump: %s: %s" % (crash.sentence(), type(error).__name__, error), 3)
            return 1
        self.copy_modules()
        return 0

    def run(self) -> None:
        """Handle the crash; raises Refused or OSError if no dump is kept."""
        try:
            self.prepare()
            directory = self.open_watch_directory()
            self.let_go(directory)
            from core_dump_helper.limits import Limits

            may_read = self.owns_proc() and self.settings.VITAL_BYTES > 0
            limits = Limits(self.crash, self.metadata, directory, self.settings, may_read)
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

    def warn(self, text: str) -> None:
        """Log a line once it is clear whether the crash is logged."""
        self.warnings.append(text)

    def log_warnings(self) -> None:
        """Log the warnings that were collected before it was clear whether the crash is logged."""
        for warning in self.warnings:
            log(warning)
        self.warnings = []

    def prepare(self) -> None:
        """Learn what is needed before the limits are checked."""
        self.load_settings()
        self.keep_pidfd()
        self.metadata, warning = read_metadata(self.crash)
        if warning:
            self.warn(warning)

    def load_settings(self) -> None:
        """Read helper.conf."""
        self.settings.load(self.crash.config or CONFIG, self.warn)
        set_alarm(self.settings.DEADLINE_SECONDS)

    def keep_pidfd(self) -> None:
        """Keep the kernel's pidfd from the compressor."""
        if not self.crash.pidfd:
            return
        try:
            os.set_inheritable(int(self.crash.pidfd), False)
        except (OSError, OverflowError) as error:
            self.warn("%s: cannot use pidfd %s: %s" % (self.crash, self.crash.pidfd, error))

    def open_watch_directory(self) -> int:
        """Return the watch directory's descriptor; log it if others can write there."""
        path = self.settings.WATCH_DIR
        directory = os.open(path, DIRECTORY)
        status = os.fstat(directory)
        if not is_private(status):
            self.warn("WATCH_DIR %a can be changed by others: chown it to root and chmod it to 0700" % path)
        return directory

    def dump(self, directory: int, limits: Limits) -> None:
        """Copy the core into the watch directory and publish it; raises Refused, OSError."""
        from core_dump_helper.corecopy import CoreCopy
        from core_dump_helper.disk import DiskWatch
        from core_dump_helper.dumpfile import publish

        suffix = "" if self.settings.COMPRESSOR == "none" else ".gz"
        try:
            keep = self.check(limits)
            if not self.held.was_let_go:
                self.held.open_files(directory, self.container())
            dump, name = self.create(directory, suffix)
            watch, copy = DiskWatch(dump, limits.disk), CoreCopy(self.held, self.settings, dump, keep)
            try:
                truncated = self.fill(dump, copy, watch)
            except Refused:
                os.unlink(name + ".partial", dir_fd=directory)
                raise
        except Refused as refused:
            limits.count(refused)
            refused.repeated = refused.repeated and not self.announced
            raise
        limits.release_slots()
        took_ms = int((time.monotonic() - self.started) * 1000)
        self.record_result(dump, copy, truncated, took_ms)
        if truncated == "compressor_failed":
            raise Refused("", "%s failed; %s.partial holds what it wrote" % (copy.writer.name, name))
        self.announce_modules(name)
        name = publish(directory, dump, name, self.crash, suffix)
        limits.count_vital(is_trimmed=bool(copy.trimmed))
        state, writer = describe(copy.trimmed, truncated), copy.writer
        result = (self.crash, name, state, writer.size, writer.name, took_ms)
        log("%s: %s is %s: %d bytes by %s in %d ms" % result, 6)
        watch.finish()

    def check(self, limits: Limits) -> Keep:
        """Return how much of the core is kept, once a slot is free; raises Refused."""
        from core_dump_helper.keep import Keep

        action = self.choose()
        return Keep(self.settings, action, limits.check(self.deadline(), self.held.close_files))

    def fill(self, dump: int, copy: CoreCopy, watch: DiskWatch) -> str:
        """Copy the core into the dump; return why it is truncated; raises Refused if there is nothing in it."""
        truncated = copy.run(watch, self.owns_proc(), self.announce)
        is_empty = not (copy.writer.size and os.fstat(dump).st_size)
        if is_empty and (truncated != "compressor_failed" or is_full(dump)):
            reason = "disk_full" if truncated in ("disk_full", "compressor_failed") else ""
            raise Refused(reason, "nothing was written: " + truncated)
        return truncated

    def announce_modules(self, name: str) -> None:
        """Tell the collector, before the dump is published, that a list of its files is coming."""
        try:
            if self.held.capture:
                self.held.capture.announce(name, self.metadata)
        except OSError as error:
            log("%s: its files are not copied: %s" % (self.crash, error))
            self.held.capture = None

    def copy_modules(self) -> None:
        """Become the program that copies the files behind the crash; return if that is not possible."""
        try:
            if self.held.capture:
                self.held.capture.hand_over()
        except (OSError, TypeError, ValueError) as error:  # Python may not know its own path
            log("%s: its files are not copied: %s" % (self.crash, error))

    def choose(self) -> str:
        """Return the action that RULES choose for this crash, or an empty string; raises Refused if it is `nothing`."""
        if not self.settings.RULES:
            return ""
        from core_dump_helper.keep import NOTHING
        from core_dump_helper.rules import choose, needs_runtime

        known = dict(self.metadata)
        if needs_runtime(self.settings.RULES):
            self.held.read_runtime_file(self.container())
            known.update(self.identify(self.held.runtime) if self.held.runtime else {})
        action = choose(self.settings.RULES, known)
        if action == NOTHING:
            raise Refused("rule", "RULES keep nothing of it")
        return action

    def create(self, directory: int, suffix: str) -> tuple[int, str]:
        """Return the dump's descriptor and its name; raises Refused if it cannot be created."""
        from core_dump_helper.dumpfile import ATTRIBUTE_SPACE, IDENTITY_SPACE, create_partial, set_attributes

        try:
            dump, name = create_partial(directory, self.crash, suffix)
            space = ATTRIBUTE_SPACE - (IDENTITY_SPACE if self.held.runtime else 0)
            set_attributes(dump, self.metadata, space)
        except OSError as error:
            reason = "disk_full" if error.errno in DISK_FULL else "directory"
            raise Refused(reason, "cannot create the dump: %s" % error.strerror) from error
        return dump, name

    def let_go(self, directory: int) -> None:
        """Release a small process at once."""
        self.held.let_go(directory, self.container(), self.owns_proc())

    def container(self) -> bytes:
        """Return the ID of the container, or nothing."""
        return self.metadata.get("container_id", b"")

    def deadline(self) -> float:
        """Return when to stop waiting for the core or a slot, monotonic."""
        return self.started + self.settings.DEADLINE_SECONDS

    def owns_proc(self) -> bool:
        """Return whether /proc/PID is known to belong to the process that crashed."""
        return bool(self.crash.pid) and self.metadata.get("sensitive") != b"identity"

    def record_result(self, dump: int, copy: CoreCopy, truncated: str, took_ms: int) -> None:
        """Set the attributes that are known only now; mark a truncated dump even where it has no attributes."""
        from core_dump_helper import VERSION
        from core_dump_helper.dumpfile import IDENTITY_SPACE, RESULT_SPACE, set_attributes

        result = {
            "bytes": str(copy.writer.size),
            "expected_bytes": str(copy.expected or ""),
            "truncated": truncated,
            "compressor": copy.writer.name,
            "duration_ms": str(took_ms),
            "helper_version": VERSION,
        }
        attributes = {name: value.encode() for name, value in result.items() if value}
        if self.held.runtime:
            set_attributes(dump, self.identify(self.held.runtime), IDENTITY_SPACE)
        if not set_attributes(dump, attributes, RESULT_SPACE) and truncated:
            os.fchmod(dump, 0o1600)  # the collector reads the sticky bit as "truncated"

    def identify(self, file: RuntimeFile) -> dict[str, bytes]:
        """Return the attributes that identify the container, or none."""
        try:
            from core_dump_helper.runtime import identify

            return identify(file)
        except Exception as error:  # noqa: BLE001 - it must not cost the dump
            log("%s: cannot use what its container runtime says: %s" % (self.crash, error))
            return {}


def describe(trimmed: str, truncated: str) -> str:
    """Return the state of a dump for the log."""
    if trimmed and truncated == "max_dump_bytes":
        return "trimmed (%s)" % trimmed
    return "truncated (%s)" % truncated if truncated else "complete"


def is_full(descriptor: int) -> bool:
    """Return whether a file system has no room for one more piece of a core."""
    space = os.fstatvfs(descriptor)
    return space.f_bavail * space.f_frsize < CHUNK

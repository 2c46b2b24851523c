"""Owns one crash, from the kernel's arguments to the published file: limits, metadata, streaming."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms
import os
import time

from core_dump_helper.compress import open_sink
from core_dump_helper.core import Reader, elf_length
from core_dump_helper.naming import create, publish
from core_dump_helper.process import describe, set_attributes
from core_dump_helper.settings import CONFIG, Settings, parse_arguments
from core_dump_helper.state import State
from core_dump_helper.system import DIRECTORY, Refused, log, read_file, write_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.compress import Child, Raw, Stream

LOOK_AROUND = 32 << 20  # bytes between two looks at the disk and the page cache


class Handler:
    """One crash, from its arguments to the published file."""

    def __init__(self, argv: list[str], core: int) -> None:
        """Read arguments, configuration and metadata; `core` is the descriptor to read from."""
        self.started = time.monotonic()
        self.core = core
        self.crash = parse_arguments(argv)
        log("pid %(P)s: dump of %(e)a, signal %(s)s, has begun" % self.crash, 6)
        self.config = self.crash.get("C") or CONFIG
        self.settings = Settings(self.config)
        _signal.alarm(self.settings.DEADLINE_SECONDS + 30)  # whatever hangs, even in /proc, ends here
        self.admit_until = self.started + self.settings.DEADLINE_SECONDS
        if self.crash["F"]:
            try:
                os.set_inheritable(int(self.crash["F"]), False)
            except (OSError, OverflowError) as error:
                log("pidfd %s: %s" % (self.crash["F"], error))
        self.known = describe(self.crash)
        if self.settings.CGROUP:
            self.join_cgroup(self.settings.CGROUP)

    def join_cgroup(self, path: str) -> None:
        """Leave the root cgroup for the prepared one, and keep the buffer below half of its memory."""
        try:
            write_file(path + "/cgroup.procs", b"0")
        except OSError as error:
            log("CGROUP %a: %s" % (path, error.strerror))
        for name in ("/memory.max", "/memory.limit_in_bytes"):  # version 2, version 1
            try:
                limit = read_file(path + name, 32).strip()
            except OSError:
                continue
            if limit.isdigit():
                self.settings.BUFFER_BYTES = min(self.settings.BUFFER_BYTES, int(limit) // 2)

    def run(self) -> None:
        """Admit, stream, publish; raises Refused, OSError."""
        if self.crash["s"] in self.settings.IGNORE_SIGNALS.replace(",", " ").split():
            raise Refused("", "IGNORE_SIGNALS")
        directory = os.open(self.settings.WATCH_DIR, DIRECTORY)
        status = os.fstat(directory)
        if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            log("WATCH_DIR %a can be changed by others: chown root, chmod 0700" % self.settings.WATCH_DIR)
        state = None
        try:
            state = State(directory)
        except OSError as error:
            log("neither RATE_LIMIT nor MAX_CONCURRENT hold: .helper: %s" % error.strerror)
        try:
            self.admit(directory, state)
        except Refused as refused:
            if state and refused.args[0] != "rate_limit":
                state.tally(self.known, refused.args[0], 0, 600)
            raise
        self.take(directory)

    def admit(self, directory: int, state: State | None) -> None:
        """Raise Refused when a limit forbids the dump."""
        if self.settings.RESPECT_RLIMIT == "yes" and self.crash["c"] == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        space = os.fstatvfs(directory)
        reason = self.disk_limit(directory) or ("inodes" if space.f_files and space.f_favail < 100 else "")
        if reason:
            raise Refused(reason, "the disk is too full for another dump")
        most, _, seconds = self.settings.RATE_LIMIT.partition("/")
        if state and seconds and not state.tally(self.known, "rate_limit", int(most), int(seconds)):
            raise Refused("rate_limit", "enough of this executable, container and signal")
        slots = self.settings.MAX_CONCURRENT
        if state and slots and not state.take_slot(slots, self.admit_until):
            raise Refused("no_slot", "MAX_CONCURRENT others ran all the time")

    def disk_limit(self, directory: int) -> str:
        """Return which limit of the disk is met, or nothing."""
        space = os.fstatvfs(directory)
        if space.f_bavail * 100 < self.settings.KEEP_FREE_PERCENT * space.f_blocks:
            return "keep_free"
        held = 0
        for name in os.listdir(directory) if self.settings.MAX_TOTAL_BYTES else ():
            try:
                held += os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:  # the collector was faster
                pass
        return "max_total_bytes" if held > self.settings.MAX_TOTAL_BYTES else ""

    def take(self, directory: int) -> None:
        """Stream the core into the watch directory and publish it."""
        suffix = "" if self.settings.COMPRESSOR == "none" else ".gz"
        dump, name = create(directory, self.crash, suffix)
        set_attributes(dump, self.known)
        sink = open_sink(dump, self.settings, self.config)
        reason, expected = self.stream(sink, directory, dump)
        if not sink.size and reason != "compressor_failed":
            os.unlink(name + ".partial", dir_fd=directory)
            raise Refused("", "nothing was read: " + reason)
        took = (time.monotonic() - self.started) * 1000
        result = {"bytes": sink.size, "expected_bytes": expected or "", "truncated": reason}
        result.update(compressor=sink.name, duration_ms=int(took))
        told = set_attributes(dump, {k: str(v).encode() for k, v in result.items() if v != ""}, 600)
        if reason and not told:
            os.fchmod(dump, 0o1600)  # the collector reads the sticky bit as "truncated"
        if reason == "compressor_failed":
            raise Refused("", "%s failed; what it wrote is in %s.partial" % (sink.name, name))
        name = publish(directory, dump, name, self.crash, suffix)
        words = (
            self.crash["P"],
            name,
            sink.size,
            sink.name,
            took,
            ", truncated: " + reason if reason else "",
        )
        log("pid %s: %s: %d bytes by %s in %d ms%s" % words, 6)

    def stream(self, sink: Raw | Stream | Child, directory: int, dump: int) -> tuple[str, int]:
        """Move the core into the sink; return why it is not whole (or nothing) and the length it should have."""
        reader = Reader(self.core, self.settings, time.monotonic() + self.settings.DEADLINE_SECONDS)
        _signal.alarm(self.settings.DEADLINE_SECONDS + 30)  # anew: waiting for a slot shortens no dump
        head, wanted, expected, looked, failure, released = bytearray(), 64, 0, 0, "", False
        for piece in reader.chunks():
            if reader.ended and not released:  # nobody waits for the rest: give way to others
                released = True
                os.setpriority(*sink.priority, 9)
            if failure:
                continue
            if len(head) < wanted:
                head += piece
                wanted, expected = elf_length(head)
            sink.in_a_hurry = reader.is_full
            try:
                sink.write(piece)
            except OSError as error:
                log("pid %s: %s: %s" % (self.crash["P"], sink.name, error))
                failure = "disk_full"
            if sink.size - looked >= LOOK_AROUND:
                looked = sink.size
                os.posix_fadvise(dump, 0, 0, os.POSIX_FADV_DONTNEED)
                failure = failure or self.disk_limit(directory)
            if failure:
                reader.stop(failure)
        _signal.alarm(self.settings.DEADLINE_SECONDS + 30)
        try:
            failed = sink.close()
        except OSError as error:  # no room for the end of the file either
            log("pid %s: %s: %s" % (self.crash["P"], sink.name, error))
            failed = "compressor_failed"
        if expected and sink.size >= expected:
            return failed, expected
        return failed or failure or reader.reason or ("killed" if wanted else "not_elf"), expected

"""Owns copying one core from the kernel's pipe into the dump: the vital part of a large core first, then the rest."""

from __future__ import annotations

import os
import time

from core_dump_helper.compress import COMPRESSORS, IN_PROCESS, start_writer
from core_dump_helper.core import Memory, Reader
from core_dump_helper.dumpfile import FRAMES_SPACE, RESULT_SPACE, set_attributes
from core_dump_helper.length import LARGE_BYTES, LengthCheck
from core_dump_helper.settings import CONFIG
from core_dump_helper.system import NICE, Refused, log, set_alarm

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_helper.compress import GzipWriter, PigzWriter, SparseWriter
    from core_dump_helper.disk import DiskWatch
    from core_dump_helper.held import Held
    from core_dump_helper.keep import Keep
    from core_dump_helper.settings import Settings
    from core_dump_helper.vitalpart import VitalPart

    Writer = GzipWriter | PigzWriter | SparseWriter

MIN_VITAL_BYTES = 4 << 20
"""Allowed for the vital part, however little memory is available."""


class CoreCopy:
    """Copies one core into a dump."""

    def __init__(self, held: Held, settings: Settings, dump: int, keep: Keep) -> None:
        """Store the held process, the descriptor `dump` to write to, and how much of the core is kept."""
        self.crash, self.settings, self.dump = held.crash, settings, dump
        self._held, self._keep = held, keep
        self._may_read_memory = False
        self.trimmed = ""
        """Why the dump is trimmed."""
        self.expected = 0
        """Bytes that a whole core has; 0 if unknown."""
        self.writer: Writer
        self._failure = ""
        self._small = bytearray()
        """The bytes of a small core that were read."""

    def run(self, watch: DiskWatch, may_read_memory: bool, announce: Callable[[], None]) -> str:
        """Copy the core; return why the dump is truncated, or an empty string.

        Args:
            watch: looks at the disk.
            may_read_memory: whether /proc/PID belongs to the process that crashed.
            announce: called as soon as a compressor writes.

        Raises:
            Refused: no compressor can write, or the core must be trimmed and cannot be.
        """
        keep = self._keep
        reader = self._make_reader(may_read_memory)
        set_alarm(self.settings.DEADLINE_SECONDS)  # the wait for a slot must not shorten the dump
        vital = reader.start(self._held.head)
        if keep.required and not vital and (reader.is_large or not keep.from_bytes):
            reader.stop("refused")
            raise Refused(keep.refusal, "its core cannot be trimmed")
        self.writer = self._start_writer(0, IN_PROCESS if vital else COMPRESSORS)
        announce()
        if vital:
            self.trimmed = vital.trimmed
            self._write_vital(vital)
        elif reader.is_large:
            set_attributes(self.dump, {"vital": b"none"}, RESULT_SPACE)
        length = LengthCheck(vital.length if vital else 0)
        self._copy(reader, watch, length, vital)
        set_alarm(self.settings.DEADLINE_SECONDS)
        failed = self._close()
        self.expected = length.expected
        incomplete = length.verdict(self.writer.size)
        cut = failed or (incomplete and (self._failure or reader.reason or incomplete))
        if vital and vital.was_killed:
            return cut or "killed"
        return cut or ("max_dump_bytes" if self.trimmed else "")

    def _make_reader(self, may_read_memory: bool) -> Reader:
        """Return the reader of the core, and note whether it may read the memory of the process."""
        deadline, keep = time.monotonic() + self.settings.DEADLINE_SECONDS, self._keep
        self._may_read_memory = may_read_memory and self.settings.VITAL_BYTES > 0
        prepare = self._prepare if self._may_read_memory or keep.required else None
        if not self._held.was_let_go:
            self._held.look(may_read_memory, deadline)
        reader = Reader(self._held.core, self.settings, Memory(self.settings), deadline, prepare)
        reader.prepare_from = keep.from_bytes
        reader.stop(self._held.reason)
        return reader

    def _copy(self, reader: Reader, watch: DiskWatch, length: LengthCheck, vital: VitalPart | None) -> None:
        """Copy the pieces of the reader, until a failure."""
        writer, released = self.writer, False
        for piece in reader.chunks():
            if reader.ended and not released:  # the crashed process waits for nothing more
                released = True
                os.setpriority(*writer.priority, NICE)
                self._find_frames(vital, None)
            if self._held.code and not reader.is_large and len(self._small) < LARGE_BYTES:
                self._small += piece
            if not self._failure:
                length.feed(piece)
                writer.parallel = reader.is_full
                self._failure = self._write(piece) or watch.check(writer.size)
            if self._failure:
                reader.stop(self._failure)
        self._find_frames(vital, self._small)

    def _find_frames(self, vital: VitalPart | None, small: bytearray | None) -> None:
        """Set the attributes with the thread's frames, once its memory is known; a failure costs only them."""
        opened = self._held.code
        if opened is None or (vital is None and small is None):
            return
        self._held.code = None
        try:
            from core_dump_helper.backtrace import find_frames

            core = vital.origin if vital else small or b""
            if core is None:
                raise ValueError("its memory is not kept")
            set_attributes(self.dump, find_frames(self.crash, core, opened), FRAMES_SPACE)
        except (ImportError, ValueError) as error:
            log("%s: its frames are not known: %s" % (self.crash, error))
            opened.close()

    def _prepare(self, head: bytearray, read: Callable[[int], bool]) -> VitalPart | None:
        """Return the vital part of a large core, or None if it does not come first."""
        try:
            from core_dump_helper.vitalpart import prepare
        except ImportError as error:
            log("%s: its vital part does not come first: %s" % (self.crash, error))
            return None
        share = max(MIN_VITAL_BYTES, Memory(self.settings).vital_bytes())
        limit = min(self.settings.VITAL_BYTES, share) if self._may_read_memory else 0
        self._keep.memory_bytes = share
        vital = prepare(head, read, self.crash, limit, self._keep)
        if vital:
            self._held.open_code(vital.code_spans)
        return vital

    def _write_vital(self, vital: VitalPart) -> None:
        """Write the vital part as a gzip member of its own, and start the writer of everything else.

        pigz writes only the rest: it cannot tell when a member has ended.
        """
        for piece in vital.pieces:
            self._failure = self._write(piece)
            if self._failure:
                break
        is_member = self.writer.name != "none"
        if is_member and not self._failure:
            self._failure = self._close()
        if self._failure:
            set_attributes(self.dump, {"vital": b"partial"}, RESULT_SPACE)
            return
        attributes = {"vital": vital.state.encode()}
        if vital.trimmed:
            attributes["trimmed"] = vital.trimmed.encode()
            attributes["dropped_bytes"] = b"%d" % vital.dropped_bytes
        if is_member and vital.state != "none":
            attributes.update(self._describe_member())
        set_attributes(self.dump, attributes, RESULT_SPACE)
        if is_member:
            try:
                self.writer = self._start_writer(
                    self.writer.size, IN_PROCESS if vital.trimmed else COMPRESSORS
                )
            except Refused as refused:
                log("%s: its dump ends with the vital part: %s" % (self.crash, refused))
                self._failure = "disk_full"

    def _describe_member(self) -> dict[str, bytes]:
        """Return the attributes of the gzip member that ends here, or none if it cannot be read."""
        try:
            from core_dump_helper.vitalpart import file_crc32

            size = os.lseek(self.dump, 0, os.SEEK_CUR)
            return {"vital_bytes": b"%d" % size, "vital_crc32": b"%d" % file_crc32(self.dump, size)}
        except (OSError, EOFError, ImportError) as error:
            log("%s: no checksum of its vital part: %s" % (self.crash, error))
            return {}

    def _start_writer(self, before: int, only: tuple[str, ...] = COMPRESSORS) -> Writer:
        return start_writer(self.dump, self.settings, self.crash.config or CONFIG, before, only)

    def _write(self, piece: memoryview) -> str:
        """Write a piece; return the reason if it cannot be written."""
        try:
            self.writer.write(piece)
        except OSError as error:
            log("%s: cannot write with %s: %s" % (self.crash, self.writer.name, error))
            return "disk_full"
        return ""

    def _close(self) -> str:
        """End the gzip member; return the reason if that fails, for example because its last bytes do not fit."""
        try:
            return self.writer.close()
        except OSError as error:
            log("%s: cannot end the dump with %s: %s" % (self.crash, self.writer.name, error))
            return "compressor_failed"

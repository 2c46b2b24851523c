"""Owns the data and files of the crashed process that are taken while it is held, and the early release of a small one.

A core that fits into the pipe needs no reader: the process ends as soon as the pipe is large enough. Every file
that the helper needs of it must be open by then; work that can wait is imported and done after it.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from _struct import iter_unpack

from core_dump_helper.crash import open_files
from core_dump_helper.length import LARGE_BYTES, ElfHeader, elf_length
from core_dump_helper.system import CHUNK, NEW_FILE, NICE, enlarge_pipe, exists, open_own

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_helper.crash import Crash, OpenedFiles
    from core_dump_helper.modules import Capture
    from core_dump_helper.runtime import RuntimeFile
    from core_dump_helper.settings import Settings

HEAD_BYTES, MAX_HEAD_BYTES = 4 << 10, 32 << 10
"""Read before the pipe is enlarged: the program headers of 72 mappings, and of 580 if that is not enough."""
HEAD_SECONDS = 0.5
"""The kernel writes the headers at once; without them after so long, the limits are checked first."""
MOVE_SECONDS = 10
"""The kernel writes the rest of a small core as fast as it is read."""
MAX_FILES = 96
"""Opened behind the code of a process; each takes about 10 us of the time for which it is held."""
MODULES = ".modules"
MAX_RELEASED = 64
"""Helpers at one time that run although their process is gone. Without a limit, a crash loop could have any number of
them: processes that are held count for RLIMIT_NPROC, and helpers do not."""
RELEASED = "released"
"""In `.helper`: a file of which each of these helpers locks a byte."""
PF_X = 1


class Held:
    """The first bytes of the core, and the open files of the process and its container."""

    def __init__(self, crash: Crash, core: int, settings: Settings, warn: Callable[[str], None]) -> None:
        """Store the crash, the descriptor to read the core from, the settings, and the function that logs a failure."""
        self.crash, self.core, self._settings, self._warn = crash, core, settings, warn
        self.head = b""
        self.reason = ""
        """Why reading has ended early."""
        self.was_let_go = False
        """Whether the process is released, because its whole core fits into the pipe."""
        self.code: OpenedFiles | None = None
        """The files behind the code of a small process."""
        self.capture: Capture | None = None
        """The files behind the crash, which are copied after the dump."""
        self.runtime: RuntimeFile | None = None
        """The container runtime's file about the container."""
        self._needed, self._length = HEAD_BYTES, 0

    def let_go(self, watch: int, container: bytes, owns_proc: bool) -> None:
        """If all of the core fits into the pipe, open the files and release the process.

        Args:
            watch: the watch directory.
            container: its ID, or nothing.
            owns_proc: whether /proc/PID belongs to the process that crashed.
        """
        if self._is_small() and self._count(watch):
            self._open_all(watch, container, owns_proc)
            enlarge_pipe(self.core)
            os.setpriority(os.PRIO_PROCESS, 0, NICE)  # others may still hold their processes

    def _count(self, watch: int) -> bool:
        """Lock a byte of `released` until this process ends; return False if all are locked, or none can be."""
        try:
            state = open_own(".helper", watch)
            try:
                released = os.open(RELEASED, NEW_FILE, 0o600, dir_fd=state)
            finally:
                os.close(state)
        except OSError:
            return False
        for place in range(MAX_RELEASED):
            try:
                fcntl.lockf(released, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                continue
            return True
        os.close(released)
        return False

    def read_small(self, watch: int, container: bytes, owns_proc: bool) -> bool:
        """Do the same for a core that comes over a socket: read it into a pipe, because a socket has less room.

        Returns:
            Whether the process is released.
        """
        if not (self._is_small() and self._count(watch)):
            return False
        reading, writing = os.pipe()
        try:
            if not enlarge_pipe(writing):
                os.close(reading)
                return False
            self._open_all(watch, container, owns_proc)
            self._move(writing)
        finally:
            os.close(writing)
        os.close(self.core)
        self.core = reading
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        return True

    def _is_small(self) -> bool:
        self._read_head(time.monotonic() + HEAD_SECONDS)
        return 0 < self._length <= min(self._settings.MAX_DUMP_BYTES or CHUNK, CHUNK)

    def _open_all(self, watch: int, container: bytes, owns_proc: bool) -> None:
        self.open_files(watch, container)
        self.look(owns_proc, 0)
        self.was_let_go = True

    def _move(self, pipe: int) -> None:
        """Read the rest of a small core into a pipe with room for it; bytes that take too long are missing."""
        left, end = self._length - len(self.head), time.monotonic() + MOVE_SECONDS
        poll = select.poll()
        poll.register(self.core, select.POLLIN)
        while left > 0 and time.monotonic() < end:
            if not poll.poll(100):
                continue
            block = os.read(self.core, left)
            if not block:
                return
            left -= os.write(pipe, block)

    def open_files(self, watch: int, container: bytes) -> None:
        """Open the files behind the crash and read that of the container runtime; no failure costs the dump."""
        self._open_modules(watch)
        self.read_runtime_file(container)

    def look(self, owns_proc: bool, deadline: float) -> None:
        """Read the first bytes of the core; if it is small, open the files behind the code of its process.

        Those of a large process are chosen with its vital part. `deadline` ends the reading, monotonic.
        """
        if not self._read_head(deadline):
            self.reason = "deadline"
        if owns_proc and 0 < self._length < LARGE_BYTES:
            self.open_code(lambda: code_spans(self.head))

    def _read_head(self, end: float) -> bool:
        """Read the program headers within the first MAX_HEAD_BYTES; return False at `end`."""
        poll = select.poll()
        poll.register(self.core, select.POLLIN)
        while len(self.head) < self._needed and not self.reason:
            if not poll.poll(100):
                if time.monotonic() > end:
                    return False
                continue
            try:
                block = os.read(self.core, self._needed - len(self.head))
            except OSError:
                self.reason = "read_error"
                return True
            self.head += block
            needed, self._length = elf_length(self.head)
            self._needed = min(needed, MAX_HEAD_BYTES) if block else 0
        return True

    def close_files(self) -> None:
        """Close the files of a process that is gone, so that their file systems can be unmounted."""
        if self.code or self.capture:
            self._warn("%s: waits long for a slot; its files are not kept" % self.crash)
        if self.code:
            self.code.close()
        if self.capture:
            self.capture.close()
        self.code = self.capture = None

    def _open_modules(self, watch: int) -> None:
        """Open the files behind the crash, if somebody takes them."""
        if self._settings.MODULES != "yes" or self.crash.process < 0:
            return
        try:
            if exists(MODULES, watch):
                from core_dump_helper import modules

                self.capture = modules.start(self.crash, watch)
        except FileNotFoundError:  # no collector that takes them
            pass
        except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
            self._warn("%s: its files are not copied: %s" % (self.crash, error))

    def read_runtime_file(self, container: bytes) -> None:
        """Read the container runtime's file about the container, once; it is parsed when the process is released."""
        if not container or self.runtime:
            return
        try:
            from core_dump_helper.runtime import read_runtime_file

            self.runtime = read_runtime_file(container)
        except Exception as error:  # noqa: BLE001 - it must not cost the dump
            self._warn("%s: cannot read what its container runtime says: %s" % (self.crash, error))

    def open_code(self, find_spans: Callable[[], list[tuple[int, int]]]) -> None:
        """Open the files behind the code of the process, from which its frames are found later."""
        try:
            spans = find_spans()
            if spans:
                self.code = open_files(self.crash, spans[:MAX_FILES])
        except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
            self._warn("%s: the files behind its code cannot be opened: %s" % (self.crash, error))


def code_spans(head: bytes) -> list[tuple[int, int]]:
    """Return start and end of each executable segment whose program header is in the first bytes of a core."""
    header = ElfHeader(head)
    end = header.table + min(header.rows, (len(head) - header.table) // header.row_bytes) * header.row_bytes
    rows = iter_unpack("=4xI8xQ16xQ8x" if header.row_bytes == 56 else "=8xI8xII4x", head[header.table : end])
    if header.row_bytes == 56:
        return [(start, start + size) for flags, start, size in rows if flags & PF_X]
    return [(start, start + size) for start, size, flags in rows if flags & PF_X]

"""Owns the compressors: this process, pigz, or none."""

from __future__ import annotations

import os
import select
import struct
import sys
import time
from _queue import SimpleQueue
from _thread import start_new_thread

from core_dump_helper.settings import calibration_path
from core_dump_helper.system import Refused, check_owner, enlarge, log, read_file, write_all

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from core_dump_helper.settings import Settings

PIGZ = ("/usr/bin/pigz", "/usr/local/bin/pigz")
SYNC_FLUSH, FULL_FLUSH = 2, 3


class Raw:
    """Keeps the core as it is; runs of zeros become holes."""

    name = "none"
    priority = (os.PRIO_PROCESS, 0)
    in_a_hurry = False

    def __init__(self, dump: int) -> None:
        """Write to the descriptor `dump`."""
        self._dump, self.size = dump, 0

    def write(self, piece: memoryview) -> None:
        """Take the next piece; raises OSError."""
        if any(piece[:64]) or piece != bytes(len(piece)):
            write_all(self._dump, piece)
        self.size = os.lseek(self._dump, self.size + len(piece), os.SEEK_SET)

    def close(self) -> str:
        """End the file; return why it is not valid, or nothing."""
        os.ftruncate(self._dump, self.size)
        return ""


class Stream:
    """Compresses in this process. Each piece ends on a byte, so that what is on disk can always be ended properly."""

    priority = (os.PRIO_PROCESS, 0)
    in_a_hurry = False
    """Set while the crashed process waits for the compressor: then half of each piece goes to a second thread."""

    def __init__(self, dump: int, name: str, settings: Settings) -> None:
        """Write gzip to the descriptor `dump` with `isal` or the standard library; raises ImportError, OSError."""
        level = settings.LEVEL
        if name == "isal":
            if settings.PYTHON_PATH:
                check_owner(settings.PYTHON_PATH)
                sys.path.append(settings.PYTHON_PATH)
            from isal import isal_zlib as codec

            level = min(level, 3)
        else:
            import zlib as codec  # type: ignore[no-redef]
        self.name, self.size, self._dump, self._codec, self._sum, self._end = name, 0, dump, codec, 0, 10
        self._new_deflate: Callable[[], Any] = lambda: codec.compressobj(level, 8, -15)
        self._deflate = self._new_deflate()
        self._may_start, self._started = len(os.sched_getaffinity(0)) > 1, False
        self._given: SimpleQueue[memoryview] = SimpleQueue()
        self._done: SimpleQueue[list[bytes]] = SimpleQueue()
        write_all(dump, b"\x1f\x8b\x08\0\0\0\0\0\0\xff")

    def write(self, piece: memoryview) -> None:
        """Compress the next piece; raises OSError."""
        if self.in_a_hurry and self._has_second_thread():
            blocks = self._compress_halves(piece[: len(piece) // 2], piece[len(piece) // 2 :])
        else:
            blocks = [self._deflate.compress(piece), self._deflate.flush(SYNC_FLUSH)]
        for block in blocks:  # joining them would copy them
            write_all(self._dump, block)
        self._sum = self._codec.crc32(piece, self._sum)
        self.size += len(piece)
        self._end += sum(map(len, blocks))

    def _has_second_thread(self) -> bool:
        """Start it with the first call; False where there is no other core or no thread to be had."""
        if self._may_start:
            self._may_start = False
            try:
                start_new_thread(self._compress_second_halves, ())
            except RuntimeError:
                return False
            self._started = True
        return self._started

    def _compress_halves(self, first: memoryview, second: memoryview) -> list[bytes]:
        """Compress both at the same time; neither refers to anything before it once it is flushed fully."""
        self._given.put(second)
        blocks = [self._deflate.compress(first), self._deflate.flush(FULL_FLUSH)]
        others = self._done.get()
        if not others:
            raise MemoryError("the second thread failed")
        return blocks + others

    def _compress_second_halves(self) -> None:
        deflate = None
        while True:
            second = self._given.get()
            try:
                deflate = deflate or self._new_deflate()
                self._done.put([deflate.compress(second), deflate.flush(FULL_FLUSH)])
            except Exception:  # noqa: BLE001 - whatever it is, the first thread waits for an answer
                self._done.put([])

    def close(self) -> str:
        """End the file after the last whole piece: an empty last block, CRC and length (RFC 1952)."""
        os.ftruncate(self._dump, self._end)
        os.lseek(self._dump, self._end, os.SEEK_SET)
        write_all(self._dump, b"\x03\0" + struct.pack("<II", self._sum, self.size & 0xFFFFFFFF))
        return ""


class Child:
    """Compresses in a pigz process, which writes to the file itself."""

    name = "pigz"
    in_a_hurry = False  # it always is

    def __init__(self, dump: int, settings: Settings) -> None:
        """Start pigz; raises OSError when it cannot be."""
        program = next((path for path in PIGZ if os.access(path, os.X_OK)), "no pigz")
        self.size, self._patience = 0, min(60, settings.DEADLINE_SECONDS)
        source, self._pipe = os.pipe()
        told, tell = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.setpgid(0, 0)
                os.dup2(source, 0)
                os.dup2(dump, 1)
                os.execve(program, ["pigz", "-c", "-%d" % settings.LEVEL], {"PATH": "/usr/bin:/bin"})  # noqa: S606
            finally:
                os.write(tell, b"!")
                os._exit(127)
        os.close(source)
        os.close(tell)
        failed = os.read(told, 1)  # exec closes the other end
        os.close(told)
        if failed:
            os.close(self._pipe)
            os.waitpid(self._pid, 0)
            raise OSError(8, "cannot start %s" % program)
        self.priority = (os.PRIO_PGRP, self._pid)
        enlarge(self._pipe)
        os.set_blocking(self._pipe, False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLOUT)

    def write(self, piece: memoryview) -> None:
        """Hand the next piece to pigz; raises OSError when it died or takes nothing."""
        view = piece
        while len(view):
            if not self._poll.poll(self._patience * 1000):
                os.kill(self._pid, 9)
                raise TimeoutError("takes nothing for %d s" % self._patience)
            view = view[os.write(self._pipe, view) :]
        self.size += len(piece)

    def close(self) -> str:
        """Wait for pigz to end; return `compressor_failed` unless it said that all is well."""
        os.close(self._pipe)
        end, pause = time.monotonic() + self._patience, 0.0005
        while True:
            done, status = os.waitpid(self._pid, os.WNOHANG)
            if done:
                return "compressor_failed" if status else ""
            if time.monotonic() > end:
                os.kill(self._pid, 9)
            time.sleep(pause)
            pause = min(0.05, pause * 2)


def open_sink(dump: int, settings: Settings, config: str) -> Raw | Stream | Child:
    """Start the configured compressor, else the next that works."""
    choice = settings.COMPRESSOR
    if choice == "none":
        return Raw(dump)
    if choice == "auto":
        try:
            check_owner(calibration_path(config))
            choice = read_file(calibration_path(config), 64).decode("ascii", "replace").strip()
        except OSError:
            pass
    order = ["pigz", "isal", "gzip"]
    for name in [choice, *order] if choice in order else order:
        try:
            return Child(dump, settings) if name == "pigz" else Stream(dump, name, settings)
        except (OSError, ImportError) as error:
            if name == choice:
                log("%s does not work: %s" % (name, error))
    raise Refused("directory", "no compressor can write")

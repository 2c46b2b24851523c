"""Owns the writers, which put the core into the dump: gzip by this process, gzip by pigz, or uncompressed."""

from __future__ import annotations

import os
import select
import sys
import time
from _queue import SimpleQueue
from _struct import pack
from _thread import start_new_thread

from core_dump_helper.settings import calibration_path
from core_dump_helper.system import (
    CHUNK,
    DISK_FULL,
    Refused,
    check_owner,
    enlarge_pipe,
    log,
    read_file,
    write_all,
)

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from typing import Any

    from core_dump_helper.settings import Settings

PIGZ = ("/usr/bin/pigz", "/usr/local/bin/pigz")
COMPRESSORS = ("pigz", "isal", "gzip")
"""In the order in which they are tried."""
IN_PROCESS = ("isal", "gzip")
"""Those that this process runs itself, so that it knows when a gzip member has ended."""
MAX_ISAL_LEVEL = 3
MAX_PATIENCE_SECONDS = 60
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
EMPTY_LAST_BLOCK = b"\x03\0"
RAW_DEFLATE = -15
DEFLATED, SYNC_FLUSH, FULL_FLUSH = 8, 2, 3


class SparseWriter:
    """Writes the core as it is; runs of zeros become holes."""

    name = "none"
    priority = (os.PRIO_PROCESS, 0)
    parallel = False

    def __init__(self, dump: int) -> None:
        """Store the descriptor `dump`."""
        self._dump, self.size = dump, 0
        self._zeros = bytearray()

    def start(self) -> None:
        """Prepare to recognise zeros; nothing precedes the core."""
        self._zeros = bytearray(CHUNK)

    def write(self, piece: memoryview) -> None:
        """Write the next piece; raises OSError."""
        zeros = self._zeros if len(piece) == CHUNK else bytearray(len(piece))
        if zeros != piece:  # a bytearray on the left compares memory; a memoryview compares item by item
            write_all(self._dump, piece)
        self.size = os.lseek(self._dump, self.size + len(piece), os.SEEK_SET)

    def close(self) -> str:
        """Give the file its length, which may end in a hole; return why it is not valid, or an empty string."""
        os.ftruncate(self._dump, self.size)
        return ""


class GzipWriter:
    """Compresses one gzip member in this process, with isal or zlib.

    Each piece is flushed to a whole byte, so that a dump which is cut short can always be ended properly.
    """

    priority = (os.PRIO_PROCESS, 0)
    parallel = False
    """Set while the crashed process waits for the compressor: half of each piece then goes to a second thread."""

    def __init__(self, dump: int, name: str, settings: Settings, before: int = 0) -> None:
        """Store the descriptor `dump`, the name, `isal` or `gzip`, and the core's bytes in earlier members."""
        self.name, self.size = name, before
        self._dump, self._settings, self._level, self._before = dump, settings, settings.LEVEL, before
        self._crc, self._end = 0, 0
        self._codec: Any = None
        self._deflate: Any = None
        self._zeros, self._zeros_deflated = bytearray(), b""
        self._may_start, self._started = True, False
        self._halves: SimpleQueue[memoryview] = SimpleQueue()
        self._blocks: SimpleQueue[list[bytes]] = SimpleQueue()

    def start(self) -> None:
        """Load the compressor and write the gzip header; raises ImportError, OSError."""
        if self.name == "isal":
            path = self._settings.PYTHON_PATH
            if path:
                check_owner(path)
                sys.path.append(path)
            from isal import isal_zlib as codec

            self._level = min(self._level, MAX_ISAL_LEVEL)
        else:
            import zlib as codec  # type: ignore[no-redef]
        self._codec = codec
        self._deflate = self._new_deflate()
        if self.name == "gzip":
            self._zeros = bytearray(CHUNK)
        self._may_start = len(os.sched_getaffinity(0)) > 1
        self._end = os.lseek(self._dump, 0, os.SEEK_CUR) + len(GZIP_HEADER)
        write_all(self._dump, GZIP_HEADER)

    def _new_deflate(self) -> Any:  # noqa: ANN401 - zlib and isal share no type
        return self._codec.compressobj(self._level, DEFLATED, RAW_DEFLATE)

    def write(self, piece: memoryview) -> None:
        """Compress the next piece; raises OSError, MemoryError."""
        if self._zeros == piece:
            blocks = [self._deflate_zeros()]
        elif self.parallel and self._has_second_thread():
            blocks = self._compress_halves(piece[: len(piece) // 2], piece[len(piece) // 2 :])
        else:
            blocks = [self._deflate.compress(piece), self._deflate.flush(SYNC_FLUSH)]
        for block in blocks:  # joining them would copy them
            write_all(self._dump, block)
        self._crc = self._codec.crc32(piece, self._crc)
        self.size += len(piece)
        self._end += sum(map(len, blocks))

    def _deflate_zeros(self) -> bytes:
        """Return a chunk of zeros, compressed once; later data does not refer to earlier data.

        zlib takes 0.9 ms for it. isal takes no longer than the kernel's pipe.
        """
        self._deflate = self._new_deflate()
        if not self._zeros_deflated:
            self._zeros_deflated = self._deflate.compress(self._zeros) + self._deflate.flush(FULL_FLUSH)
        return self._zeros_deflated

    def _has_second_thread(self) -> bool:
        """Start the second thread at the first call; return False without a second CPU or thread."""
        if self._may_start:
            self._may_start = False
            try:
                start_new_thread(self._compress_second_halves, ())
            except RuntimeError:
                return False
            self._started = True
        return self._started

    def _compress_halves(self, first: memoryview, second: memoryview) -> list[bytes]:
        """Compress both halves at the same time; after a full flush, neither refers to earlier data."""
        self._halves.put(second)
        blocks = [self._deflate.compress(first), self._deflate.flush(FULL_FLUSH)]
        others = self._blocks.get()
        if not others:
            raise MemoryError("the second thread failed")
        return blocks + others

    def _compress_second_halves(self) -> None:
        deflate = None
        while True:
            second = self._halves.get()
            try:
                deflate = deflate or self._new_deflate()
                self._blocks.put([deflate.compress(second), deflate.flush(FULL_FLUSH)])
            except Exception:  # noqa: BLE001 - the first thread waits for an answer, whatever failed
                self._blocks.put([])

    def close(self) -> str:
        """End the file after the last whole piece: an empty last block, CRC-32 and length (RFC 1952)."""
        os.ftruncate(self._dump, self._end)
        os.lseek(self._dump, self._end, os.SEEK_SET)
        write_all(
            self._dump, EMPTY_LAST_BLOCK + pack("<II", self._crc, self.size - self._before & 0xFFFFFFFF)
        )
        return ""


class PigzWriter:
    """Compresses in a pigz process, which writes to the dump itself."""

    name = "pigz"
    parallel = False
    """Has no effect: pigz always uses every CPU."""

    def __init__(self, dump: int, settings: Settings, before: int = 0) -> None:
        """Store the descriptor `dump`, and the core's bytes in earlier members."""
        self.size, self.priority = before, (os.PRIO_PROCESS, 0)
        self._dump, self._level = dump, settings.LEVEL
        self._patience = min(MAX_PATIENCE_SECONDS, settings.DEADLINE_SECONDS)
        self._pid = self._pipe = -1
        self._poll = select.poll()

    def start(self) -> None:
        """Start pigz; raises OSError if it cannot be started."""
        program = next((path for path in PIGZ if os.access(path, os.X_OK)), "no pigz")
        source, self._pipe = os.pipe()
        failure, report = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            self._exec(program, source, report)
        os.close(source)
        os.close(report)
        failed = os.read(failure, 1)  # exec closes the other end
        os.close(failure)
        if failed:
            os.close(self._pipe)
            os.waitpid(self._pid, 0)
            raise OSError(8, "cannot start %s" % program)
        self.priority = (os.PRIO_PGRP, self._pid)
        enlarge_pipe(self._pipe)
        os.set_blocking(self._pipe, False)
        self._poll.register(self._pipe, select.POLLOUT)

    def _exec(self, program: str, source: int, report: int) -> None:
        """Become pigz, in a process group of its own; otherwise report it and end."""
        try:
            os.setpgid(0, 0)
            os.dup2(source, 0)
            os.dup2(self._dump, 1)
            os.execve(program, ["pigz", "-c", "-%d" % self._level], {"PATH": "/usr/bin:/bin"})  # noqa: S606
        finally:
            os.write(report, b"!")
            os._exit(127)

    def write(self, piece: memoryview) -> None:
        """Pass the next piece to pigz; raises OSError if pigz died or reads nothing for too long."""
        view = piece
        while len(view):
            if not self._poll.poll(self._patience * 1000):
                os.kill(self._pid, 9)
                raise TimeoutError("pigz has read nothing for %d s" % self._patience)
            view = view[os.write(self._pipe, view) :]
        self.size += len(piece)

    def close(self) -> str:
        """Wait for pigz to end; return `compressor_failed` unless it reported success."""
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


def make_writer(
    name: str, dump: int, settings: Settings, before: int = 0
) -> SparseWriter | GzipWriter | PigzWriter:
    """Return the writer of a compressor, not started; `before` bytes of the core are in earlier members."""
    if name == "none":
        return SparseWriter(dump)
    return PigzWriter(dump, settings, before) if name == "pigz" else GzipWriter(dump, name, settings, before)


def start_writer(
    dump: int, settings: Settings, config: str, before: int = 0, only: tuple[str, ...] = COMPRESSORS
) -> SparseWriter | GzipWriter | PigzWriter:
    """Start the configured compressor, or the next one of `only` that works; raises Refused if none does."""
    choice = settings.COMPRESSOR if settings.COMPRESSOR != "auto" else fastest_compressor(config)
    names = [name for name in only if name != choice]
    if choice in (*only, "none"):
        names.insert(0, choice)
    reason = "directory"
    for name in names:
        writer = make_writer(name, dump, settings, before)
        try:
            writer.start()
        except (OSError, ImportError) as error:
            if name == choice:
                log("%s does not work: %s" % (name, error))
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                reason = "disk_full"
        else:
            return writer
    raise Refused(reason, "no compressor can write")


def fastest_compressor(config: str) -> str:
    """Return the compressor that `--calibrate` found fastest, or an empty string if it did not run."""
    path = calibration_path(config)
    try:
        check_owner(path)
        name = read_file(path, 64).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return name if name in COMPRESSORS else ""

"""Owns the way of a dump to a file: parallel ranged GETs, resumed, verified, decompressed sparsely, then named.

Until all is verified the bytes lie under names of their own beside the target: `.NAME.MARK.download` (the object,
with a list of the parts that are there) and `.NAME.MARK.core` (what came out of it). An object is data: its length
is held against the listing, its CRC-32 against the sidecar's, what comes out against what the core's headers promise.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from core_dump_format.core import read_core
from core_dump_format.crc32 import encode_crc32
from core_dump_format.elf import NotACoreError
from core_dump_format.stream import Forward
from core_dump_format.text import printable
from core_dumps.errors import CliError, RefusedError
from core_dumps.parts import BLOCK, FETCHERS, PART_BYTES, identify, most_bytes, read_part, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

HOLE = 64 * 1024
"""Runs of zeros of at least this length, aligned, become holes."""
_ZEROS = bytes(HOLE)
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


class Progress(Protocol):
    """Hears how far it is."""

    def start(self, what: str, total_bytes: int | None) -> None:
        """Begin a stage."""

    def advance(self, count: int) -> None:
        """Count bytes of the stage."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A dump on this machine."""

    path: str
    size_bytes: int
    verified: tuple[str, ...]
    """What was proven of it."""
    warning: str | None = None


def default_name(dump: Dump, *, compressed: bool) -> str:
    """Return the name a dump is saved under: the last part of its key, safe for any directory."""
    name = _UNSAFE.sub("_", dump.key.rpartition("/")[2])[-200:].lstrip(".-") or "core"
    return name if compressed else name.removesuffix(".gz")


def fetch(  # noqa: PLR0913  what, to where, how
    bucket: Bucket, dump: Dump, target: str, progress: Progress, *, keep_compressed: bool, force: bool
) -> Fetched:
    """Bring a dump to `target`, which exists only when all of it was verified.

    Raises:
        RefusedError: the object is not what it claims.
        CliError: it cannot be read or written.
    """
    if not force and os.path.lexists(target):
        raise CliError(f"{printable(target)} exists: --force replaces it, -o FILE names another")
    directory, name = os.path.split(os.path.abspath(target))
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return _Fetch(bucket, dump, folder, name, progress).run(target, keep=keep_compressed, force=force)
        finally:
            os.close(folder)
    except OSError as error:
        raise CliError(f"{printable(target)}: {error.strerror}") from error


class _Fetch:
    """One dump, one directory."""

    def __init__(self, bucket: Bucket, dump: Dump, folder: int, name: str, progress: Progress) -> None:
        self._bucket, self._dump, self._folder, self._name = bucket, dump, folder, name
        self._progress = progress
        self._size = dump.size_bytes or 0
        self._etag, self._remote_crc = identify(bucket, dump)
        mark = sha256(f"{bucket.name}/{dump.key}/{self._etag}".encode()).hexdigest()[:12]
        self._download, self._core = f".{name[:200]}.{mark}.download", f".{name[:200]}.{mark}.core"
        self._verified: list[str] = []

    def run(self, target: str, *, keep: bool, force: bool) -> Fetched:
        with self._private(self._download) as file:
            self._load(file)
            self._check_crc(file)
            if keep or not self._dump.compressed:
                warning = None if keep else self._check_raw(file)
                ready, size = self._download, self._size
                os.fsync(file)
            else:
                size, warning = self._unpack(file)
                ready = self._core
        self._publish(ready, force=force)
        for leftover in (self._download, self._download + ".parts"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover, dir_fd=self._folder)
        return Fetched(target, size, tuple(self._verified), warning)

    @contextlib.contextmanager
    def _private(self, name: str, extra: int = 0) -> Iterator[int]:
        """Open a file of ours for reading and writing; never another's, never through a link."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | extra
        descriptor = os.open(name, flags, 0o600, dir_fd=self._folder)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
                raise CliError(f"{printable(name)} is in the way: remove it")
            yield descriptor
        finally:
            os.close(descriptor)

    def _load(self, file: int) -> None:
        """Load the parts that are not there yet. A part is noted once it is written, so a kill costs a part."""
        count = -(-self._size // PART_BYTES)
        with self._private(self._download + ".parts", os.O_APPEND) as notes:
            noted = os.pread(notes, 64 * 1024 * 1024, 0).split(b"\n")[:-1]
            there = {int(n) for n in noted if n.isdigit()} if os.fstat(file).st_size == self._size else set()
            missing = [number for number in range(count) if number not in there]
            os.ftruncate(notes, os.fstat(notes).st_size if there else 0)
            if shutil.disk_usage(self._folder).free < len(missing) * PART_BYTES // 2:
                raise CliError("not enough free space for this dump")
            os.ftruncate(file, self._size)
            self._progress.start("download", self._size)
            self._progress.advance(max(0, self._size - len(missing) * PART_BYTES))
            with ThreadPoolExecutor(FETCHERS) as pool:
                futures = [pool.submit(self._part, file, notes, number) for number in missing]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _part(self, file: int, notes: int, number: int) -> None:
        at = number * PART_BYTES
        for piece in read_part(self._bucket, self._dump, self._etag, number):
            _write(file, piece, at)
            at += len(piece)
            self._progress.advance(len(piece))
        os.write(notes, b"%d\n" % number)

    def _check_crc(self, file: int) -> None:
        expected = self._dump.text("crc32") or self._remote_crc
        if expected is None:
            return
        self._progress.start("verify", self._size)
        crc = 0
        for piece in self._pieces(file):
            crc = zlib.crc32(piece, crc)
        found = encode_crc32(crc)
        if found != expected:
            for name in (self._download, self._download + ".parts"):
                os.unlink(name, dir_fd=self._folder)
            raise RefusedError(f"CRC-32 is {found}, but {printable(expected)} was uploaded: not kept")
        self._verified.append("CRC-32")

    def _pieces(self, file: int) -> Iterator[bytes]:
        at = 0
        while piece := os.pread(file, BLOCK, at):
            at += len(piece)
            self._progress.advance(len(piece))
            yield piece

    def _unpack(self, file: int) -> tuple[int, str | None]:
        """Decompress into a sparse file; return its length and a warning."""
        pieces = self._pieces(file)
        first = self._promise(unpack(self._pieces(file)))
        limit = most_bytes(self._dump, first)
        self._progress.start("decompress", self._size)
        with self._private(self._core, os.O_TRUNC) as core:
            size = _write_sparse(core, self._bounded(unpack(pieces), limit))
            os.ftruncate(core, size)
            warning = self._check_length(first, size)
            os.fsync(core)
        return size, warning

    def _bounded(self, pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
        total = 0
        for piece in pieces:
            total += len(piece)
            if total > limit:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._core, dir_fd=self._folder)
                raise RefusedError(
                    f"more comes out of it than the {limit} bytes that it promises: not unpacked"
                )
            yield piece

    def _promise(self, pieces: Iterator[bytes]) -> int | None:
        self._progress.start("look", None)
        try:
            return read_core(Forward.over(pieces, 64 * 1024 * 1024)).expected_bytes
        except NotACoreError:
            return None

    def _check_raw(self, file: int) -> str | None:
        return self._check_length(self._promise(self._pieces(file)), self._size)

    def _check_length(self, promise: int | None, size: int) -> str | None:
        told = self._dump.number("bytes")
        if told is not None and told != size:
            raise RefusedError(f"{size} bytes came out of it, but {told} were dumped: not kept")
        if promise is None:
            return "this is no ELF core, so its length was not checked against its headers"
        if promise == size:
            self._verified.append("ELF length")
            return None
        return f"truncated: {size} of the {promise} bytes that its headers promise"

    def _publish(self, ready: str, *, force: bool) -> None:
        """Give the file its name; without force, only if nothing has it."""
        if force:
            os.rename(ready, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        else:
            os.link(
                ready, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False
            )
            os.unlink(ready, dir_fd=self._folder)
        os.fsync(self._folder)


def _write(file: int, piece: bytes | memoryview, at: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _write_sparse(file: int, pieces: Iterator[bytes]) -> int:
    """Write pieces, leaving aligned blocks of zeros out; return the length."""
    at, rest = 0, b""
    for piece in pieces:
        block = rest + piece
        whole = len(block) // HOLE * HOLE
        view = memoryview(block)
        for offset in range(0, whole, HOLE):
            if view[offset : offset + HOLE] != _ZEROS:
                _write(file, view[offset : offset + HOLE], at + offset)
        at, rest = at + whole, block[whole:]
    _write(file, rest, at)
    return at + len(rest)

"""Owns the way of a dump to a file: parallel ranged GETs, resumed, verified, decompressed sparsely, then named.

An object is data: its length is compared with the listing, its CRC-32 with that in the metadata, its decompressed
length with the core's headers. The target exists only when everything was verified.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from core_dump_format.core import read_core
from core_dump_format.crc32 import encode_crc32
from core_dump_format.elf import NotACoreError
from core_dump_format.stream import Forward
from core_dump_format.text import printable
from core_dumps.addressorder import AddressOrder
from core_dumps.errors import CliError, InterruptedByUserError, RefusedError
from core_dumps.parts import BLOCK_BYTES, FETCHERS, PART_BYTES, Remote, most_bytes, open_remote, unpack
from core_dumps.pool import Pool
from core_dumps.show import size as sized
from core_dumps.sparse import write_sparse
from core_dumps.workfile import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_format.core import Core
    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

NOTE_BYTES = 256 * 1024
"""So much of a part is lost at most when a download is interrupted."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


class Progress(Protocol):
    """Is told about the progress of a download."""

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
    """The properties that were compared with what the collector recorded."""
    warning: str | None = None


def default_name(dump: Dump, *, compressed: bool) -> str:
    """Return the name under which a dump is saved: the last part of its key, safe for any directory."""
    name = _UNSAFE.sub("_", dump.key.rpartition("/")[2])[-200:].lstrip(".-") or "core"
    return name if compressed else name.removesuffix(".gz")


def fetch(  # noqa: PLR0913  object, target and manner
    bucket: Bucket, dump: Dump, target: str, progress: Progress, *, keep_compressed: bool, force: bool
) -> Fetched:
    """Download a dump to `target`.

    Raises:
        RefusedError: the object differs from what was uploaded; nothing of it is kept.
        CliError: it cannot be read or written; the next call resumes.
    """
    if not force and os.path.lexists(target):
        raise CliError(f"{printable(target)} exists: --force replaces it, -o FILE names another")
    directory, name = os.path.split(os.path.abspath(target))
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            remote = open_remote(bucket, dump)
            with Work(folder, name, remote) as work:
                download = _Download(remote, work, folder, progress, unpacked=not keep_compressed)
                return download.run(target, name, force=force)
        finally:
            os.close(folder)
    except KeyboardInterrupt:
        raise InterruptedByUserError("interrupted: the same command continues the download") from None
    except OSError as error:
        raise CliError(f"{printable(target)}: {error.strerror}") from error


class _Download:
    """One dump on its way to one directory."""

    def __init__(
        self, remote: Remote, work: Work, folder: int, progress: Progress, *, unpacked: bool
    ) -> None:
        self._remote, self._dump, self._work, self._folder = remote, remote.dump, work, folder
        self._progress = progress
        self._size = remote.size_bytes
        self._is_core = unpacked
        self._unpacks = unpacked and remote.dump.compressed
        self._verified: list[str] = []

    def run(self, target: str, name: str, *, force: bool) -> Fetched:
        try:
            self._load()
            self._check_crc()
            size, warning = self._unpack() if self._unpacks else (self._size, self._check_raw())
            ready = self._work.core_name if self._unpacks else self._work.download_name
            if not self._unpacks:
                os.fsync(self._work.file)
            self._work.publish(ready, name, force=force)
        except RefusedError:
            self._work.remove()
            raise
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            self._work.remove()
            reason = "it is too long for a file" if error.errno == errno.EFBIG else "the disk is full"
            raise CliError(f"{printable(target)}: {reason}; nothing was kept") from error
        finally:
            self._work.remove_core()
        self._work.remove()
        return Fetched(target, size, tuple(self._verified), warning)

    def _load(self) -> None:
        """Load the bytes that are not there yet."""
        received = self._work.received(self._size)
        lengths = {
            number: min(PART_BYTES, self._size - number * PART_BYTES)
            for number in range(-(-self._size // PART_BYTES))
        }
        missing = [number for number, length in lengths.items() if received.get(number, 0) < length]
        there = sum(min(count, lengths.get(number, 0)) for number, count in received.items())
        self._check_space(self._size - there)
        self._progress.start("download", self._size)
        self._progress.advance(there)
        with Pool(FETCHERS) as pool:
            loads = [pool.submit(self._part, (number, received.get(number, 0))) for number in missing]
            for load in loads:
                load.result()

    def _check_space(self, missing_bytes: int) -> None:
        """Check the free space. What is decompressed takes at least as much as its object, except for zeros."""
        needed = missing_bytes + (self._size if self._unpacks else 0)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CliError(f"not enough space: at least {sized(needed)} are needed, {sized(free)} are free")

    def _part(self, part: tuple[int, int]) -> None:
        number, received = part
        first = number * PART_BYTES
        end = min(first + PART_BYTES, self._size)
        at = noted = first + received
        for piece in self._remote.read(at, end):
            if not self._work.write(piece, at):
                return
            at += len(piece)
            self._progress.advance(len(piece))
            if at - noted >= NOTE_BYTES or at == end:
                self._work.note(number, at - first)
                noted = at

    def _check_crc(self) -> None:
        expected = self._remote.crc32
        if expected is None:
            return
        self._progress.start("verify", self._size)
        crc = 0
        for piece in self._pieces():
            crc = zlib.crc32(piece, crc)
        found = encode_crc32(crc)
        if found != expected:
            raise RefusedError(f"its CRC-32 is {found}, but {printable(expected)} was uploaded: not kept")
        self._verified.append("CRC-32")

    def _pieces(self) -> Iterator[bytes]:
        at = 0
        while piece := os.pread(self._work.file, BLOCK_BYTES, at):
            at += len(piece)
            self._progress.advance(len(piece))
            yield piece

    def _unpack(self) -> tuple[int, str | None]:
        """Decompress into a sparse file; return its length and a warning."""
        front = self._front(unpack(self._pieces()))
        promise = front.expected_bytes if front else None
        # The headers of a trimmed dump promise only the memory that was kept, so such a dump counts as whole.
        is_whole = promise == self._dump.number("bytes")
        order = AddressOrder.of(front) if front and is_whole else None
        limit = most_bytes(self._dump, promise)
        self._progress.start("decompress", self._size)
        core = self._work.open_core()
        try:
            write = order.write if order else write_sparse
            size = write(core, _bounded(unpack(self._pieces()), limit))
            os.ftruncate(core, size)
            warning = self._check_length(promise, size)
            os.fsync(core)
        finally:
            os.close(core)
        return size, warning

    def _front(self, pieces: Iterator[bytes]) -> Core | None:
        """Read the headers and notes of the core; return None if this is not a core."""
        self._progress.start("headers", None)
        with contextlib.suppress(NotACoreError):
            return read_core(Forward.over(pieces, 64 * 1024 * 1024))
        return None

    def _check_raw(self) -> str | None:
        if not self._is_core:
            return None
        front = self._front(self._pieces())
        return self._check_length(front.expected_bytes if front else None, self._size)

    def _check_length(self, promise: int | None, size: int) -> str | None:
        recorded = self._dump.number("bytes")
        if recorded is not None and recorded != size:
            raise RefusedError(f"it has {size} bytes, but {recorded} were dumped: not kept")
        if promise is not None and promise != size:
            return f"truncated: it has {size} of the {promise} bytes that its headers promise"
        if promise is None and recorded is None:
            return "this is not an ELF core, so its length was not compared with its headers"
        self._verified.append("length" if promise is None else "ELF length")
        return None


def _bounded(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > limit:
            raise RefusedError(f"its content is longer than the {limit} bytes that it promises: not kept")
        yield piece

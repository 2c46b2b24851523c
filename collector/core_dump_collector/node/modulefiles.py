"""Owns `.modules/` in the watch directory: its files, and the receipts that connect a list with its dump's key.

The helper puts modules and lists there (docs/contracts.md, "The files behind a crash"). The directory is not used
unless only root and this user can write to it. Its files are opened as dumps are, without following a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Self

from core_dump_collector.node.dumpfile import open_regular
from core_dump_collector.node.ownership import is_private
from core_dump_format.modules import (
    COLLECTOR_MARK,
    DIRECTORY,
    MOST_LIST_BYTES,
    list_name,
    parse_list_name,
    parse_module_name,
)
from core_dump_format.names import PARTIAL_SUFFIX

if TYPE_CHECKING:
    from types import TracebackType

RECEIPT_SUFFIX = ".key"
MOST_ENTRIES = 20_000
"""Most entries of one scan; the next one sees others once some are gone."""
_MOST_RECEIPT_BYTES = 4096
_KEY = re.compile(r"[\x21-\x7e]{1,1024}")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class File(NamedTuple):
    """A regular file with one name."""

    name: str
    size_bytes: int
    modified_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The result of one scan; unknown names are left out and left alone."""

    modules: list[File] = field(default_factory=list)
    lists: dict[str, File] = field(default_factory=dict)
    """By name of the dump, as `receipts`."""
    receipts: dict[str, File] = field(default_factory=dict)
    partials: list[File] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Return the size of modules and lists."""
        return sum(file.size_bytes for file in [*self.modules, *self.lists.values()])


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a dump was stored."""

    bucket: str
    key: str


class ModuleFiles:
    """The open directory; a context manager.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be opened, or others than root and this user may have written to it.
    """

    def __init__(self, watch_directory: str, *, create: bool = False) -> None:
        """Open `.modules/`; create it first if `create` is set."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            parent = os.open(watch_directory, flags)
            stack.callback(os.close, parent)
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(DIRECTORY, 0o700, dir_fd=parent)
            self.fd = os.open(DIRECTORY, flags | os.O_NOFOLLOW, dir_fd=parent)
        if not is_private(os.fstat(self.fd)):
            os.close(self.fd)
            raise OSError(
                errno.EPERM, f"{DIRECTORY}/ is not this user's alone: remove it, or chown root and chmod 0700"
            )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the directory."""
        os.close(self.fd)

    def touch_mark(self) -> None:
        """Tell helpers that a collector takes modules."""
        fd = os.open(COLLECTOR_MARK, _FLAGS | os.O_CREAT, 0o600, dir_fd=self.fd)
        try:
            os.utime(fd)
        finally:
            os.close(fd)

    def scan(self) -> Contents:
        """Return the files that are there."""
        found = Contents()
        with os.scandir(self.fd) as entries:
            for entry in islice(entries, MOST_ENTRIES):
                self._add(found, entry.name)
        return found

    def _add(self, found: Contents, name: str) -> None:
        file = self.look(name)
        if file is None:
            return
        dump = parse_list_name(name)
        if name.endswith(PARTIAL_SUFFIX):
            found.partials.append(file)
        elif parse_module_name(name):
            found.modules.append(file)
        elif dump is not None:
            found.lists[dump] = file
        elif name.endswith(RECEIPT_SUFFIX):
            found.receipts[name.removesuffix(RECEIPT_SUFFIX)] = file

    def look(self, name: str) -> File | None:
        """Return the properties of a regular file that has one name; None if there is no such file."""
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return None
        return File(name, status.st_size, status.st_mtime)

    def expects_list(self, dump: str) -> bool:
        """Tell whether the list of a dump is there or is being written."""
        try:
            name = list_name(dump)
        except ValueError:
            return False
        # in this order: the first may become the second in between
        return self.look(name + PARTIAL_SUFFIX) is not None or self.look(name) is not None

    def open(self, name: str) -> int:
        """Open a regular file and return its descriptor.

        Raises:
            OSError: it is gone, or no regular file with one name.
        """
        opened = open_regular(self.fd, name)
        if opened is None:
            raise FileNotFoundError(errno.ENOENT, "not there, or no regular file", name)
        return opened[0]

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the content of a small file, cut after `most_bytes` + 1 bytes."""
        fd = self.open(name)
        try:
            content = b""
            while len(content) <= most_bytes and (piece := os.read(fd, most_bytes + 1 - len(content))):
                content += piece
            return content
        finally:
            os.close(fd)

    def read_list(self, dump: str) -> bytes:
        """Return the list of a dump, as it is."""
        return self.read(list_name(dump), MOST_LIST_BYTES)

    def remove(self, name: str, fd: int | None = None) -> bool:
        """Delete a file; return False if its name is gone, or does not belong to the open file any more."""
        with contextlib.suppress(OSError):
            if fd is not None:
                there = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
                if not os.path.samestat(there, os.fstat(fd)):
                    return False
            os.unlink(name, dir_fd=self.fd)
            return True
        return False

    def remove_abandoned(self, name: str) -> None:
        """Delete a partial file if its writer has ended, which releases the lock."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = self.open(name)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.remove(name, fd)

    def write_receipt(self, dump: str, receipt: Receipt) -> None:
        """Remember where a dump was stored; the file appears whole or not at all."""
        name = dump + RECEIPT_SUFFIX
        self.remove(name + PARTIAL_SUFFIX)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name + PARTIAL_SUFFIX, flags, 0o600, dir_fd=self.fd)
        content = json.dumps({"bucket": receipt.bucket, "key": receipt.key}).encode()
        try:
            if os.write(fd, content) < len(content):
                raise OSError(errno.ENOSPC, "the receipt was cut", name)
        finally:
            os.close(fd)
        os.rename(name + PARTIAL_SUFFIX, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def read_receipt(self, dump: str) -> Receipt | None:
        """Return where a dump was stored; None if there is no valid receipt."""
        try:
            content = json.loads(self.read(dump + RECEIPT_SUFFIX, _MOST_RECEIPT_BYTES))
            bucket, key = content["bucket"], content["key"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return None
        fit = isinstance(bucket, str) and isinstance(key, str) and _KEY.fullmatch(key)
        return Receipt(bucket, key) if fit else None


def note_stored(watch_directory: str, dump: str, receipt: Receipt) -> bool:
    """Leave a receipt for a dump that was stored; return False if no list of its modules is there or coming."""
    with contextlib.suppress(OSError), ModuleFiles(watch_directory) as files:
        if files.expects_list(dump):
            files.write_receipt(dump, receipt)
            return True
    return False


def clear(watch_directory: str) -> None:
    """Delete the mark and the files of a collector that took modules, and abandoned partial files."""
    with contextlib.suppress(OSError), ModuleFiles(watch_directory) as files:
        files.remove(COLLECTOR_MARK)
        found = files.scan()
        for file in [*found.modules, *found.lists.values(), *found.receipts.values()]:
            files.remove(file.name)
        for file in found.partials:
            files.remove_abandoned(file.name)

"""Owns which files a crashed process had mapped, and which of them may be read: regular, local, readable by all."""

from __future__ import annotations

import os
from stat import S_IROTH, S_ISREG

from core_dump_helper.mappings import unnamed_memory
from core_dump_helper.mounts import MAX_MOUNTS_BYTES, Mounts, device_numbers
from core_dump_helper.system import CHUNK, read_fields, read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ESCAPED_NEWLINE = b"\\012"


class Missing(Exception):  # noqa: N818 - an outcome, not an error
    """The file is not kept; the argument is one of MISSING_REASONS (core_dump_format.modules)."""


class Mapped:
    """One file of the crashed process: its lines in maps, and its descriptor."""

    def __init__(self, path: bytes, start: int, offset: int, device: bytes) -> None:
        """Store the first mapping."""
        self.path, self.start, self.end, self.offset, self.device = path, start, 0, offset, device
        self.executable = False
        self.descriptor: int | None = None
        """-1 if the file could not be opened, None if nobody tried."""

    def close(self) -> None:
        """Close the descriptor: as long as it is open, nobody can unmount the file system."""
        if self.descriptor is not None and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class HandOver:
    """The text that the helper wrote into `DUMP.json.partial` before it became this program."""

    def __init__(self, descriptor: int) -> None:
        """Read it; raises ValueError if it is damaged."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        content = b"".join(iter(lambda: os.read(descriptor, CHUNK), b""))
        name, self.origin, sensitive, opened, mounts, cut, self._maps = _split(content)
        self.dump, self.sensitive = name.decode("ascii"), sensitive.decode("ascii", "replace")
        self.is_cut = cut == b"1"
        """Whether the list of mappings ends early."""
        rows = [row.rpartition(b" ") for row in opened.split(b"\n") if row]
        self._descriptors = {key: int(number) for key, _, number in rows}
        self.mounts = Mounts(mounts)

    def files(self) -> list[Mapped]:
        """Return the files with executable pages, in the order of their addresses."""
        files: dict[bytes, Mapped] = {}
        for line in self._maps.split(b"\n")[:-1]:
            words = line.split(None, 5)
            if len(words) < 6 or words[4] == b"0":
                continue
            key = words[3] + b" " + words[4]
            start, _, end = words[0].partition(b"-")
            if key not in files:
                files[key] = Mapped(words[5], int(start, 16), int(words[2], 16), words[3])
            files[key].end = int(end, 16)
            files[key].executable |= b"x" in words[1]
        for key, file in files.items():
            file.descriptor = self._descriptors.get(key)
            if ESCAPED_NEWLINE in file.path and file.descriptor is not None and file.descriptor >= 0:
                file.path = os.readlink(b"/proc/self/fd/%d" % file.descriptor)
        return [file for file in files.values() if file.executable]


def _split(content: bytes) -> Iterator[bytes]:
    """Yield the parts, each of which follows its length and a newline."""
    at = 0
    while at < len(content):
        end = content.index(b"\n", at)
        size = int(content[at:end])
        yield content[end + 1 : end + 1 + size]
        at = end + 1 + size


class Judge:
    """Decides which files may be read, without asking a file system that may never answer."""

    def __init__(self, mounts: Mounts, limit: int) -> None:
        """Store the mounts of the crashed process, and how long a file may be (0 means no limit)."""
        self._mounts, self._limit = mounts, limit
        self._own: Mounts | None = None

    def check(self, file: Mapped) -> os.stat_result:
        """Return the status of a file that may be read; raises Missing."""
        local = self._mounts.is_local_device(file.device)
        if local is False:
            raise Missing("file_system")
        if file.descriptor is None:
            raise Missing("limit")
        if file.descriptor < 0:
            raise Missing("gone")
        if not local and not self._is_local(file.device, file.descriptor):
            raise Missing("file_system")
        status = os.fstat(file.descriptor)
        if not S_ISREG(status.st_mode):
            raise Missing("not_regular")
        if not status.st_mode & S_IROTH:
            raise Missing("not_readable")
        if self._limit and status.st_size > self._limit:
            raise Missing("too_large")
        return status

    def _is_local(self, device: bytes, descriptor: int) -> bool:
        """Return whether a file is local if its device is not among the process's mounts.

        Btrfs gives each subvolume a device of its own, and old kernels show the file below an overlay. A file system
        that was unmounted while the file was open is not known any more.
        """
        (number,) = read_fields("/proc/self/fdinfo/%d" % descriptor)[b"mnt_id"]
        local = self._mounts.is_local_mount(number)
        if local is None:
            if self._own is None:
                self._own = Mounts(read_file("/proc/self/mountinfo", MAX_MOUNTS_BYTES))
            local = self._own.is_local_device(device)
        if local is None:
            local = device_numbers(device) in unnamed_memory()
        return local

"""Owns which file systems may be asked for a page of the crashed process's memory.

The page of a file can be withdrawn between the look at it and its read. The read then waits for the file system; where
a program serves that (FUSE) and does not answer, no signal ends the wait. A process can mount such a file system, and
an overlay above it, in namespaces of its own; elsewhere that takes root.

A process that was forked has no page of a library before it uses it, not even the first one, which identifies the file.
Only a local file system is asked for such a page; an overlay only while no program serves a file system.
"""

from __future__ import annotations

import fcntl
import os
from errno import ENOTTY
from struct import Struct

from core_dump_helper.crash import shares_user_namespace
from core_dump_helper.mounts import LOCAL, MAX_MOUNTS_BYTES, device_numbers, parse_mounts
from core_dump_helper.system import read_all, read_file

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    Mount = tuple[bytes, bytes, bytes]

PROCMAP_QUERY = 0xC0686611
"""Since Linux 6.11; before that, the whole of /proc/PID/maps is read, which takes 1 ms for 1,000 mappings."""
QUERY = Struct("=9Q4I2Q")
"""struct procmap_query of <linux/fs.h>. Words 0 and 2 are its size and the address; 4, 9 and 10 end and device."""
MAX_MAPS_BYTES = 64 << 20
NO_FILE = 0, 0
STACKED = frozenset([b"overlay", b"aufs"])
"""They may lie above any other file system."""
SERVED = frozenset([b"fuse", b"fuseblk"])
"""Types in mountinfo, up to the first point."""


class Mappings:
    """The mappings of a process, by the devices of the files that are mapped."""

    def __init__(self, directory: int) -> None:
        """Open `maps` in the directory of a process or thread, which is kept; raises OSError."""
        self._maps = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        self._directory = os.dup(directory)
        self._lines: list[tuple[int, int, tuple[int, int]]] | None = None
        self._trusted = {NO_FILE}
        self._local: set[tuple[int, int]] = set()
        self._knows_mounts = False

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._maps)
        os.close(self._directory)

    def trusted_until(self, address: int) -> int:
        """Return the end of the mapping of no file, or of a file system that root has mounted; 0 for any other."""
        try:
            end, device = self._find(address)
        except (OSError, ValueError):  # nothing is mapped there
            return 0
        if device not in self._trusted:
            self._learn_mounts()
        return end if device in self._trusted else 0

    def local_until(self, address: int) -> int:
        """Return the end of the mapping of a file that a local file system holds; 0 for any other."""
        try:
            end, device = self._find(address)
        except (OSError, ValueError):  # nothing is mapped there
            return 0
        if device != NO_FILE:
            self._learn_mounts()
        return end if device in self._local else 0

    def _learn_mounts(self) -> None:
        """Read the mounts, once: those of a process in another user namespace than the helper do not count."""
        if self._knows_mounts:
            return
        self._knows_mounts = True
        mounts = read_mounts()
        if shares_user_namespace(self._directory):
            mounts += read_mounts("mountinfo", self._directory)
        self._trusted |= unnamed_memory() | mounted_devices(mounts)
        self._local = local_devices(mounts)

    def _find(self, address: int) -> tuple[int, tuple[int, int]]:
        """Return the end of a mapping and its device; without the query of new kernels the end may be too low."""
        if self._lines is None:
            query = bytearray(QUERY.pack(QUERY.size, 0, address, *[0] * 12))
            try:
                fcntl.ioctl(self._maps, PROCMAP_QUERY, query)
            except OSError as error:
                if error.errno != ENOTTY:
                    raise
                self._lines = list(_read_files(self._maps))
            else:
                found = QUERY.unpack(query)
                return found[4], (found[9], found[10])
        lines = ((end, device) for start, end, device in self._lines if start <= address < end)
        return next(lines, (address + 1, NO_FILE))


def _read_files(maps: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield start, end and device of each mapping of a file: proc_pid_maps(5)."""
    lines = read_all(maps, MAX_MAPS_BYTES).split(b"\n")  # the kernel escapes no other line end in a name
    for line in filter(None, lines):
        span, _, _, device, _ = line.split(None, 4)
        if device != b"00:00":
            start, end = span.split(b"-")
            yield int(start, 16), int(end, 16), device_numbers(device)


def read_mounts(path: str = "/proc/self/mountinfo", directory: int | None = None) -> list[Mount]:
    """Return the mounts of a namespace; raises OSError."""
    return list(parse_mounts(read_file(path, MAX_MOUNTS_BYTES, directory)))


def mounted_devices(mounts: list[Mount]) -> set[tuple[int, int]]:
    """Return the devices of all mounts except those of FUSE."""
    return {device_numbers(device, 10) for _, device, kind in mounts if not kind.startswith(b"fuse")}


def local_devices(mounts: list[Mount]) -> set[tuple[int, int]]:
    """Return the devices of the local file systems, which answer without any program."""
    is_served = any(kind.partition(b".")[0] in SERVED for _, _, kind in mounts)
    kinds = LOCAL - STACKED if is_served else LOCAL
    others = {device for _, device, kind in mounts if kind not in kinds}
    return {device_numbers(device, 10) for _, device, _ in mounts if device not in others}


def unnamed_memory() -> set[tuple[int, int]]:
    """Return the device of shared memory without a name, which is never mounted."""
    try:
        memory = os.memfd_create("")  # novm: Python 3.8
    except (AttributeError, OSError):
        return set()
    device = os.fstat(memory).st_dev
    os.close(memory)
    return {(os.major(device), os.minor(device))}

"""Owns which file systems may be asked for a page of the crashed process's memory.

The page of a file can be withdrawn between the look at it and its read. The read then waits for the file system; where
a program serves that (FUSE) and does not answer, no signal ends the wait. A process can mount such a file system, and
an overlay above it, in namespaces of its own; elsewhere that takes root.
"""

from __future__ import annotations

import fcntl
import os
from errno import ENOTTY
from struct import Struct

from core_dump_helper.crash import shares_user_namespace
from core_dump_helper.mounts import MAX_MOUNTS_BYTES, device_numbers, parse_mounts
from core_dump_helper.system import read_all, read_file

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

PROCMAP_QUERY = 0xC0686611
"""Since Linux 6.11; before that, the whole of /proc/PID/maps is read, which takes 1 ms for 1,000 mappings."""
QUERY = Struct("=9Q4I2Q")
"""struct procmap_query of <linux/fs.h>. Words 0 and 2 are its size and the address; 4, 9 and 10 end and device."""
MAX_MAPS_BYTES = 64 << 20
NO_FILE = 0, 0


class Mappings:
    """The mappings of a process, by the devices of the files that are mapped."""

    def __init__(self, directory: int) -> None:
        """Open `maps` in the directory of a process or thread, which is kept; raises OSError."""
        self._maps = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        self._directory = os.dup(directory)
        self._lines: list[tuple[int, int, tuple[int, int]]] | None = None
        self._trusted = {NO_FILE}
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
        if device not in self._trusted and not self._knows_mounts:
            self._knows_mounts = True
            self._trusted |= unnamed_memory() | mounted_devices() | self._own_devices()
        return end if device in self._trusted else 0

    def _own_devices(self) -> set[tuple[int, int]]:
        """Return the devices of the process's own mounts, unless it is in another user namespace than the helper."""
        if not shares_user_namespace(self._directory):
            return set()
        return mounted_devices("mountinfo", self._directory)

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


def mounted_devices(path: str = "/proc/self/mountinfo", directory: int | None = None) -> set[tuple[int, int]]:
    """Return the devices of all mounts in a namespace except those of FUSE."""
    mounts = parse_mounts(read_file(path, MAX_MOUNTS_BYTES, directory))
    return {device_numbers(device, 10) for _, device, kind in mounts if not kind.startswith(b"fuse")}


def unnamed_memory() -> set[tuple[int, int]]:
    """Return the device of shared memory without a name, which is never mounted."""
    try:
        memory = os.memfd_create("")  # novm: Python 3.8
    except (AttributeError, OSError):
        return set()
    device = os.fstat(memory).st_dev
    os.close(memory)
    return {(os.major(device), os.minor(device))}

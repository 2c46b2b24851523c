"""Owns reading the memory of the crashed process, which the kernel holds until its core is read."""

from __future__ import annotations

import os
from itertools import groupby

from core_dump_format.pages import Pages
from core_dump_helper.crash import is_identical
from core_dump_helper.mappings import Mappings
from core_dump_helper.system import read_fields, read_file

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_helper.crash import Crash

MAX_AUXV_BYTES = 4096
ENTRY_BYTES = 8
"""Of one page in /proc/PID/pagemap."""
MOST_OBTAINED_BYTES = 16 << 10
"""A read of at most so much may ask a local file system for pages."""
SURVEY_PAGES = 1 << 16
"""Whose entries are read at once."""
ABSENT, PRESENT, OF_FILE = range(3)
KINDS = bytes(ABSENT if flag < 0x40 else OF_FILE if flag & 0x20 else PRESENT for flag in range(256))
"""By the first byte of an entry: bit 63 or 62 is set for a page in memory or swap, bit 61 for one of a file."""


class ProcessMemory(Pages):
    """Reads /proc/PID/mem where /proc/PID/pagemap shows that a page is there, unless a read could wait for ever.

    Any other page may have to be fetched from a file, and a file system that the crashed process serves may never
    answer: no signal ends the wait of a thread in such a read. Single pages are fetched from local file systems.
    """

    def __init__(self, mem: int, pagemap: int, mappings: Mappings) -> None:
        """Store what to read with."""
        self.page = os.sysconf("SC_PAGESIZE")
        self.refused = 0
        """Pages that were not read, because their file system may never answer."""
        self._mem, self._pagemap, self._mappings = mem, pagemap, mappings
        self._known = 0, 0

    def close(self) -> None:
        """Close all descriptors."""
        os.close(self._mem)
        os.close(self._pagemap)
        self._mappings.close()

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, up to the first page that is absent or cannot be read."""
        first, last = self._known
        if not first <= address <= address + size <= last:
            page = self.page
            start, end = address // page * page, -(-(address + size) // page) * page
            parts = self.obtainable if size <= MOST_OBTAINED_BYTES else self.resident
            first, last = next(parts(start, end), (end, end))
        return self.fetch(address, min(size, last - address)) if first <= address < last else b""

    def fetch(self, address: int, size: int) -> bytes:
        """Return the memory at an address, up to the first page that cannot be read."""
        try:
            return os.pread(self._mem, size, address)
        except (OSError, OverflowError):  # an offset is a signed number of 64 bits
            return b""

    def resident(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range whose pages are in memory or swapped out.

        Other pages would be zeros, or would have to be fetched from a file. So would pages of a file (bit 61), if its
        file system withdraws them.

        Args:
            start: address of the first page.
            end: end of the last page.
        """
        for first, last, is_present in self.survey(start, end):
            if is_present:
                self._known = first, last
                yield first, last

    def obtainable(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that are resident, or whose pages a local file system has.

        Adjacent ones are one part: a structure may begin in an absent page and end in a resident one.
        """
        if list(self.resident(start, end)) == [(start, end)]:  # the usual case, which `read` then knows
            yield start, end
            return
        first = last = start
        for begin, stop, is_present in self.survey(start, end):
            for place, until in [(begin, stop)] if is_present else self._of_local_files(begin, stop):
                if place != last:
                    if first < last:
                        yield first, last
                    first = place
                last = until
        if first < last:
            yield first, last

    def _of_local_files(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that are mapped from files of local file systems."""
        at = start
        while at < end:
            stop = self._mappings.local_until(at)
            if stop:
                yield at, min(end, stop)
            at = stop or at + self.page

    def survey(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of a range, and whether their pages are in memory or swapped out, as far as that is known.

        Pages of a file that may not be read are left out.
        """
        page = self.page
        while start < end:
            kinds = self._kinds(start, min(end, start + SURVEY_PAGES * page))
            if not kinds:
                return
            for kind, count in _runs(kinds):
                stop = start + count * page
                if kind == OF_FILE:
                    yield from self._trusted(start, stop)
                else:
                    yield start, stop, kind == PRESENT
                start = stop

    def _trusted(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of a range whose file system will answer; count the pages of others."""
        at = start
        while at < end:
            stop = min(end, self._mappings.trusted_until(at))
            if stop > at:
                yield at, stop, True
            else:
                self.refused += 1
                stop = at + self.page
            at = stop

    def _kinds(self, start: int, end: int) -> bytes:
        """Return ABSENT, PRESENT or OF_FILE for each page (proc_pid_pagemap(5)), as far as the kernel tells."""
        pages = (end - start) // self.page
        try:
            entries = os.pread(self._pagemap, pages * ENTRY_BYTES, start // self.page * ENTRY_BYTES)
        except (OSError, OverflowError):
            return b""
        from sys import byteorder

        return entries[ENTRY_BYTES - 1 if byteorder == "little" else 0 :: ENTRY_BYTES].translate(KINDS)


def _runs(kinds: bytes) -> Iterator[tuple[int, int]]:
    """Yield kind and length of successive pages of the same kind."""
    if kinds.count(kinds[:1]) == len(kinds):  # most of a large process
        yield kinds[0], len(kinds)
        return
    for kind, same in groupby(kinds):
        yield kind, sum(1 for _ in same)


def open_memory(crash: Crash, auxv: bytes) -> ProcessMemory:
    """Open the memory of the crashed process through one directory descriptor, then check that it is that process.

    The crashing thread's directory is used: that of the process has no memory once its main thread has ended.

    Args:
        crash: the kernel's arguments.
        auxv: the auxiliary vector in the core, which holds random addresses.

    Raises:
        OSError: it cannot be opened; `pagemap` needs a kernel with CONFIG_PROC_PAGE_MONITOR.
        ValueError: it belongs to another process.
    """
    task = "/proc/%d/task/%d" % (int(crash.pid), int(crash.tid or crash.pid))
    directory = os.open(task, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mem = os.open("mem", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        pagemap = os.open("pagemap", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        memory = ProcessMemory(mem, pagemap, Mappings(directory))
        found = read_file("auxv", MAX_AUXV_BYTES, directory)
        size = min(len(found), len(auxv))
        if (
            not size
            or found[:size] != auxv[:size]
            or not is_identical(crash, read_fields("status", directory))
        ):
            memory.close()
            raise ValueError("/proc/%s belongs to another process" % crash.pid)
    finally:
        os.close(directory)
    return memory

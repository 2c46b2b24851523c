"""Owns opening the files behind a crash while the kernel holds the process (docs/contracts.md).

Only what must happen then happens then: the list of mappings is read, and the files are opened with O_PATH, which
neither waits for a lease nor asks a file system. `modulecopy` reads the files once the process is released.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from _queue import Empty, SimpleQueue
from _thread import start_new_thread

from core_dump_helper.crash import memory_directory, shares_user_namespace
from core_dump_helper.mounts import Mounts
from core_dump_helper.system import (
    BLOCK,
    DIRECTORY,
    NEW_FILE,
    exists,
    is_own,
    is_private,
    log,
    read_file,
    write_all,
)

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_helper.crash import Crash

OPEN_SECONDS = 0.5
"""For reading the mappings and opening the files; files that are not open by then are left out."""
MAX_FILES = 900
"""The kernel starts helpers with a limit of 1,024 descriptors."""
SPARE_DESCRIPTORS = 100
"""Left for everything else where the limit is lower."""
MAX_MAPS_BYTES = 16 << 20
MAX_MOUNTS_BYTES = 4 << 20
DIRECTORY_NAME = ".modules"
STATE = "modules"
"""In `.helper`: the file of modulestate."""
MARK = "collector"
MARK_SECONDS = 24 * 3600
EXECUTABLE = ord("x")


def start(crash: Crash, watch: int) -> Capture:
    """Open the files behind a crash.

    Raises:
        FileNotFoundError: no collector takes modules.
        OSError, ValueError: `.modules` is not private, or the files cannot be opened.
    """
    directory = os.open(DIRECTORY_NAME, DIRECTORY, dir_fd=watch)
    capture = Capture(crash, watch, directory)
    try:
        check_directory(directory)
        capture.open_files()
    except BaseException:
        capture.close()
        raise
    return capture


def check_directory(directory: int) -> None:
    """Raise OSError unless `.modules` belongs to this user and a collector takes its files."""
    if not is_own(os.fstat(directory)):
        raise PermissionError(1, ".modules belongs to another user, or others may use it")
    mark = os.stat(MARK, dir_fd=directory, follow_symlinks=False)
    if abs(time.time() - mark.st_mtime) > MARK_SECONDS:
        raise FileNotFoundError(2, "no collector has taken modules for a day")


def remove_all(watch: int) -> bool:
    """Remove every module, and forget which files were copied; return whether there were any; raises OSError."""
    try:
        directory = os.open(DIRECTORY_NAME, DIRECTORY, dir_fd=watch)
    except FileNotFoundError:
        return False
    try:
        if not is_private(os.fstat(directory)):
            return False
        names = [name for name in os.listdir(directory) if name.startswith("module-")]
        for name in names:
            remove(name, directory)
    finally:
        os.close(directory)
    if names:
        remove(".helper/" + STATE, watch)
        log("%d modules were removed, because the disk has no room" % len(names))
    return bool(names)


def remove(name: str, directory: int) -> None:
    """Remove a file unless somebody else has done so."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def read_mounts(process: int) -> bytes:
    """Return the mounts of a process that root has mounted; raises OSError.

    In a user namespace of its own, a process can mount FUSE, and an overlay above it. Then the host's mounts count.
    """
    path = "mountinfo" if shares_user_namespace(process) else "/proc/self/mountinfo"
    return read_file(path, MAX_MOUNTS_BYTES, process)


def open_mapping(span: bytes, files: int) -> int:
    """Return the descriptor of the file that is mapped at `START-END`, or -1; `files` is /proc/PID/map_files."""
    start, _, end = span.partition(b"-")
    try:  # the names have no leading zeros, unlike maps
        return os.open(b"%x-%x" % (int(start, 16), int(end, 16)), os.O_PATH | os.O_CLOEXEC, dir_fd=files)
    except OSError:
        return -1


class Capture:
    """The files of one crash, from the mappings of the held process to the program that copies them."""

    def __init__(self, crash: Crash, watch: int, directory: int) -> None:
        """Store the crash, whose /proc/PID is open, and the descriptors of the watch directory and `.modules`."""
        self._crash, self._watch, self._directory = crash, watch, directory
        self._maps: list[bytes] = []
        self._mounts = b""
        self._is_whole = False
        self._descriptors: dict[bytes, int] = {}
        """Of the files that are open, by device and inode as in maps."""
        self._list = -1

    def open_files(self) -> None:
        """Open the files; raises OSError, ValueError.

        Those of file systems that are mounted where the process was are opened at once: a thread would wait for a
        CPU on a busy host. Others might be of a file server that never answers.
        """
        end = time.monotonic() + OPEN_SECONDS
        process = memory_directory(self._crash)
        self._mounts = read_mounts(process)
        mounts = Mounts(self._mounts)
        files = os.open("map_files", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
        others: dict[bytes, bytes] = {}
        most = min(MAX_FILES, os.sysconf("SC_OPEN_MAX") - SPARE_DESCRIPTORS)
        for line in self._read_maps(process, end):
            if line[line.find(b" ") + 3] != EXECUTABLE:
                continue
            span, _, _, device, inode = line.split(None, 5)[:5]
            key = device + b" " + inode
            if inode == b"0" or key in self._descriptors or len(self._descriptors) >= most:
                continue
            local = mounts.is_local_device(device)
            if local:
                self._descriptors[key] = open_mapping(span, files)
            elif local is None and len(others) < most:
                others.setdefault(key, span)
        if others:
            self._open_others(others, files, most)

    def _read_maps(self, process: int, end: float) -> Iterator[bytes]:
        """Yield the lines of /proc/PID/maps, and keep them, until `end` (monotonic)."""
        maps = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        rest, size = b"", 0
        while size < MAX_MAPS_BYTES and time.monotonic() < end:
            block = os.read(maps, BLOCK)
            if not block:
                self._is_whole = True
                break
            size += len(block)
            self._maps.append(block)
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            yield from lines
        os.close(maps)

    def _open_others(self, spans: dict[bytes, bytes], files: int, most: int) -> None:
        """Open mappings in a thread of its own; raises TimeoutError if that takes too long."""
        opened: SimpleQueue[tuple[bytes, int]] = SimpleQueue()
        end = time.monotonic() + OPEN_SECONDS

        def run() -> None:
            for key, span in spans.items():
                if time.monotonic() < end:
                    opened.put((key, open_mapping(span, files)))
            opened.put((b"", -1))

        start_new_thread(run, ())
        while len(self._descriptors) < most:
            try:
                key, descriptor = opened.get(True, 2 * OPEN_SECONDS)
            except Empty:
                raise TimeoutError(110, "a file system does not answer") from None
            if not key:
                break
            self._descriptors[key] = descriptor

    def announce(self, dump: str, metadata: dict[str, bytes]) -> None:
        """Create `DUMP.json.partial`, by which the collector knows that a list is coming; raises OSError."""
        name = dump + ".json"
        if exists(name, self._directory):
            raise FileExistsError(17, "there is a list with this name")
        self._list = os.open(
            name + ".partial", NEW_FILE | os.O_EXCL | os.O_APPEND, 0o600, dir_fd=self._directory
        )
        fcntl.flock(self._list, fcntl.LOCK_EX | fcntl.LOCK_NB)
        descriptors = b"\n".join(b"%s %d" % item for item in self._descriptors.items())
        origin, sensitive = (metadata.get(key, b"") for key in ("origin", "sensitive"))
        cut = b"%d" % (not self._is_whole)
        parts = (dump.encode(), origin, sensitive, descriptors, self._mounts, cut, b"".join(self._maps))
        try:
            for part in parts:
                write_all(self._list, b"%d\n" % len(part) + part)
        except OSError:
            os.unlink(name + ".partial", dir_fd=self._directory)
            raise

    def close(self) -> None:
        """Close everything: the files are not copied."""
        for descriptor in (self._directory, *self._descriptors.values()):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors = {}

    def hand_over(self) -> None:
        """Become the program that copies the files: it is small, and this one's locks are released.

        Raises:
            OSError: it cannot be started.
        """
        for descriptor in (self._list, self._watch, *self._descriptors.values()):
            if descriptor >= 0:
                fcntl.fcntl(descriptor, fcntl.F_SETFD, 0)
        numbers = [str(number) for number in (self._list, self._watch)]
        config = ["-C" + self._crash.config] if self._crash.config else []
        os.execv(sys.executable, [sys.executable, "-IS", sys.argv[0], "--copy-modules", *config, *numbers])  # noqa: S606

"""Owns what the other modules need of the system: the log, files, locks, what this process is."""

from __future__ import annotations

import fcntl
import os
import time

CHUNK = 1 << 20
SET_PIPE_SIZE = 1031
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(Exception):  # noqa: N818 - an outcome, not a fault
    """The dump is not taken: the reason that is counted (or nothing), and an explanation."""


def log(text: str, priority: int = 4) -> None:
    """Write one line to the kernel log, else to syslog, and to descriptor 2 (/dev/null under the kernel)."""
    line = ("core-dump-helper[%d]: %s" % (os.getpid(), text[:900])).encode("ascii", "backslashreplace")
    try:
        os.write(2, line + b"\n")
    except OSError:
        pass
    try:
        write_file("/dev/kmsg", b"<%d>%s\n" % (24 + priority, line))
    except OSError:
        try:
            import syslog

            syslog.syslog(syslog.LOG_DAEMON | priority, line.decode())
        except (ImportError, OSError):  # no descriptor is left for it: the dump matters more than the line
            pass


def write_file(path: str, data: bytes) -> None:
    """Write to a file of the kernel's."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_file(path: str, limit: int, directory: int | None = None) -> bytes:
    """Read at most `limit` bytes; never waits for a writer, follows no link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
    try:
        data = block = os.read(descriptor, limit)
        while block and len(data) < limit:
            block = os.read(descriptor, limit - len(data))
            data += block
        return data
    finally:
        os.close(descriptor)


def read_fields(path: str, directory: int | None = None) -> dict[bytes, list[bytes]]:
    """Read a file of `key: value` lines, as /proc/PID/status; the first of a kind wins."""
    lines = [line.partition(b":") for line in read_file(path, 8192, directory).split(b"\n")]
    return {key: value.split() for key, _, value in reversed(lines)}


def check_owner(path: str) -> None:
    """Raise PermissionError unless only root (or whoever runs this) can change what is at `path`."""
    status = os.stat(path)
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(1, "others than root may change it")


def exists(name: str, directory: int) -> bool:
    """Say whether a name is taken, by anything."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def lock(descriptor: int, seconds: float) -> bool:
    """Lock a file within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)


def enlarge(pipe: int) -> None:
    """Let a pipe hold 1 MiB, if it is a pipe: fewer switches between its two ends."""
    try:
        fcntl.fcntl(pipe, SET_PIPE_SIZE, CHUNK)
    except OSError:
        pass


def secure_process() -> int:
    """Give descriptors 0 to 2 a harmless meaning, become undumpable and humble; return the core's descriptor."""
    os.umask(0o077)
    core = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    try:
        null = os.open("/dev/null", os.O_RDWR)  # descriptor 1, when the kernel started us
        os.dup2(null, 0)
        for descriptor in (1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                os.dup2(null, descriptor)
        if os.geteuid() == 0:
            os.setegid(65534)  # a change of the effective gid sets "dumpable" to fs.suid_dumpable: prctl(2)
            os.setegid(0)
        write_file("/proc/self/oom_score_adj", b"500")
    except OSError as error:
        log("cannot prepare: %s" % error)
    return core

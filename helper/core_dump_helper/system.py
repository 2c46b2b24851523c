"""Owns the helper's use of the operating system: log, files, locks and the properties of its own process."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms
import fcntl
import os
import time

CHUNK = 1 << 20
BLOCK = 64 << 10
MAX_FIELDS_BYTES = 1 << 20
"""Of /proc/PID/status: 65,536 supplementary groups take up to 720,896 bytes."""
NICE = 9
"""Of a helper for which no process waits any more."""
SET_PIPE_SIZE = 1031
ALARM_SECONDS = 30
"""Beyond DEADLINE_SECONDS: then SIGALRM ends a helper that hangs, even in a read of /proc."""
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DISK_FULL = (28, 122)
"""ENOSPC and EDQUOT: `errno` would be one more module to import."""
PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-"
"""Bytes that stand for themselves in names and records."""


class Refused(Exception):  # noqa: N818 - an outcome, not an error
    """No dump is kept."""

    def __init__(self, reason: str, explanation: str, repeated: bool = False) -> None:
        """Store the reason that is counted (or an empty string) and an explanation for the log.

        A refusal is `repeated` if its window has had one that was logged: it is only counted.
        """
        super().__init__(reason, explanation)
        self.reason, self.repeated = reason, repeated

    def __str__(self) -> str:
        """Return both for the log."""
        return ": ".join(filter(None, self.args))


def log(text: str, priority: int = 4) -> None:
    """Write one line to the kernel log, else to syslog; also to descriptor 2, which is /dev/null under the kernel."""
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
        except (ImportError, OSError):  # no descriptor is left; the dump matters more than the line
            pass


def write_file(path: str, data: bytes) -> None:
    """Write to a file of /proc, /sys or /dev in one call."""
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
    """Read at most `limit` bytes; never wait for a writer, never follow a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
    try:
        return read_all(descriptor, limit)
    finally:
        os.close(descriptor)


def read_all(descriptor: int, limit: int) -> bytes:
    """Read the rest of a file, at most `limit` bytes."""
    blocks = [os.read(descriptor, min(limit, BLOCK))]
    left = limit - len(blocks[0])
    while blocks[-1] and left:
        blocks.append(os.read(descriptor, min(left, BLOCK)))
        left -= len(blocks[-1])
    return b"".join(blocks)


def replace_file(name: str, content: bytes, directory: int) -> None:
    """Write a private file as NAME.new and rename it, so that nobody reads a part of it; raises OSError."""
    draft = os.open(name + ".new", NEW_FILE | os.O_TRUNC, 0o600, dir_fd=directory)
    try:
        write_all(draft, content)
    finally:
        os.close(draft)
    os.rename(name + ".new", name, src_dir_fd=directory, dst_dir_fd=directory)


def read_fields(path: str, directory: int | None = None) -> dict[bytes, list[bytes]]:
    """Read a file of `key: value` lines such as /proc/PID/status; the first line of a key wins."""
    lines = [line.partition(b":") for line in read_file(path, MAX_FIELDS_BYTES, directory).split(b"\n")]
    return {key: value.split() for key, _, value in reversed(lines)}


def is_private(status: os.stat_result) -> bool:
    """Return whether only root, or the user of this process, can change a file or directory."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def is_own(status: os.stat_result) -> bool:
    """Return whether a directory belongs to the user of this process, who alone may use it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def open_own(name: str, directory: int) -> int:
    """Open a directory; raises OSError unless it belongs to the user of this process, who alone may use it."""
    found = os.open(name, DIRECTORY, dir_fd=directory)
    if not is_own(os.fstat(found)):
        os.close(found)
        raise PermissionError(1, "it belongs to another user, or others may use it")
    return found


def check_owner(path: str) -> None:
    """Raise PermissionError unless only root, or the user of this process, can change the file at `path`."""
    if not is_private(os.stat(path)):
        raise PermissionError(1, "others than root can change it")


def exists(name: str, directory: int) -> bool:
    """Return whether anything has this name."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def lock(descriptor: int, seconds: float) -> bool:
    """Lock a file; return False if that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)


def set_alarm(deadline_seconds: int) -> None:
    """Let this process live for DEADLINE_SECONDS and a little longer from now on."""
    _signal.alarm(deadline_seconds + ALARM_SECONDS)


def enlarge_pipe(pipe: int) -> bool:
    """Let a pipe hold 1 MiB, so that reader and writer switch less often; return False for any other file."""
    try:
        fcntl.fcntl(pipe, SET_PIPE_SIZE, CHUNK)
    except OSError:
        return False
    return True


def secure_process() -> int:
    """Return a private descriptor of the core; make this process harmless.

    Descriptors 0 to 2 become /dev/null where they are the core or closed, new files are private, this process is not
    dumpable and is the first to be killed when memory runs out.
    """
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
        log("cannot prepare this process: %s" % error)
    return core

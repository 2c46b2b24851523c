"""Owns the dump on disk: opens it safely, and salvages, deletes or quarantines exactly the file that was opened.

Every call goes through a directory descriptor, follows no symlink, and never waits for a FIFO or a writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from core_dump_collector.node import deletable, rename
from core_dump_collector.node.ownership import is_trusted
from core_dump_format.attributes import ATTRIBUTE_NAMES, ATTRIBUTE_PREFIX, SALVAGED, UPLOAD_RECORD
from core_dump_format.names import PARTIAL_SUFFIX, QUARANTINE, unpartial

if TYPE_CHECKING:
    from types import TracebackType

    from core_dump_collector.jobs import Sighting

QUIET_SECONDS = 60.0
"""Where no lease is available (NFS, a file of another user without CAP_LEASE), a file is ready once the loop has seen
it unchanged for so long. Its own time is not compared with the clock: clocks jump, and a server has its own."""

_SALVAGED_FLAGS = {SALVAGED: b"1", ATTRIBUTE_PREFIX + "truncated": b"salvaged"}
"""The sticky bit replaces them where they cannot be set; it has no other meaning on a file."""
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LEASE_HERE = frozenset({errno.EACCES, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_ATTRIBUTES = frozenset(
    {errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.E2BIG}
)


class Unfit(StrEnum):
    """Why a file is not uploaded now."""

    VANISHED = "vanished"
    BUSY = "busy"
    REFUSED = "refused"


class UnfitError(Exception):
    """The file is not to be uploaded now."""

    def __init__(self, why: Unfit, detail: str) -> None:
        """Store the reason, which is bounded, and the text."""
        super().__init__(detail)
        self.why = why


@dataclass(frozen=True, slots=True)
class Identity:
    """The properties of a file that must not change between reading and deleting it."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take the identity from a stat result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class DumpFile:
    """An open dump that nobody writes to; a context manager.

    Raises:
        UnfitError: the file is gone, is being written, or must not be touched.
        OSError: the directory or the file cannot be read.
    """

    def __init__(self, directory: str, name: str, sighting: Sighting | None = None) -> None:
        """Open and check the file; `sighting` is what the loop has seen of it."""
        if name in {"", ".", ".."} or "/" in name or "\0" in name:
            raise UnfitError(Unfit.REFUSED, "not a file name")
        self.name = name
        with contextlib.ExitStack() as stack:
            self._directory = _open_directory(directory)
            stack.callback(os.close, self._directory)
            rename.finish(self._directory, name + PARTIAL_SUFFIX, name)
            rename.finish(self._directory, name, f"{QUARANTINE}/{name}")
            self.fd, self._status = _open_regular(self._directory, name)
            stack.callback(os.close, self.fd)
            if not _has_no_writer(self.fd):
                _require_quiet(self._status, sighting)
            self._status = os.fstat(self.fd)
            self.identity = Identity.of(self._status)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both descriptors."""
        self._stack.close()

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return self.identity.size_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes that the file system has allocated for the file; fewer than its length if it has holes."""
        return min(self._status.st_blocks * 512, self.size_bytes)

    @property
    def modified_at(self) -> int:
        """Unix seconds of the last write."""
        return int(self._status.st_mtime)

    @property
    def is_trusted(self) -> bool:
        """Tell whether only root, or this user, can have written the file and its attributes."""
        return is_trusted(self._status)

    def require_deletable(self) -> None:
        """Check, before the upload, that the file can be deleted afterwards: it would be sent again and again.

        Raises:
            OSError: as far as can be known, it cannot be deleted.
        """
        deletable.require(self._directory, self.fd)

    def attributes(self) -> dict[str, bytes]:
        """Return the `user.coredump.*` attributes; none if the file system has no attributes.

        Return only the upload record for a file that other users can change; `record.read` then distrusts it.
        """
        known = ATTRIBUTE_NAMES if self.is_trusted else {UPLOAD_RECORD}
        found = dict(_SALVAGED_FLAGS) if self.is_trusted and self._status.st_mode & stat.S_ISVTX else {}
        with contextlib.suppress(OSError):
            found |= {name: os.getxattr(self.fd, name) for name in os.listxattr(self.fd) if name in known}
        return found

    def set_attribute(self, name: str, value: bytes) -> bool:
        """Set an attribute; return False if the file system does not support it or is full."""
        return _set_attribute(self.fd, name, value)

    def remove_attribute(self, name: str) -> None:
        """Remove an attribute, if it exists and can be removed."""
        with contextlib.suppress(OSError):
            os.removexattr(self.fd, name)

    def is_unchanged(self) -> bool:
        """Tell whether the file still has the length and time that it had when it was opened, and no writer."""
        if Identity.of(os.fstat(self.fd)) != self.identity:
            return False
        try:
            _has_no_writer(self.fd)
        except UnfitError:
            return False
        return True

    def unlink(self) -> bool:
        """Delete the file; return False, and delete nothing, if its name belongs to another file by now."""
        if not _is_at(self._directory, self.name, self.identity):
            return False
        os.unlink(self.name, dir_fd=self._directory)
        return True

    def quarantine(self) -> str:
        """Move the file to quarantine/ and return its name there.

        Raises:
            UnfitError: the name belongs to another file by now.
            OSError: it cannot be moved.
        """
        if not _is_at(self._directory, self.name, self.identity):
            raise UnfitError(Unfit.VANISHED, "replaced by another file while it was uploaded")
        with contextlib.suppress(FileExistsError):
            os.mkdir(QUARANTINE, 0o700, dir_fd=self._directory)
        target = os.open(QUARANTINE, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=self._directory)
        try:
            if not is_trusted(os.fstat(target)):
                raise OSError(errno.EPERM, "quarantine/ belongs to others, or others may write to it")
            return rename.move(self._directory, self.name, target, self.name)
        finally:
            os.close(target)


def salvage(directory: str, name: str) -> str | None:
    """Publish a partial whose helper is dead, and return its new name.

    The caller makes sure that nobody has changed it for a while (`partials`). Return None if it is left alone: its
    helper holds the flock, or another user may have written it. One without content is removed; the result is then
    the empty string. A published partial is flagged `truncated=salvaged` unless the helper has flagged it.

    Raises:
        OSError: it cannot be published now.
    """
    try:
        with contextlib.ExitStack() as stack:
            parent = _open_directory(directory)
            stack.callback(os.close, parent)
            if (finished := rename.finish(parent, name, unpartial(name))) is not None:
                return finished
            fd, status = _open_regular(parent, name)
            stack.callback(os.close, fd)
            if not is_trusted(status):
                return None
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _publish(parent, fd, name)
    except (UnfitError, BlockingIOError):
        return None


def _publish(parent: int, fd: int, name: str) -> str | None:
    """Rename a locked partial, unless its helper has renamed it a moment ago."""
    identity = Identity.of(os.fstat(fd))
    if not _is_at(parent, name, identity):
        return None
    if identity.size_bytes == 0:
        os.unlink(name, dir_fd=parent)
        return ""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listxattr(fd)
    for flag, value in _SALVAGED_FLAGS.items():
        if flag not in names and not _set_attribute(fd, flag, value):
            os.fchmod(fd, stat.S_ISVTX | 0o600)
    published = rename.move(parent, name, parent, unpartial(name))
    os.fsync(parent)
    return published


def _open_directory(directory: str) -> int:
    try:
        return os.open(directory, _DIRECTORY_FLAGS)
    except FileNotFoundError:
        raise UnfitError(Unfit.VANISHED, "the watch directory is gone") from None


def open_regular(parent: int, name: str) -> tuple[int, os.stat_result] | None:
    """Open a regular file with one link, as a dump is opened; return None if it is not to be opened now."""
    try:
        return _open_regular(parent, name)
    except UnfitError:
        return None


def _open_regular(parent: int, name: str) -> tuple[int, os.stat_result]:
    """Open a regular file with one link. Its type is checked first, so that no device or FIFO is opened."""
    try:
        before = os.stat(name, dir_fd=parent, follow_symlinks=False)
        _require_regular(before)
        fd = os.open(name, _OPEN_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        raise UnfitError(Unfit.VANISHED, "gone before it was opened") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnfitError(Unfit.REFUSED, "a symbolic link") from None
        if error.errno == errno.EWOULDBLOCK:
            raise UnfitError(Unfit.BUSY, "another process holds a lease on it") from None
        raise
    try:
        status = os.fstat(fd)
        _require_regular(status)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFLNK: "symbolic link",
            stat.S_IFIFO: "FIFO",
            stat.S_IFSOCK: "socket",
            stat.S_IFDIR: "directory",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise UnfitError(Unfit.REFUSED, f"a {kind}, not a regular file")
    if status.st_nlink == 0:
        raise UnfitError(Unfit.VANISHED, "deleted while it was opened")
    if status.st_nlink > 1:
        raise UnfitError(Unfit.REFUSED, f"it has {status.st_nlink} hard links")


def _has_no_writer(fd: int) -> bool:
    """Return True if nobody has the file open for writing, and False where that cannot be known.

    A read lease is granted only when nobody has the file open for writing, exact even for cores that the kernel
    writes (fcntl(2), "Leases").

    Raises:
        UnfitError: somebody has it open for writing.
    """
    try:
        _take_lease(fd)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        raise UnfitError(Unfit.BUSY, "somebody has it open for writing") from None
    except OSError as error:
        if error.errno not in _NO_LEASE_HERE:
            raise
        return False
    return True


def _require_quiet(status: os.stat_result, sighting: Sighting | None) -> None:
    """Refuse a file that was not seen unchanged for long enough."""
    if (
        sighting is None
        or (sighting.size_bytes, sighting.modified_ns) != (status.st_size, status.st_mtime_ns)
        or sighting.unchanged_seconds < QUIET_SECONDS
    ):
        raise UnfitError(Unfit.BUSY, "not seen unchanged for a minute yet")


def _take_lease(fd: int) -> None:
    """Take a read lease.

    The kernel sends a signal if somebody opens the file for writing in the meantime: SIGURG, which is ignored, instead
    of SIGIO, which would end the process.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def _is_at(parent: int, name: str, identity: Identity) -> bool:
    status = rename.status_of(parent, name)
    return status is not None and (status.st_dev, status.st_ino) == (identity.device, identity.inode)


def _set_attribute(fd: int, name: str, value: bytes) -> bool:
    try:
        os.setxattr(fd, name, value)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return False
    return True

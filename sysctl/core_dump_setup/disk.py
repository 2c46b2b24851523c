"""Owns single changes of the disk: a file that is replaced atomically, names that may be gone already."""

from __future__ import annotations

import errno
import os
import shutil
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NEW = ".new."
"""Between a file's name and the process ID: a file that is being written."""
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_any(path: str) -> None:
    """Remove a file or a directory with everything in it; follow no link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        unlink(path)


def entries(directory: str) -> Iterator[str]:
    """Return the names in a directory, none if there is no such directory."""
    try:
        return iter(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return iter(())


def is_private(path: str, mode: int) -> bool:
    """Say whether a file has this mode and belongs to root."""
    status = os.lstat(path)
    return (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 0, 0)


def unlink(path: str) -> None:
    """Remove a name, unless it is gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def link_again(path: str, target: str) -> None:
    """Make a symbolic link in place of what has the name."""
    unlink(path)
    os.symlink(target, path)


def remove_empty(path: str) -> None:
    """Remove a directory, unless it holds something, is mounted or is gone."""
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR, errno.EBUSY, errno.EEXIST):
            raise


def write(path: str, data: bytes, mode: int, owner: tuple[int, int]) -> None:
    """Write a file beside its name, to the disk, and rename it: a reader sees the old file or the new one."""
    new = path + NEW + str(os.getpid())
    try:
        with os.fdopen(os.open(new, NEW_FILE, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(new, path)
    except BaseException:
        unlink(new)
        raise
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Write a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

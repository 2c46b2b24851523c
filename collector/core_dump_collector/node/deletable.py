"""Owns what is known, before a dump is sent, about whether it can be deleted afterwards."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys

_GET_FLAGS = 0x8000_6601 | struct.calcsize("l") << 16
"""FS_IOC_GETFLAGS (linux/fs.h); elsewhere than on x86 and ARM the number may differ, and is then unknown."""
_FIXED_FLAGS = 0x10 | 0x20
"""FS_IMMUTABLE_FL, FS_APPEND_FL: set by `chattr +i` and `chattr +a` (ioctl_iflags(2))."""
_CAP_FOWNER = 3


def require(directory: int, file: int) -> None:
    """Check that a file can be deleted from its directory; both are descriptors.

    Raises:
        OSError: the file system is read-only, or this user may not delete the file.
    """
    if os.fstatvfs(directory).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "the watch directory is read-only: the dump could not be deleted")
    for fd, what in ((directory, "watch directory"), (file, "dump")):
        if _flags_of(fd) & _FIXED_FLAGS:
            raise OSError(
                errno.EPERM, f"the {what} is immutable or append-only (chattr): the dump could not be deleted"
            )
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=True):
        raise OSError(errno.EACCES, "this user may not delete from the watch directory")
    parent = os.fstat(directory)
    owners = {parent.st_uid, os.fstat(file).st_uid}
    if parent.st_mode & stat.S_ISVTX and os.geteuid() not in owners and not _may_act_as_owner():
        raise OSError(errno.EPERM, "the watch directory is sticky, and the dump belongs to another user")


def _flags_of(fd: int) -> int:
    """Return the inode's flags; 0 where the file system has none."""
    try:
        answer = fcntl.ioctl(fd, _GET_FLAGS, bytes(8))
    except OSError:
        return 0
    return int.from_bytes(answer[:4], sys.byteorder)


def _may_act_as_owner() -> bool:
    """Tell whether this process has CAP_FOWNER; if that is unknown, deleting is worth a try."""
    try:
        with open("/proc/self/status", "rb") as file:
            (effective,) = (line.split()[1] for line in file if line.startswith(b"CapEff:"))
    except (OSError, ValueError):
        return True
    return bool(int(effective, 16) >> _CAP_FOWNER & 1)

"""Owns the path of the socket: the kernel connects as root to any socket with this name, and sends every core there.

Only root may therefore be able to change the path, and the kernel follows no symbolic link on it.
"""

from __future__ import annotations

import os

from core_dump_helper.system import PLAIN, is_private, read_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from _socket import socket

PATTERN = "/proc/sys/kernel/core_pattern"
MAX_PATH_BYTES = 105
"""The kernel takes 107 bytes with the two @ (struct sockaddr_un)."""
STICKY = 0o1000
BACKLOG = 4096
"""Connections that wait to be accepted; net.core.somaxconn may allow fewer. The kernel drops the dump of any other."""


class PathError(Exception):
    """The path cannot be used; the message says why."""


def open_directory(path: str) -> int:
    """Return the descriptor of the directory of a socket, made private if it belongs to this user.

    Raises:
        PathError: others could replace the socket, or the kernel would not find it.
    """
    _check_text(path)
    names = path.split("/")[1:]
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    place, found = "/", os.open("/", flags)
    for name in names[:-1]:
        _check_ancestor(place, found)
        place = os.path.join(place, name)
        try:
            below = os.open(name, flags, dir_fd=found)
        except OSError as error:
            reason = (
                "is a symbolic link, which the kernel does not follow"
                if os.path.islink(place)
                else error.strerror
            )
            raise PathError("%s %s" % (place, reason)) from error
        finally:
            os.close(found)
        found = below
    status = os.fstat(found)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(found)
        raise PathError("others than root can change %s: chown it to root and chmod it to 0700" % place)
    os.fchmod(found, 0o700)
    return found


def _check_text(path: str) -> None:
    """Raise PathError for a path that the kernel refuses, or takes and does not find."""
    names = path.split("/")
    allowed = PLAIN + b"/"
    if names[0] or len(names) < 3 or not all(names[1:]) or {".", ".."} & set(names):
        raise PathError("%a is not an absolute path of a file in a directory, without . and .." % path)
    if os.fsencode(path).translate(None, allowed):
        raise PathError("%a has other characters than letters, digits and ._+-" % path)
    if len(path) > MAX_PATH_BYTES:
        raise PathError("%s has %d bytes, the kernel takes %d" % (path, len(path), MAX_PATH_BYTES))


def _check_ancestor(place: str, directory: int) -> None:
    """Raise PathError if others could rename the entries of a directory."""
    status = os.fstat(directory)
    if not is_private(status) and not (status.st_uid == 0 and status.st_mode & STICKY):
        os.close(directory)
        raise PathError("others than root can change %s" % place)


def bind(connections: socket, path: str, directory: int) -> None:
    """Let a socket listen, then give it its name, so that a listener which has the name now misses nothing.

    Raises:
        OSError: the directory cannot be written to.
    """
    name = path.rpartition("/")[2]
    new = "%s.%d" % (name, os.getpid())
    try:
        os.unlink(new, dir_fd=directory)
    except FileNotFoundError:
        pass
    connections.bind("/proc/self/fd/%d/%s" % (directory, new))
    connections.listen(BACKLOG)
    os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def has_name(path: str, inode: tuple[int, int]) -> bool:
    """Return whether a path still leads to a socket, given by device and inode."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == inode


def is_in_pattern(path: str) -> bool:
    """Return whether the kernel's core pattern names this socket."""
    return os.fsdecode(read_file(PATTERN, 256)).rstrip("\n") in ("@" + path, "@@" + path)

"""Owns renaming that never replaces a file, so that two dumps of one name both survive.

Where renameat2(2) is not supported, a rename is a link and an unlink. A collector that is killed between the two leaves
a file with two names, which `finish` makes one again: it would be refused for its second name for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat

from core_dump_format.names import with_copy

MOST_COPIES = 9999
_RENAME_NOREPLACE = 1
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_LIBC = ctypes.CDLL(None, use_errno=True)


def move(parent: int, name: str, target: int, wanted: str) -> str:
    """Rename a file without replacing another, and return its new name: `-1`, `-2`, ... is added to a taken name."""
    for copy in range(MOST_COPIES):
        candidate = with_copy(wanted, copy)
        with contextlib.suppress(FileExistsError):
            _rename_new(parent, name, target, candidate)
            return candidate
    raise OSError(errno.EEXIST, "every name for it is taken")


def finish(parent: int, name: str, wanted: str) -> str | None:
    """Finish a `move` to a wanted name that was killed between link and unlink: remove the old name.

    Return the new name; None, and nothing is removed, unless the file has exactly these two names.
    """
    old = status_of(parent, name)
    if old is None or not stat.S_ISREG(old.st_mode) or old.st_nlink != 2:  # noqa: PLR2004  both names
        return None
    for copy in range(MOST_COPIES):
        candidate = with_copy(wanted, copy)
        new = status_of(parent, candidate)
        if new is None:
            return None
        if (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino):
            os.unlink(name, dir_fd=parent)
            return candidate
    return None


def status_of(parent: int, name: str) -> os.stat_result | None:
    """Return the status of a name, which is not followed if it is a symbolic link; None if nothing has it."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return None


def _rename_new(parent: int, name: str, target: int, new_name: str) -> None:
    """Rename unless the new name exists (renameat2(2), RENAME_NOREPLACE; link and unlink if it is not supported)."""
    if _LIBC.renameat2(parent, os.fsencode(name), target, os.fsencode(new_name), _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(code, os.strerror(code), new_name)
    os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
    os.unlink(name, dir_fd=parent)

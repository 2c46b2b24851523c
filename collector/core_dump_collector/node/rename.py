"""Owns renaming that never replaces a file, so that two dumps of one name both survive."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

from core_dump_format.names import with_copy

MOST_COPIES = 9999
_RENAME_NOREPLACE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def move(parent: int, name: str, target: int, wanted: str) -> str:
    """Rename a file without replacing another, and return its new name: `-1`, `-2`, ... is added to a taken name."""
    for copy in range(MOST_COPIES):
        candidate = with_copy(wanted, copy)
        with contextlib.suppress(FileExistsError):
            _rename_new(parent, name, target, candidate)
            return candidate
    raise OSError(errno.EEXIST, "every name for it is taken")


def _rename_new(parent: int, name: str, target: int, new_name: str) -> None:
    """Rename unless the new name exists (renameat2(2), RENAME_NOREPLACE; link and unlink if it is not supported)."""
    if _LIBC.renameat2(parent, os.fsencode(name), target, os.fsencode(new_name), _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(code, os.strerror(code), new_name)
    os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
    os.unlink(name, dir_fd=parent)

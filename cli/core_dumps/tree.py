"""Owns the directory tree for a debugger: each file of the process under the names that it had in the process.

The names come from a dump, so they are hostile: none leaves the tree, and none replaces another. The tree holds links
to files in other directories; it is made for one run of a debugger and removed afterwards.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

PREFIX = "tree-"
MOST_NAME_BYTES = 255
MOST_PATH_BYTES = 3000
"""A path has at most 4,096 bytes; the rest is for the path of the tree itself."""
DEBUG_DIRECTORY = "/usr/lib/debug"
"""Where distributions put separate symbols, and debuggers look for them by default."""
ROOT, FLAT, SYMBOLS = "root", "flat", "debug"
"""The directories of a tree."""
_MERGED = (b"bin", b"sbin", b"lib", b"lib32", b"lib64", b"libx32")
"""Directories that are links into /usr on most systems (hier(7))."""


class Tree:
    """A tree in a directory that only this user can write to; a context manager."""

    def __init__(self, directory: str) -> None:
        """Make an empty one."""
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=directory)
        self.root = os.path.join(self.path, ROOT)
        """Files under their paths in the process; a sysroot."""
        self.flat = os.path.join(self.path, FLAT)
        """Files under their last names, for libraries that were loaded by a relative path."""
        self.symbols = os.path.join(self.path, SYMBOLS)
        """Files with separate symbols by build ID; a debug-file-directory."""
        for part in (self.root, self.flat, self.symbols):
            os.mkdir(part, 0o700)

    def __enter__(self) -> Self:
        """Return the tree."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the tree, but not the files to which its links lead."""
        shutil.rmtree(self.path, ignore_errors=True)

    def add(self, name: str | bytes, target: str) -> str | None:
        """Link a name to a file, and return the place in the tree; None if no file can be there.

        The first file under a name stays.
        """
        place = inside(name)
        if place is None:
            return None
        last = place.rpartition(b"/")[2]
        with contextlib.suppress(OSError):
            os.symlink(target, os.path.join(os.fsencode(self.flat), last))
        return self._link(os.path.join(os.fsencode(self.root), place), target)

    def add_symbols(self, build_id: str, target: str) -> None:
        """Link a build ID to a file with separate symbols."""
        place = os.path.join(self.symbols, ".build-id", build_id[:2], f"{build_id[2:]}.debug")
        self._link(os.fsencode(place), target)

    def merge_usr(self) -> None:
        """Let `/lib` lead to `/usr/lib`, and so on, unless the tree has both; call it after the last file was added."""
        root = os.fsencode(self.root)
        for name in _MERGED:
            if os.path.isdir(os.path.join(root, b"usr", name)):
                with contextlib.suppress(OSError):
                    os.symlink(b"usr/" + name, os.path.join(root, name))

    def _link(self, place: bytes, target: str) -> str | None:
        """Make a link; its directories belong to the tree, because links of the tree lead to files only."""
        try:
            os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
            os.symlink(os.path.abspath(target), place)
        except FileExistsError:
            return os.fsdecode(place) if os.path.isfile(place) else None
        except OSError:
            return None
        return os.fsdecode(place)


def inside(name: str | bytes) -> bytes | None:
    """Turn a name into a relative path without `..`; return None if no file can have it."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    path = posixpath.normpath(b"/" + raw).lstrip(b"/")
    parts = path.split(b"/")
    fits = path and len(path) <= MOST_PATH_BYTES and all(0 < len(part) <= MOST_NAME_BYTES for part in parts)
    return path if fits and b"\0" not in path and not {b".", b".."} & set(parts) else None

"""Owns the files of a download in progress: private, locked, resumable, and removed when they are of no use.

They lie in the target's directory: `.NAME.MARK.download` (the object), `.parts` (the bytes of each part that are there)
and `.core` (the decompressed content). The mark depends on bucket, key, version and target, so nothing else has it.
`whole_file` writes files that are fetched in one go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import threading
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Self

from core_dump_format.text import printable
from core_dumps.errors import CliError
from core_dumps.sparse import write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.parts import Remote

MOST_NOTES_BYTES = 64 * 1024 * 1024
_TRIES = 10
_MINE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NOTE = re.compile(rb"(\d{1,9}) (\d{1,9})")


@contextlib.contextmanager
def whole_file(path: str, prefix: str) -> Iterator[IO[bytes]]:
    """Open a new file, readable by its owner only, that gets its path when the block ends without an exception.

    Args:
        path: of the file; another one there is replaced.
        prefix: of the temporary name in the same directory.
    """
    descriptor, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=prefix)
    try:
        with open(descriptor, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class Work:
    """The locked files of one download.

    Raises:
        CliError: another process downloads the same object to the same target.
        OSError: the files cannot be made.
    """

    def __init__(self, folder: int, name: str, remote: Remote) -> None:
        """Lock the files of an earlier attempt, or make new ones."""
        identity = f"{remote.bucket.name}/{remote.dump.key}/{remote.etag}/{name}"
        self._folder, self._stem = folder, f".{name[:200]}."
        base = self._stem + sha256(identity.encode()).hexdigest()[:12]
        self.download_name, self.core_name, self._notes_name = (
            f"{base}.{kind}" for kind in ("download", "core", "parts")
        )
        self.file = self._lock()
        try:
            self._notes = self._open(self._notes_name, os.O_APPEND)
        except BaseException:
            os.close(self.file)
            raise
        self._writing = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Return the files, once the leftovers of other versions of the target are gone."""
        self._remove_leftovers()
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock; remove the files if nothing was received. A thread that still runs writes nothing after this."""
        with self._writing:
            self._closed = True
            if os.fstat(self._notes).st_size == 0:
                self.remove()
            os.close(self._notes)
            os.close(self.file)

    def received(self, size_bytes: int) -> dict[int, int]:
        """Return how many bytes of each part are there, and give the file its full length."""
        noted: dict[int, int] = {}
        if os.fstat(self.file).st_size == size_bytes:
            for line in os.pread(self._notes, MOST_NOTES_BYTES, 0).split(b"\n")[:-1]:
                found = _NOTE.fullmatch(line)
                if found:
                    noted[int(found[1])] = int(found[2])
        if not noted:
            os.ftruncate(self._notes, 0)
        os.ftruncate(self.file, size_bytes)
        return noted

    def write(self, piece: bytes, at: int) -> bool:
        """Write bytes of the object; return False if the download ended in the meantime."""
        with self._writing:
            if not self._closed:
                write_all(self.file, piece, at)
            return not self._closed

    def note(self, part: int, received: int) -> None:
        """Note how many bytes of a part were written, so that the next attempt continues there."""
        with self._writing:
            if not self._closed:
                os.write(self._notes, b"%d %d\n" % (part, received))

    def open_core(self) -> int:
        """Return a descriptor of an empty file for the decompressed content."""
        return self._open(self.core_name, os.O_TRUNC)

    def publish(self, ready: str, target: str, *, force: bool) -> None:
        """Give a file the target's name; without `force` only if nothing has that name."""
        place = {"src_dir_fd": self._folder, "dst_dir_fd": self._folder}
        if force:
            os.rename(ready, target, **place)
        else:
            os.link(ready, target, **place, follow_symlinks=False)
            os.unlink(ready, dir_fd=self._folder)
        os.fsync(self._folder)

    def remove(self) -> None:
        """Remove the files."""
        for name in (self.core_name, self._notes_name, self.download_name):
            self._unlink(name)

    def remove_core(self) -> None:
        """Remove the decompressed content."""
        self._unlink(self.core_name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)

    def _lock(self) -> int:
        """Open and lock the download; a file whose name was removed before it was locked is opened again."""
        for _ in range(_TRIES):
            descriptor = self._open(self.download_name)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                named = os.stat(self.download_name, dir_fd=self._folder, follow_symlinks=False)
                if os.path.samestat(named, os.fstat(descriptor)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise CliError("another core-dumps is downloading this dump to the same place") from None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise CliError(f"{printable(self.download_name)} is replaced again and again")

    def _open(self, name: str, extra: int = 0) -> int:
        """Open a file of this user for reading and writing; never another's, never through a link."""
        descriptor = os.open(name, _MINE | extra, 0o600, dir_fd=self._folder)
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise CliError(f"{printable(name)} is in the way: remove it")
        return descriptor

    def _remove_leftovers(self) -> None:
        """Remove the files of attempts to bring another object to this target, unless one is running."""
        pattern = re.compile(re.escape(self._stem) + r"[0-9a-f]{12}\.download")
        for name in os.listdir(self._folder):
            if name == self.download_name or not pattern.fullmatch(name):
                continue
            with contextlib.suppress(OSError, CliError):
                descriptor = self._open(name)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for kind in ("core", "parts", "download"):
                        self._unlink(f"{name.removesuffix('download')}{kind}")
                finally:
                    os.close(descriptor)

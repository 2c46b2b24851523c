"""Owns a helper that listens at a socket."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

from tests.support.collector import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def start(directory: Path, path: Path, prefix: Sequence[str] = (), **how: Any) -> subprocess.Popen[bytes]:
    """Start the helper that is installed in a directory; return it once it listens at a path.

    `prefix` are words before the command, of a program that becomes it (exec).
    """
    before = inode(path)
    command = [*prefix, str(directory / "core-dump-helper"), "--listen", str(path)]
    options: dict[str, Any] = {"stderr": subprocess.DEVNULL} | how
    process = subprocess.Popen(command, cwd="/", **options)
    wait_until(lambda: inode(path) != before or process.poll() is not None, 30, "the listener")
    assert process.poll() is None, "it listens"
    return process


def inode(path: Path) -> int:
    """Return the inode of a socket, or 0 if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


@contextlib.contextmanager
def listening(directory: Path, path: Path, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Let the installed helper listen for a while."""
    process = start(directory, path, **how)
    try:
        yield process
    finally:
        path.unlink(missing_ok=True)  # nothing more comes, so the listener ends soon
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()

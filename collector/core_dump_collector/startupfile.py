"""Owns the start-up file: the daemon's state as one word, and its heartbeat as the modification time.

A thread of its own writes it, so that a disk that hangs does not stop the loop.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from core_dump_collector.errors import ConfigError
from core_dump_collector.observation import Look

if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_collector.observation import Observer

_END_SECONDS = 2.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StartupFile:
    """Writes the current word again with every heartbeat, so that a file that was deleted comes back.

    Args:
        path: of the file.
        beat_seconds: pause between two heartbeats.
        is_alive: tells whether the loop turns; without that there is no heartbeat.
        observer: is told when the file cannot be written.
    """

    def __init__(
        self, path: str, beat_seconds: float, is_alive: Callable[[], bool], observer: Observer
    ) -> None:
        """Write `starting` over the word that an earlier run has left.

        A disk that is full ends nothing: uploads are what frees it.

        Raises:
            ConfigError: the file cannot be written, for another reason.
        """
        self._path = path
        self._beat_seconds = beat_seconds
        self._is_alive = is_alive
        self._observer = observer
        self._word = "starting"
        self._changed = threading.Event()
        self._ending = False
        try:
            self._write()
        except OSError as error:
            if error.errno not in _FULL:
                raise ConfigError(
                    f"STARTUP_FILE={path}: {error.strerror}; takes a path in a writable directory"
                ) from None
            observer.fail(Look.STARTUP_FILE, error.strerror or str(error))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="startup-file")
        self._thread.start()

    def set(self, word: str) -> None:
        """Change the word."""
        self._word = word
        self._changed.set()

    def end(self) -> None:
        """Write `dead`, and stop; a disk that hangs is not waited for."""
        self._ending = True
        self.set("dead")
        self._thread.join(_END_SECONDS)

    def _beat(self) -> None:
        while not self._ending:
            self._changed.wait(self._beat_seconds)
            self._changed.clear()
            if self._ending or self._is_alive():
                self._observer.look(Look.STARTUP_FILE, self._write)

    def _write(self) -> None:
        """Write the word in place: a disk that is full takes it if the file has been written before."""
        fd = os.open(self._path, _FLAGS, 0o644)
        try:
            content = self._word.encode() + b"\n"
            os.write(fd, content)
            os.ftruncate(fd, len(content))
        finally:
            os.close(fd)

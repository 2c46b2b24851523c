"""Owns the line that tells a person at a terminal how far a listing is, until the first row is there."""

from __future__ import annotations

import sys
import threading


class Status:
    """A count of names on standard error; silent where that is no terminal."""

    def __init__(self) -> None:
        """Look at standard error."""
        self._lock = threading.Lock()
        self._shown = sys.stderr.isatty()
        self._names, self._width = 0, 0

    def add(self, names: int) -> None:
        """Count more names."""
        with self._lock:
            self._names += names
            if self._shown:
                line = f"core-dumps: {self._names:,} names listed"
                sys.stderr.write(f"\r{line}")
                sys.stderr.flush()
                self._width = len(line)

    def end(self) -> None:
        """Remove the line, for good: what comes now is the answer."""
        with self._lock:
            if self._shown and self._width:
                sys.stderr.write("\r" + " " * self._width + "\r")
                sys.stderr.flush()
            self._shown = False

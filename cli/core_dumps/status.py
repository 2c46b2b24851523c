"""Owns the line that shows a person at a terminal the progress of a listing, until the first row is printed."""

from __future__ import annotations

import sys
import threading


class Status:
    """A count of names on standard error; silent if that is not a terminal."""

    def __init__(self) -> None:
        """Check whether standard error is a terminal."""
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
        """Remove the line for good: the answer follows."""
        with self._lock:
            if self._shown and self._width:
                sys.stderr.write("\r" + " " * self._width + "\r")
                sys.stderr.flush()
            self._shown = False

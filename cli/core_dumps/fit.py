"""Owns the widths of a table's columns: what a reader misses least gives way where there is no room. Pure."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_RIGHT = frozenset({"PID", "UID", "SIZE", "COUNT", "NODES", "BUILDS"})
_TIMES = frozenset({"TIME", "FIRST", "LAST"})
_TIME_BYTES = len("Thu 2026-03-05 10:11:12")
_DATE, _MINUTES = slice(4, 23), slice(9, 20)
"""The parts of a time that remain: first without weekday and zone, then without year and seconds."""
_CUT = ("EXE", "PATH", "WHERE")
"""Columns that are cut, the first one first; node and pod never are."""
_LITTLE = ("UID", "SIZE")
_MUCH = ("FINGERPRINT", "BUILDS", "FIRST")
"""Columns that are left out one after the other while the rest is too wide: `_LITTLE` before paths are cut short."""


class Columns:
    """The columns of a table, fitted to a width."""

    def __init__(self, names: Sequence[str], sample: Sequence[Sequence[str]], most: int | None) -> None:
        """Fit a sample of rows to a number of characters; None for no limit."""
        self._names = names
        self._shown = list(range(len(names)))
        self._time = slice(None)
        self._width = most
        self._widths = [max(width(cells[n]) for cells in sample) for n in range(len(names))]
        if most is not None:
            self._shorten_times(_DATE)
            self._cut(24)
            self._shorten_times(_MINUTES)
            self._leave_out(_LITTLE)
            self._shorten_signals()
            self._cut(16)
            for name in _MUCH:
                self._leave_out([name])
                self._cut(12)
            self._cut(8)

    def line(self, cells: Sequence[str]) -> str:
        """Return a row as text."""
        padded = []
        for n in self._shown:
            cell = cells[n] if self._width is None else self._fitted(n, cells[n])
            right = self._names[n] in _RIGHT
            space = " " * (self._widths[n] - width(cell))
            padded.append(space + cell if right else cell + space)
        return " ".join(padded).rstrip()

    def _fitted(self, n: int, cell: str) -> str:
        name, most = self._names[n], self._widths[n]
        if name == "SIG" and len(cell) > most:
            return cell.removeprefix(name)
        if name in _TIMES and len(cell) >= _TIME_BYTES:
            return cell[self._time]
        if name not in _CUT or width(cell) <= most:
            return cell
        if name == "WHERE":
            return f"{_front(cell, most - 1)}…"
        base, end = cell.rpartition("/")[2], _front(cell[::-1], most - 1)[::-1]
        if width(base) == most:
            return base
        return f"…{end[end.index('/') :] if '/' in end else end}"

    def _shorten_times(self, kept: slice) -> None:
        if self._excess() > 0:
            self._time = kept
            for n in self._shown:
                if self._names[n] in _TIMES:
                    self._widths[n] = min(self._widths[n], kept.stop - kept.start)

    def _shorten_signals(self) -> None:
        for n in self._shown:
            if self._names[n] == "SIG" and self._excess() > 0:
                self._widths[n] = max(len("SIG"), self._widths[n] - len("SIG"))

    def _cut(self, least: int) -> None:
        for n in self._shown:
            if self._names[n] in _CUT and self._excess() > 0:
                self._widths[n] = min(self._widths[n], max(least, self._widths[n] - self._excess()))

    def _leave_out(self, names: Sequence[str]) -> None:
        for name in names:
            if self._excess() > 0:
                self._shown = [n for n in self._shown if self._names[n] != name]

    def _excess(self) -> int:
        return sum(self._widths[n] for n in self._shown) + len(self._shown) - 1 - (self._width or 0)


def width(text: str) -> int:
    """Return the number of columns of a terminal that a text takes: two for East Asian characters (UAX #11)."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def _front(text: str, most: int) -> str:
    """Return the beginning of a text that takes at most so many columns."""
    end = min(len(text), most)
    while width(text[:end]) > most:
        end -= 1
    return text[:end]

"""Tables: on the terminal as they are measured, and in docs/benchmarks.md between markers."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Table:
    """One table and the line below it: how it was measured."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = ["| " + " | ".join(self.head) + " |", "|" + "---|" * len(self.head)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "")


class Report:
    """Collects what is measured."""

    def __init__(self, *, write: bool) -> None:
        """With `write`, every table goes into the document as well."""
        self._write, self._begin = write, time.monotonic()

    def add(self, table: Table) -> None:
        """Show a table, and keep it."""
        after = time.monotonic() - self._begin
        print(f"\n## {table.name} ({after:.0f} s after the start)\n\n{table.markdown()}", flush=True)
        if self._write:
            put(table.name, table.markdown())

    def merge(self, table: Table, order: Sequence[str]) -> Table:
        """Show a table whose other rows were measured by earlier runs; keep it whole, and return it.

        Args:
            table: some rows.
            order: the first cells of all rows.
        """
        rows = {row[0]: row for row in _rows_of(table) if row[0] in order} if self._write else {}
        rows |= {row[0]: row for row in table.rows}
        whole = Table(table.name, table.head, [rows[first] for first in order if first in rows], table.note)
        self.add(whole)
        return whole


def _rows_of(table: Table) -> list[Sequence[str]]:
    """Return the rows of a table in the document; none if its columns are others."""
    text = _place_of(table.name).search(DOCUMENT.read_text())
    lines = [line for line in (text[0] if text else "").splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return list(cells[1:]) if cells and cells[0] == list(table.head) else []


def _place_of(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)


def put(name: str, text: str) -> None:
    """Replace the text between the markers of `name`.

    Raises:
        ValueError: the document has no such markers.
    """
    document = DOCUMENT.read_text()
    changed, count = _place_of(name).subn(lambda found: f"{found[1]}{text}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"{DOCUMENT.name} has no place for {name!r}")
    DOCUMENT.write_text(changed)


def seconds(value: float) -> str:
    """Show seconds with three digits that count."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def parse_seconds(text: str) -> float:
    """Return the value of `seconds`."""
    number, unit = text.split()
    return float(number) / (1000 if unit == "ms" else 1)


def size(value: float) -> str:
    """Show bytes in MiB."""
    return f"{value / (1 << 20):.0f} MiB"

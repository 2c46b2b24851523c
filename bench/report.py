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


def put(name: str, text: str) -> None:
    """Replace what stands between the markers of `name`.

    Raises:
        ValueError: the document has no such markers.
    """
    document = DOCUMENT.read_text()
    pattern = re.compile(rf"(<!-- bench: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"{DOCUMENT.name} has no place for {name!r}")
    DOCUMENT.write_text(changed)


def seconds(value: float) -> str:
    """Show seconds with three digits that count."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def size(value: float) -> str:
    """Show bytes in MiB."""
    return f"{value / (1 << 20):.0f} MiB"

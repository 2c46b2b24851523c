"""Writes the tables of docs/ that come from code: `python tests/support/tables.py --write`."""

from __future__ import annotations

import sys
from pathlib import Path

from core_dump_collector import config, metrics

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- table: start, written by make docs -->\n", "<!-- table: end -->\n"
TABLES = {"configuration.md": config.render_markdown, "metrics.md": metrics.render_markdown}


def expected(page: str) -> str:
    """Return the page's text with its table as the code has it now."""
    head, _, rest = (DOCS / page).read_text().partition(START)
    _, _, tail = rest.partition(END)
    return head + START + TABLES[page]() + END + tail


if __name__ == "__main__" and "--write" in sys.argv:
    for page in TABLES:
        (DOCS / page).write_text(expected(page))

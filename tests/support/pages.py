"""Reads the tables and sections of docs/, for tests that compare them with code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def section(page: str, title: str = "") -> str:
    """Return the text below a heading of a page in docs/, up to the next heading; the whole page without a title.

    Raises:
        ValueError: there is no such heading.
    """
    text = (ROOT / "docs" / page).read_text()
    if not title:
        return text
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"docs/{page} has no section {title!r}")
    return found[1]


def rows(text: str, head: str) -> list[list[str]]:
    """Return the cells of each row of the table whose head begins with this cell.

    Raises:
        ValueError: there is no such table.
    """
    found = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)*)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no table has the head | {head} |")
    lines = found[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def codes(text: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall("`([^`]+)`", text)


def column(text: str, head: str) -> list[str]:
    """Return everything between backticks in the first column of a table."""
    return [code for row in rows(text, head) for code in codes(row[0])]

"""What docs/security.md and docs/failure-modes.md claim has a test, and what a metric is called there exists."""

import re
from pathlib import Path

import pytest

from core_dump_collector.metrics import render_markdown

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("security.md", "failure-modes.md")]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows(page):
    """Return the rows of the page's tables that describe a fault or an attack."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [
        line
        for line in lines
        if line.count("|") > 3 and not line.endswith(("| test |", "| held by |", "| command |"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_test_exists(page):
    named = NAMED.findall(page.read_text())
    assert len(named) > 30
    for path, name in named:
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_row_names_a_test():
    security, failures = (rows(page) for page in PAGES)
    threats = [row for row in security if "::" not in row]
    assert len(threats) == 5, "only the threat model's own rows name none"
    assert [row for row in failures if "::" not in row] == []


def test_every_metric_of_the_failure_modes_exists():
    known = set(re.findall(r"`core_dump_(\w+)`", render_markdown()))
    cells = [row.split("|")[4] for row in rows(PAGES[1])]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert len(named) > 10
    assert named <= known

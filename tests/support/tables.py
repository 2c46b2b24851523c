"""Writes the tables of docs/ and the PrometheusRule from their sources: `python tests/support/tables.py --write`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from core_dump_collector import config, metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ALERTS = ROOT / "monitoring/alerts.yml"
RULE = ROOT / "kubernetes/components/alerts/prometheusrule.yaml"
START, END = "<!-- table: start, written by make docs -->\n", "<!-- table: end -->\n"
TABLES = {"configuration.md": config.render_markdown, "metrics.md": metrics.render_markdown}


def expected(page: str) -> str:
    """Return the page's text with its table as the code has it now."""
    head, _, rest = (DOCS / page).read_text().partition(START)
    _, _, tail = rest.partition(END)
    return head + START + TABLES[page]() + END + tail


def expected_rule() -> str:
    """Return the PrometheusRule with the alerts as they are now."""
    head, spec, _ = RULE.read_text().partition("spec:\n")
    _, groups, rules = ALERTS.read_text().partition("groups:\n")
    return head + spec + textwrap.indent(groups + rules, "  ")


if __name__ == "__main__" and "--write" in sys.argv:
    for page in TABLES:
        (DOCS / page).write_text(expected(page))
    RULE.write_text(expected_rule())

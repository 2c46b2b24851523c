"""docs/metrics.md lists every metric that /metrics shows, and no page names another."""

import re

import pytest
from prometheus_client import generate_latest
from tests.support.pages import ROOT, column, section

from core_dump_collector.metrics import Metrics

PACKAGES = {"core_dump_handler", "core_dump_collector", "core_dump_helper", "core_dump_format"}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def shown():
    """Return the names in the text that a Prometheus reads."""
    metrics = Metrics()
    metrics.losses.watch(on=True)
    text = generate_latest(metrics.registry).decode()
    return set(re.findall("^# TYPE (core_dump_[a-z_]+) ", text, re.MULTILINE))


def test_table_lists_every_metric_that_is_served():
    listed = column(section("metrics.md"), "metric")
    assert sorted(listed) == sorted(shown())
    assert "core_dump_build_info" in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_that_a_page_names_is_served(page):
    named = set(re.findall(r"\bcore_dump_[a-z_]+[a-z]", page.read_text())) - PACKAGES
    parts = {name + end for name in shown() for end in ("", "_bucket", "_count", "_sum")}
    assert named <= parts

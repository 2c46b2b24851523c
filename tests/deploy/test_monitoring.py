"""Alert rules and dashboard: promtool takes both; each alert has a scenario and a paragraph; each metric is served."""

from __future__ import annotations

import copy
import json
import re

import pytest
from prometheus_client import generate_latest
from tests.support import deploy

from core_dump_collector.metrics import Metrics

yaml = pytest.importorskip("yaml")
FOLDER = deploy.ROOT / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())
ALERTS = {rule["alert"]: rule for rule in RULES["groups"][0]["rules"]}
SCENARIOS = yaml.safe_load((deploy.ROOT / "tests/deploy/alerts_scenarios.yml").read_text())
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
FOREIGN = {"up", "kube_node_info"}
"""Of Prometheus and of kube-state-metrics."""


def served():
    """Return the names and labels of the samples that a collector serves."""
    metrics = Metrics()
    metrics.losses.watch(on=True)
    for metric in vars(metrics).values():
        names = getattr(metric, "_labelnames", ())
        if names and not metric._metrics:
            metric.labels(*["x"] * len(names))
    samples = {}
    for line in generate_latest(metrics.registry).decode().splitlines():
        match = re.match(r"([a-z_]+)(\{.*\})? ", line)
        if match and not line.startswith("#"):
            samples.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return samples


def metrics_in(expression):
    """Return the names of metrics in a query, with the labels that it selects by."""
    found = re.findall(r"\b((?:core_dump|process|kube)_[a-z_]+|up)\b(?:\{([^}]*)\})?", expression)
    return {(name, label) for name, labels in found for label in ["", *re.findall(r"(\w+)\s*[=!]", labels)]}


def queries():
    """Return the queries of the dashboard by the title of their panel."""
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def without_variables(expression):
    """Return a query as Grafana sends it."""
    return expression.replace("$__rate_interval", "5m").replace("$instance", ".*")


def test_promtool_takes_the_rules_and_finds_a_mistake(tmp_path):
    deploy.succeed(deploy.tool("promtool"), "check", "rules", FOLDER / "alerts.yml")
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((FOLDER / "alerts.yml").read_text().replace("increase(", "incraese(", 1))
    assert deploy.run(deploy.tool("promtool"), "check", "rules", wrong).returncode


def test_every_alert_is_silent_before_its_fault_and_fires_after_it(tmp_path):
    assert {scenario["alert"] for scenario in SCENARIOS} == set(ALERTS)
    rules = copy.deepcopy(RULES)
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    tests = [as_test(scenario) for scenario in SCENARIOS]
    content = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))
    deploy.succeed(deploy.tool("promtool"), "test", "rules", tmp_path / "test.yml")


def as_test(scenario):
    """Return a scenario as promtool reads it."""
    name = scenario["alert"]
    labels = {"severity": ALERTS[name]["labels"]["severity"], **scenario.get("labels", {})}
    return {
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in scenario["series"].items()],
        "alert_rule_test": [
            {"alertname": name, "eval_time": scenario["silent"], "exp_alerts": []},
            {"alertname": name, "eval_time": scenario["fires"], "exp_alerts": [{"exp_labels": labels}]},
        ],
    }


def test_every_alert_has_a_paragraph_that_says_meaning_place_and_remedy():
    page = (deploy.ROOT / "docs/operations.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        paragraph = page.partition(f"\n### {name}\n")[2].partition("\n#")[0]
        for word in ("**Meaning.**", "**Look.**", "**Do.**"):
            assert paragraph.count(word) == 1, (name, word)


@pytest.mark.parametrize("source", ["alerts", "dashboard"])
def test_every_query_asks_for_metrics_and_labels_that_are_served(source):
    samples = served()
    expressions = queries() if source == "dashboard" else [(n, rule["expr"]) for n, rule in ALERTS.items()]
    assert len(expressions) > 15
    for title, expression in expressions:
        for name, label in metrics_in(expression):
            assert name in FOREIGN or name in samples, (title, name)
            assert not label or label in {"instance", "job"} or name in FOREIGN or label in samples[name], (
                title,
                label,
            )


def test_promtool_takes_every_query_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"query:{number}", "expr": without_variables(expression)}
        for number, (_, expression) in enumerate(queries())
    ]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    deploy.succeed(deploy.tool("promtool"), "check", "rules", tmp_path / "queries.yml")


def test_panels_of_the_dashboard_lie_side_by_side():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_component_of_kubernetes_has_the_same_rules():
    rule = yaml.safe_load((deploy.ROOT / "kubernetes/components/alerts/prometheusrule.yaml").read_text())
    assert rule["spec"]["groups"] == RULES["groups"]

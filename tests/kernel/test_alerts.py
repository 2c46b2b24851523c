"""Five faults on a node, watched by a real Prometheus: the right series moves, and the right alert fires."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request

import pytest
from tests.deploy.test_monitoring import RULES, queries, without_variables
from tests.kernel.test_losses import COLLECTOR, Losses, print_suppressed
from tests.support import deploy, kernel, s3
from tests.support.cleanup import guarded
from tests.support.collector import running, wait_until

yaml = pytest.importorskip("yaml")
SCRAPE = """
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: [{rules}]
scrape_configs:
  - job_name: core-dump-collector
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


class Prometheus:
    """A Prometheus that watches one collector with our rules, which do not wait."""

    def __init__(self, port):
        self.port = port

    def ask(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            content = json.load(answer)
        assert content["status"] == "success"
        return content["data"]

    def firing(self):
        """Return names and reasons of the alerts that fire."""
        alerts = self.ask("alerts")["alerts"]
        return {
            (a["labels"]["alertname"], a["labels"].get("reason", ""))
            for a in alerts
            if a["state"] == "firing"
        }

    def value(self, query):
        result = self.ask("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None


@contextlib.contextmanager
def prometheus(directory, port):
    rules = json.loads(json.dumps(RULES))
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
    (directory / "rules.yml").write_text(yaml.safe_dump(rules))
    (directory / "prometheus.yml").write_text(SCRAPE.format(rules=directory / "rules.yml", port=port))
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    command = [deploy.tool("prometheus"), f"--config.file={directory}/prometheus.yml"]
    command += [f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{own}"]
    with open(directory / "prometheus.log", "wb") as log:
        process = subprocess.Popen(guarded(command), stderr=log, stdout=log)
    try:
        server = Prometheus(own)

        def scraped():
            with contextlib.suppress(OSError):
                return server.value("core_dump_kernel_log_watched") == 1
            return False

        wait_until(scraped, 30, "the first scrape")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def test_five_faults_move_their_series_and_fire_their_alerts(node, seaweed, bucket, tmp_path):
    deploy.tool("prometheus")
    environ = {**seaweed.environ(), "KERNEL_LOG": "auto", "RETRY_SECONDS": "1"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(node.installed(pipe_limit=0))
        stack.enter_context(leading_here(node))
        print_suppressed(node)
        collector = stack.enter_context(
            running(node.watch_dir, environ, tmp_path, program=COLLECTOR.format(grace=3.0))
        )
        server = stack.enter_context(prometheus(tmp_path, collector.port))
        losses = Losses(node, collector)

        def fires(alert, reason=""):
            wait_until(lambda: (alert, reason) in server.firing(), 30, f"{alert} {reason}")

        losses.crash(6)
        wait_until(lambda: server.value("sum(core_dump_dumps_total)"), 30, "the first dump")
        quiet = {
            "CoreDumpCollectorDown",
            "CoreDumpLostInKernel",
            "CoreDumpHelperFails",
            "CoreDumpPatternTaken",
        }
        assert not quiet & {name for name, _ in server.firing()}

        losses.helper_missing()
        fires("CoreDumpLostInKernel", "helper_missing")
        assert server.value('core_dump_kernel_dropped_total{reason="helper_missing"}') == 1

        losses.pipe_limit()
        fires("CoreDumpLostInKernel", "pipe_limit")
        assert server.value('core_dump_kernel_dropped_total{reason="pipe_limit"}') == 1

        with read_only(node.watch_dir):
            losses.crash(6, "helper", "directory")
        fires("CoreDumpHelperFails", "directory")
        assert server.value('core_dump_helper_failures_total{reason="directory"}') == 1

        with losses.pattern("|/bin/false"):
            fires("CoreDumpPatternTaken")
            assert server.value("core_dump_core_pattern_taken_total") >= 1

        for title, expression in queries():
            found = server.ask("query", query=without_variables(expression))["result"]
            assert found or re.search("quantile|topk|> 0", expression), title


def test_refused_store_fires_its_alert(seaweed, bucket, watch_dir, tmp_path):
    deploy.tool("prometheus")
    environ = seaweed.environ(s3.STRANGER) | {"KERNEL_LOG": "auto"}
    with (
        running(watch_dir, environ, tmp_path, program=COLLECTOR.format(grace=3.0)) as collector,
        prometheus(tmp_path, collector.port) as server,
    ):
        (watch_dir / "core-app-1700000000-7-11.gz.partial").write_bytes(gzip.compress(b"core"))
        (watch_dir / "core-app-1700000000-7-11.gz.partial").rename(watch_dir / "core-app-1700000000-7-11.gz")
        wait_until(lambda: ("CoreDumpStoreRefuses", "forbidden") in server.firing(), 30, "the alert")
        assert server.value('core_dump_store_reachable{reason="forbidden"}') == 0


@contextlib.contextmanager
def leading_here(node):
    """Name the helper's configuration in the pattern, so that the collector sees where a crash leads."""
    arguments = "-P%P -p%p -s%s -t%t -d%d -- %e"
    before = kernel.PATTERN.read_text()
    kernel.PATTERN.write_text(
        f"|{node.directory}/core-dump-helper -C{node.directory}/helper.conf {arguments}\n"
    )
    try:
        yield
    finally:
        kernel.PATTERN.write_text(before)


@contextlib.contextmanager
def read_only(directory):
    """Make a directory refuse every change, also to root."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)

"""Measure `core-dumps list` on many dumps: python -m tests.cli.measure_list [--help], from the top level.

The bucket is served by a process of its own whose keys are computed (tests/support/keyspace.py), so it is there at
once. Printed for each command: lines, seconds until the first line and until the end, CPU seconds, requests.
"""

# ruff: noqa: T201  prints its figures

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = (
    "list",
    "list -n 100",
    "list -S yesterday",
    "list --node node-042",
    "list --json=short",
    "list -S -1h --group",
    "list -S -1d --all",
    "stats -S -1d",
    "info --no-core",
)
HEAVY = ("list --all", "list --group", "stats")


@contextlib.contextmanager
def server(asked: argparse.Namespace) -> Iterator[str]:
    """Run the server and yield its endpoint."""
    command = [
        sys.executable,
        "-m",
        "tests.support.keyspace",
        f"--count={asked.count}",
        f"--nodes={asked.nodes}",
    ]
    command += [f"--template={asked.template}", f"--latency={asked.latency}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def measure(words: str, environ: dict[str, str]) -> str:
    """Run a command and return what it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "core_dumps.cli", *words.split(), "-v"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        lines, first = 0, None
        for _ in process.stdout:
            first = first or time.monotonic() - began
            lines += 1
        told = process.stderr.read().decode().strip().splitlines()[-1].partition("requests: ")[2]
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        f"{words:24} {lines:7} lines  first {first or 0:6.2f} s  {seconds:6.2f} s  CPU {cpu:6.2f} s  {told}"
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="dumps")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--template", default="{node}/{name}")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that each answer is held back")
    parser.add_argument("--heavy", action="store_true", help="also commands that read all metadata")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="such as 'list -n 5'")
    asked = parser.parse_args()
    with server(asked) as endpoint:
        environ = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": "A",
            "AWS_SECRET_ACCESS_KEY": "S",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "BUCKET_NAME": "dumps",
            "KEY_TEMPLATE": asked.template,
        }
        print(
            f"{asked.count} dumps of {asked.nodes} nodes, {asked.template}, answers after {asked.latency} s"
        )
        for words in asked.commands or (*COMMANDS, *(HEAVY if asked.heavy else ())):
            print(measure(words, environ), flush=True)


if __name__ == "__main__":
    main()

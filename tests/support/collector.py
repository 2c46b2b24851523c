"""Runs the collector as its users do: a process of its own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.cleanup import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

COMMAND = [sys.executable, "-m", "core_dump_collector.cli"]
IMPATIENT = """
import sys
from core_dump_collector import partials
from core_dump_collector.cli import main
partials.ABANDONED_SECONDS = 0.5
sys.exit(main())
"""
"""A collector that salvages partials at once: for tests in which no helper writes."""


def wait_until(condition: Callable[[], object], seconds: float = 30.0, what: str = "") -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it did not within some seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            message = f"not within {seconds} s: {what or condition}"
            raise TimeoutError(message)
        time.sleep(0.02)


def run_check(directory: Path, environ: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `check` with these variables and none of this process's own store."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BUCKET"))}
    return subprocess.run(
        [*COMMAND, "check", str(directory), *flags],
        env=clean | {"BUCKET_NAME": "dumps", "AWS_EC2_METADATA_DISABLED": "true"} | dict(environ),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def flood(directory: Path) -> None:
    """Cause more events than an inotify queue holds, with a file that is none of the collector's business."""
    with open("/proc/sys/fs/inotify/max_queued_events") as file:
        enough = int(file.read()) // 2 + 100
    one, other = directory / "flood-a", directory / "flood-b"
    one.write_bytes(b"")
    for _ in range(enough):
        one.rename(other)
        other.rename(one)
    one.unlink()


@dataclass
class Collector:
    """A running collector."""

    process: subprocess.Popen[bytes]
    log_path: Path
    startup_file: Path
    _port: int | None = field(default=None)

    def log(self) -> list[dict[str, object]]:
        """Return its log so far."""
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def port(self) -> int:
        """Return the port of /metrics."""
        if self._port is None:
            wait_until(lambda: any(e["event"] == "started" for e in self.log()), 10, "the log's first line")
            self._port = next(int(str(e["port"])) for e in self.log() if e["event"] == "started")
        return self._port

    def wait_ready(self, seconds: float = 30.0) -> None:
        """Wait for the start-up file to say so."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"collector exited {self.process.returncode}: {self.log_path.read_text()}"
                )
            return self.startup_file.exists() and self.startup_file.read_text() == "ready\n"

        wait_until(ready, seconds, "collector ready")

    def get(self, path: str) -> str:
        """Return the body of a path of its HTTP server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Return the value of one sample, by its whole name with labels."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def workers(self) -> list[int]:
        """Return the pids of its worker processes."""
        return [pid for pid in descendants(self.process.pid) if "forkserver" in command_of(pid)][1:]

    def stop(self, seconds: float = 30.0) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Send SIGKILL to the daemon alone and reap it."""
        self.process.kill()
        self.process.wait()


def command_of(pid: int) -> str:
    """Return a process's command line, empty when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode(errors="replace")
    return ""


def descendants(pid: int) -> list[int]:
    """Return all living descendants of a process, parents first."""
    found = []
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(c) for c in file.read().split()]
    except OSError:
        return []
    for child in children:
        found += [child, *descendants(child)]
    return found


@contextlib.contextmanager
def running(
    directory: Path,
    environ: Mapping[str, str],
    scratch: Path,
    *flags: str,
    wait: bool = True,
    prefix: Sequence[str] = (),
    program: str = "",
) -> Iterator[Collector]:
    """Run `core-dump-collector run` on a directory; its log and start-up file go below `scratch`.

    `prefix` are words before the command, of a program that becomes it (exec). `program` is Python code to run
    in place of the collector's own.
    """
    command = [sys.executable, "-c", program] if program else COMMAND
    number = sum(1 for _ in scratch.glob("collector-*.log"))
    log_path = scratch / f"collector-{number}.log"
    startup_file = scratch / f"startup-{number}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    settings = {
        "BUCKET_NAME": "dumps",
        "NODE_NAME": "node-1",
        "MODULES": "false",  # tests of modules set it; others look at all that is in the directory
        "KEY_TEMPLATE": "{node}/{name}",  # does not depend on the day
        "METRICS_ADDRESS": "127.0.0.1",
        "METRICS_PORT": "0",
        "STARTUP_FILE": str(startup_file),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "debug",
        "AWS_EC2_METADATA_DISABLED": "true",
        "SHUTDOWN_SECONDS": "10",
        "KERNEL_LOG": "off",  # it tells of strangers' crashes on this machine
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            guarded([*prefix, *command, "run", str(directory), *flags]),
            env=clean | settings | dict(environ),
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    collector = Collector(process, log_path, startup_file)
    try:
        if wait:
            collector.wait_ready()
        yield collector
    finally:
        orphans = descendants(process.pid)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in orphans:
            if "core_dump_collector" in command_of(pid) or "forkserver" in command_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

"""`list`, then `bt`, over a link of 30 ms and without any file of the program: `make test-programs`."""

from __future__ import annotations

import contextlib
import gzip
import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import pytest
from tests.cli.conftest import ROOT, Cli
from tests.integration.test_modules import IMPATIENT, MODULES
from tests.kernel.test_modules import comparable, frames
from tests.support import s3
from tests.support.collector import running, wait_until
from tests.support.culprits import crash_now, eight_threads, golang, java, node_js, python, redis

ROUND_TRIP_SECONDS, BYTES_PER_SECOND = 0.03, 100e6
ELSEWHERE = """
import sys
from core_dumps import buildid
buildid.Search.find = lambda self, module: module
from core_dumps.start import main
sys.argv[0] = "core-dumps"
main()
"""
"""The program on a machine that has none of the files."""


@contextlib.contextmanager
def far(server):
    """Yield the server behind the link."""
    (port,) = s3.free_ports(1)
    numbers = map(str, (port, server.port, ROUND_TRIP_SECONDS, BYTES_PER_SECOND))
    command = [sys.executable, "-m", "bench.link", *numbers]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            assert s3.wait_for_port(port, process)
            yield replace(server, endpoint=f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def timed(cli, *words):
    """Run a command in a process of its own; return its output and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words],
        env=cli.variables(),
        cwd=cli.home,
        capture_output=True,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "backslashreplace"), seconds


def fetched_bytes(cli, bucket, key):
    """Return the bytes of the objects of which copies are in the cache."""
    sizes = s3.keys_in(bucket, prefix=f"{cli.prefix}/")
    cached = [path.stem for path in (cli.home / ".cache" / "core-dumps").glob("*.module")]
    assert cached
    modules = sum(sizes[f"{cli.prefix}/_modules/sha256/{sha256}"] for sha256 in cached)
    (dump,) = cli.json(f"key={key}")
    return modules + dump.get("vital_bytes", sizes[key]), sizes[key]


@pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("crash", [eight_threads, golang, python, node_js, java, redis])
def test_two_commands_give_the_backtrace_of_gdb_on_the_original_files(node, seaweed, bucket, tmp_path, crash):
    prefix = f"morning-{uuid.uuid4().hex[:8]}"
    environ = seaweed.environ(s3.WRITER) | MODULES | {"BUCKET_NAME": f"s3://{s3.BUCKET}/{prefix}"}
    with running(node.watch_dir, environ, tmp_path, program=IMPATIENT) as collector:
        directory = node.watch_dir / ".modules"
        wait_until((directory / "collector").exists, 60, "the collector's mark")
        with node.installed():
            program = crash_now(node, crash)
        lists = f"{prefix}/"
        wait_until(
            lambda: any(key.endswith(".gz.modules.json") for key in s3.keys_in(bucket, prefix=lists)),
            200,
            "the list",
        )
        wait_until(lambda: not list(directory.glob("module-*")), 200, "the modules")
        wait_until(lambda: collector.metric("core_dump_modules_waiting_files") == 0, 60)
    (key,) = [key for key in s3.keys_in(bucket, prefix=f"{prefix}/") if key.endswith(".gz")]
    core = node.directory / "core"
    core.write_bytes(gzip.decompress(s3.body_of(bucket, key)))
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all -ascending bt 256", program, core]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = frames(done.stdout.decode("utf-8", "backslashreplace"))
    assert len(expected) > 3
    with far(seaweed) as server:
        cli = Cli(server, prefix, tmp_path)
        listed, first = timed(cli, "list")
        (pid,) = [line.split()[6] for line in listed.splitlines()[1:]]
        text, second = timed(cli, "bt", pid)
        _, again = timed(cli, "bt", pid)
        fetched, whole = fetched_bytes(cli, bucket, key)
    assert [comparable(line, crash) for line in frames(text)] == [
        comparable(line, crash) for line in expected
    ]
    print(  # noqa: T201  figures for docs/core-dumps.md
        f"| {crash.__name__} | {len(core.read_bytes()) / 1e6:.0f} MB | {whole / 1e6:.1f} MB | {fetched / 1e6:.1f} MB "
        f"| {first:.1f} s | {second:.1f} s | {again:.1f} s |"
    )
    assert first + second < 60

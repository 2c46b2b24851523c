"""`make demo`: one real crash, from the kernel to an S3 server on this machine and back.

Shows each step as it happens. Nothing is left behind, even when the demo is killed: the core pattern is restored, the
collector ends, and all files lie in a temporary directory that is removed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from moto.server import ThreadedMotoServer
from tests.support import cores, kernel
from tests.support.cleanup import exit_on_signals, temporary_directory
from tests.support.collector import running, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mypy_boto3_s3 import S3Client
    from tests.support.collector import Collector

BUCKET = "demo-dumps"
SYSTEM_PYTHON = "/usr/bin/python3"
MEBIBYTE = 1024 * 1024
CRASHING = """
import ctypes, os, sys
memory = [os.urandom(1024) + bytes(7168) for _ in range(12_000)]   # 94 MiB, as mixed as memory is
sys.stdout.write("ready\\n"); sys.stdout.flush()
ctypes.string_at(0)                                               # SIGSEGV
"""
STARTED = time.monotonic()


def say(text: str) -> None:
    """Print a step with the time since the start."""
    sys.stdout.write(f"{time.monotonic() - STARTED:6.1f} s  {text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Client]:
    """Serve S3 on a free port of loopback, in this process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://{host}:{port}"
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        say(f"S3 server on {host}:{port}, bucket {BUCKET}")
        yield client
    finally:
        server.stop()


@contextlib.contextmanager
def collecting(directory: Path, scratch: Path) -> Iterator[Collector]:
    """Run the collector on a directory; stop it in order."""
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings = {"BUCKET_NAME": BUCKET, "NODE_NAME": "demo-node", "KEY_TEMPLATE": ""}
    with running(directory, store | settings, scratch) as collector:
        say(f"collector watches {directory}")
        yield collector
        code = collector.stop()
        says = collector.startup_file.read_text()
        say(f"collector stopped in order, exit code {code}; its start-up file says {says!r}")


def install_helper(scratch: Path, directory: Path) -> str:
    """Put the helper and its configuration where only root writes; return the core pattern."""
    isal = next((path for path in map(Path, sys.path) if (path / "isal").is_dir()), None)
    settings: dict[str, object] = {
        "WATCH_DIR": directory,
        "KEEP_FREE_PERCENT": 1,
    }  # whatever disk this is tried on
    settings |= {"PYTHON_PATH": isal} if isal else {}
    python = SYSTEM_PYTHON if Path(SYSTEM_PYTHON).exists() else sys.executable
    return kernel.install_helper(scratch, settings, python)


def crash_through_kernel(scratch: Path, directory: Path) -> str:
    """Crash a process; return its pid."""
    pattern = install_helper(scratch, directory)
    with kernel.core_pattern(pattern, say=say) as before:
        say(f"kernel.core_pattern is {pattern[:60]}...")
        process = subprocess.Popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE, cwd=scratch)
        with process:
            assert process.stdout is not None  # noqa: S101  for the type checker
            process.stdout.readline()
            begun = time.monotonic()
            code = process.wait()
        name = signal.Signals(-code).name
        say(f"process {process.pid} crashed with {name}; held for {time.monotonic() - begun:.2f} s")
    say(f"kernel.core_pattern is {before!r} again")
    return str(process.pid)


def crash_by_hand(scratch: Path, directory: Path) -> str:
    """Without root: let the helper read a core of our own making from a pipe, as the kernel would feed it."""
    say("only root may set kernel.core_pattern: the core comes from this process instead of the kernel")
    install_helper(scratch, directory)
    core = cores.simple(b"".join(os.urandom(1024) + bytes(7168) for _ in range(8192)))
    pid, now = os.getpid(), int(time.time())
    arguments = f"-P{pid} -p{pid} -i{pid} -u{os.getuid()} -g{os.getgid()} -s11 -t{now} -d1 -- demo"
    subprocess.run([scratch / "core-dump-helper", *arguments.split()], input=core, check=True)
    return str(pid)


def samples(port: int) -> dict[str, float]:
    """Return every sample of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def show_result(client: S3Client, pid: str) -> None:
    """Fetch the object back and prove what it is."""
    keys = {o["Key"]: o["Size"] for o in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    key = next(k for k in keys if k.endswith(".gz"))
    metadata = json.loads(client.get_object(Bucket=BUCKET, Key=key + ".json")["Body"].read())
    say(f"object  s3://{BUCKET}/{key}")
    say(
        "its metadata object: " + json.dumps({k: metadata.get(k) for k in ("comm", "signal", "pid", "state")})
    )
    packed = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    core = gzip.decompress(packed)
    sizes = f"{len(core) / MEBIBYTE:.1f} MiB of core in {len(packed) / MEBIBYTE:.1f} MiB of object"
    say(f"{sizes}, {len(core) / len(packed):.1f} times smaller")
    good = core.startswith(b"\x7fELF") and len(core) == metadata["bytes"] == metadata["expected_bytes"]
    if not good or str(metadata["pid"]) != pid or metadata["state"] != "complete":
        raise SystemExit(f"demo: what came back is not the core of process {pid}: {metadata}")
    digest = hashlib.sha256(core).hexdigest()[:16]
    say(f"fetched back: an ELF core, every byte that its headers promise, sha256 {digest}…")


def show_listing() -> None:
    """Show the dump as a developer sees it."""
    say("$ core-dumps list")
    command = [sys.executable, "-m", "core_dumps.cli", "list"]
    listed = subprocess.run(
        command, env=os.environ | {"BUCKET_NAME": BUCKET}, check=True, stdout=subprocess.PIPE
    )
    sys.stdout.write(listed.stdout.decode())
    say("`core-dumps bt` and `core-dumps debug` open it in a debugger: docs/core-dumps.md")


def main() -> None:
    """Run the demo."""
    exit_on_signals()
    crash = crash_through_kernel if kernel.can_crash() else crash_by_hand
    parent = "/var/tmp" if kernel.can_crash() else None  # noqa: S108  a short path: the kernel takes 127 bytes
    with temporary_directory("cdh-", parent) as scratch:
        directory = scratch / "core_dumps"
        directory.mkdir(mode=0o700)
        with s3_server() as client:
            with collecting(directory, scratch) as collector:
                before = samples(collector.port)
                pid = crash(scratch, directory)
                uploaded = 'core_dump_uploads_total{result="uploaded"}'
                wait_until(lambda: collector.metric(uploaded) > 0, 60, "the upload")
                left = [path.name for path in directory.glob("core*")]
                say(f"uploaded; left in the watch directory: {left or 'nothing'}")
                for name, value in samples(collector.port).items():
                    moved = value - before.get(name, 0)
                    if moved and not re.search("_bucket|_created|free_bytes", name):
                        say(f"  metric {name} {value:g}")
            show_result(client, pid)
            show_listing()
            say("done")


if __name__ == "__main__":
    main()

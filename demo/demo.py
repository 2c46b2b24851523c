"""`make demo`: one real crash, from the kernel to an S3 server on this machine and back.

Shows each step as it happens. Nothing is left behind: the core pattern is restored in every exit path, and
all files lie in a temporary directory that is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mypy_boto3_s3 import S3Client

HELPER = Path(__file__).parents[1] / "helper" / "core-dump-helper"
PATTERN = Path("/proc/sys/kernel/core_pattern")
LOCK = "/run/lock/core-pattern.lock"
BUCKET = "demo-dumps"
VALUES = "-P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e"
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


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll until a condition holds; end the demo when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: gave up waiting for {what}")
        time.sleep(0.02)


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
def collector(directory: Path, scratch: Path) -> Iterator[int]:
    """Run the collector on a directory; yield the port of /metrics."""
    startup, log_path = scratch / "startup", scratch / "collector.log"
    command = [sys.executable, "-m", "core_dump_collector.cli", "run", str(directory)]
    command += ["--bucket-name", BUCKET, "--metrics-address", "127.0.0.1", "--metrics-port", "0"]
    command += ["--startup-file", str(startup), "--log-format", "json", "--node-name", "demo-node"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        wait_for(lambda: startup.exists() and startup.read_text() == "ready\n", "the collector")
        started = next(json.loads(line) for line in log_path.read_text().splitlines() if '"started"' in line)
        say(f"collector watches {directory}")
        yield int(started["port"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        say(f"collector stopped in order, exit code {process.returncode}; it says: {startup.read_text()!r}")


@contextlib.contextmanager
def core_pattern(pattern: str) -> Iterator[None]:
    """Set kernel.core_pattern for a while: the only user of it on this machine meanwhile."""
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = PATTERN.read_text()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))
        try:
            PATTERN.write_text(pattern)
            if PATTERN.read_text().rstrip("\n") != pattern:
                raise SystemExit("demo: the kernel cut the core pattern short")
            yield
        finally:
            PATTERN.write_text(old)
            say(f"kernel.core_pattern is {old.strip()!r} again")


def install_helper(scratch: Path, directory: Path) -> str:
    """Put the helper and its configuration where only root writes; return the core pattern."""
    program, config = scratch / "h", scratch / "c"
    shutil.copytree(HELPER.with_name("core_dump_helper"), scratch / "core_dump_helper")
    shutil.copy(HELPER, program)
    isal = next((p for p in map(Path, sys.path) if (p / "isal").is_dir()), None)
    lines = [f"WATCH_DIR={directory}"] + ([f"PYTHON_PATH={isal}"] if isal else [])
    config.write_text("\n".join(lines) + "\n")
    config.chmod(0o600)
    if Path("/usr/bin/python3").exists():
        return f"|{program} -C{config} {VALUES}"
    return f"|{sys.executable} -IS {program} -C{config} {VALUES}"


def crash_through_kernel(scratch: Path, directory: Path) -> str:
    """Crash a process; return its name in the watch directory's terms."""
    pattern = install_helper(scratch, directory)
    with core_pattern(pattern):
        say(f"kernel.core_pattern is {pattern[:60]}...")
        process = subprocess.Popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE, cwd=scratch)
        with process:
            assert process.stdout is not None  # noqa: S101  for the type checker
            process.stdout.readline()
            begun = time.monotonic()
            code = process.wait()
        name = signal.Signals(-code).name
        say(f"process {process.pid} crashed with {name}; held for {time.monotonic() - begun:.2f} s")
    return str(process.pid)


def crash_by_hand(scratch: Path, directory: Path) -> str:
    """Without root: let the helper read a core of our own making from a pipe, as the kernel would feed it."""
    say(
        "kernel.core_pattern is not ours to set (root only): the core comes from this process instead of the kernel"
    )
    config = scratch / "c"
    config.write_text(f"WATCH_DIR={directory}\n")
    core = make_core(64 * MEBIBYTE)
    arguments = ["-C" + str(config), f"-P{os.getpid()}", f"-p{os.getpid()}", f"-i{os.getpid()}"]
    arguments += [
        f"-u{os.getuid()}",
        f"-g{os.getgid()}",
        "-s11",
        f"-t{int(time.time())}",
        "-d1",
        "--",
        "demo",
    ]
    subprocess.run([sys.executable, "-IS", str(HELPER), *arguments], input=core, check=True)
    return str(os.getpid())


def make_core(size: int) -> bytes:
    """Return a small valid ELF core: one segment of mixed memory."""
    import struct  # noqa: PLC0415  only here

    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 6, 4096, 0x1000, 0, size, size, 4096)
    memory = b"".join(os.urandom(1024) + bytes(7168) for _ in range(size // 8192))
    return (header + segment).ljust(4096, b"\0") + memory


def samples(port: int) -> dict[str, float]:
    """Return every sample of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def show_result(client: S3Client, pid: str) -> None:
    """Fetch the object back and prove what it is."""
    keys = {o["Key"]: o["Size"] for o in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    key = next(k for k in keys if k.endswith(".gz"))
    sidecar = json.loads(client.get_object(Bucket=BUCKET, Key=key + ".json")["Body"].read())
    say(f"object  s3://{BUCKET}/{key}")
    say(f"sidecar {key}.json: " + json.dumps({k: sidecar.get(k) for k in ("comm", "signal", "pid", "state")}))
    packed = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    core = gzip.decompress(packed)
    sizes = f"{len(core) / MEBIBYTE:.1f} MiB of core in {len(packed) / MEBIBYTE:.1f} MiB of object"
    say(f"{sizes}, {len(core) / len(packed):.1f} times smaller")
    good = core.startswith(b"\x7fELF") and len(core) == sidecar["bytes"] == sidecar["expected_bytes"]
    if not good or str(sidecar["pid"]) != pid or sidecar["state"] != "complete":
        raise SystemExit(f"demo: what came back is not the core of process {pid}: {sidecar}")
    digest = hashlib.sha256(core).hexdigest()[:16]
    say(f"fetched back: an ELF core, every byte that its headers promise, sha256 {digest}…")


def main() -> None:
    """Run the demo."""
    scratch = Path(tempfile.mkdtemp(prefix="cdh-", dir="/var/tmp" if os.geteuid() == 0 else None))  # noqa: S108
    directory = scratch / "core_dumps"
    directory.mkdir(mode=0o700)
    try:
        with s3_server() as client:
            with collector(directory, scratch) as port:
                before = samples(port)
                crash = crash_through_kernel if os.access(PATTERN, os.W_OK) else crash_by_hand
                pid = crash(scratch, directory)
                wait_for(
                    lambda: samples(port)['core_dump_uploads_total{result="uploaded"}'] > 0, "the upload"
                )
                left = [f.name for f in directory.iterdir() if f.name.startswith("core")]
                say(f"uploaded; left in the watch directory: {left or 'nothing'}")
                for name, value in samples(port).items():
                    moved = value - before.get(name, 0)
                    if moved and not re.search("_bucket|_created|free_bytes", name):
                        say(f"  metric {name} {value:g}")
            show_result(client, pid)
            say("done")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()

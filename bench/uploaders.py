"""What brings files to S3: ours as a daemon, and the peers as their documentation runs them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.collector import running

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.support.s3 import S3Server

    from bench.cgroup import Group

BUCKET = "dumps"

BOTO3_LOOP = """
import os, sys, boto3
client = boto3.client("s3")
client.list_buckets()
for line in iter(sys.stdin.readline, ""):
    path, prefix = line.split()
    names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
    for name in names:
        key = prefix + (name or os.path.basename(path))
        client.upload_file(os.path.join(path, name) if name else path, "dumps", key)
    print("done", flush=True)
"""


def program(name: str) -> str:
    """Return a peer's program, from the environment that runs this."""
    beside = Path(sys.prefix) / "bin" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is missing")
    return found


def commands(server: S3Server) -> dict[str, tuple[str, str]]:
    """Return for each peer its command for one file and for a directory; FROM and TO are filled in."""
    s5cmd = f"{program('s5cmd')} --endpoint-url {server.endpoint} cp"
    rclone = f"{program('rclone')} --config /dev/null"
    aws = f"{program('aws')} s3 cp --only-show-errors"
    return {
        "aws s3 cp": (f"{aws} FROM s3://{BUCKET}/TO", f"{aws} --recursive FROM s3://{BUCKET}/TO"),
        "rclone copy": (f"{rclone} copyto FROM :s3:{BUCKET}/TOf", f"{rclone} copy FROM :s3:{BUCKET}/TO"),
        "s5cmd cp": (
            f"{s5cmd} FROM s3://{BUCKET}/TO >/dev/null",
            f"{s5cmd} FROM/ s3://{BUCKET}/TO >/dev/null",
        ),
    }


def environ(server: S3Server) -> dict[str, str]:
    """Return the environment in which all of them reach the server."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RCLONE_"))}
    rclone = {
        "RCLONE_S3_PROVIDER": "SeaweedFS",
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_ENDPOINT": server.endpoint,
    }
    return clean | rclone | server.environ() | {"AWS_EC2_METADATA_DISABLED": "true"}


@dataclass(frozen=True)
class Run:
    """One measurement, in seconds."""

    wall: float
    cpu: float


def run_command(command: str, group: Group, variables: Mapping[str, str]) -> Run:
    """Run a peer's command, from nothing to its exit."""
    cpu, begin = group.cpu_seconds(), time.perf_counter()
    subprocess.run(["/bin/sh", "-c", f"{group.join}; {command}"], env=dict(variables), check=True)
    return Run(time.perf_counter() - begin, group.cpu_seconds() - cpu)


@dataclass
class Loop:
    """`boto3.upload_file` in a loop, in a process that has imported and connected already."""

    process: subprocess.Popen[str]
    group: Group

    def run(self, path: Path, prefix: str) -> Run:
        """Upload a file or the files of a directory."""
        cpu, begin = self.group.cpu_seconds(), time.perf_counter()
        print(path, prefix, file=self.process.stdin, flush=True)
        if self.process.stdout is None or self.process.stdout.readline() != "done\n":
            raise RuntimeError("the loop has failed")
        return Run(time.perf_counter() - begin, self.group.cpu_seconds() - cpu)


@contextlib.contextmanager
def boto3_loop(group: Group, server: S3Server) -> Iterator[Loop]:
    """Run the loop's process."""
    command = ["/bin/sh", "-c", f'{group.join}; exec {sys.executable} -c "$0"', BOTO3_LOOP]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ(server)) as process:
        yield Loop(process, group)
        if process.stdin:
            process.stdin.close()


@dataclass
class Uploader:
    """Ours, running."""

    process: subprocess.Popen[bytes]
    directory: Path
    group: Group
    ready_seconds: float

    def waiting(self) -> int:
        """Return how many dumps lie in its directory."""
        return sum(1 for entry in os.scandir(self.directory) if entry.name.startswith("core"))

    def run(self, files: list[Path], seconds: float = 300) -> Run:
        """Rename files into the directory, as the helper does; wait until every one is uploaded and deleted."""
        cpu, begin = self.group.cpu_seconds(), time.perf_counter()
        for path in files:
            path.rename(self.directory / path.name)
        while self.waiting():
            if time.perf_counter() - begin > seconds or self.process.poll() is not None:
                raise TimeoutError(f"the collector left {self.waiting()} dumps")
            time.sleep(0.01)
        return Run(time.perf_counter() - begin, self.group.cpu_seconds() - cpu)

    def pss_kib(self) -> int:
        """Return the proportional memory of all its processes."""
        total = 0
        for pid in self.group.members():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(text.partition("\nPss:")[2].split()[0])
        return total


@contextlib.contextmanager
def collector(  # noqa: PLR0913  a run can differ in each
    directory: Path,
    group: Group,
    server: S3Server,
    join: str = ":",
    *,
    warm: bool = True,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Uploader]:
    """Run ours on a directory until it says that it is ready, and through a first few dumps."""
    directory.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "BUCKET_NAME": BUCKET,
        "NODE_NAME": directory.name,
        "LOG_LEVEL": "warning",
        **(variables or {}),
    }
    prefix = ["/bin/sh", "-c", f'{group.join}; {join}; exec "$@"', "sh"]
    begin = time.perf_counter()
    with running(directory, server.environ() | settings, directory.parent, prefix=prefix) as ours:
        uploader = Uploader(ours.process, directory, group, time.perf_counter() - begin)
        if warm:
            uploader.run(make_dumps(directory.with_suffix(".warm"), 16, 1000))
        yield uploader


def make_dumps(directory: Path, count: int, size: int) -> list[Path]:
    """Write small gzip-like files under names that the helper would give."""
    directory.mkdir(mode=0o700, exist_ok=True)
    body = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + os.urandom(max(0, size - 10))
    stamp = int(time.time())
    paths = []
    for number in range(count):
        path = directory / f"core-bench-{stamp}-{number}-11.gz"
        path.write_bytes(body)
        paths.append(path)
    return paths

"""The collector beside its peers: one large file, many small ones, a raw core, latency, idle cost, bounds."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import inotify_simple

from bench import cgroup, uploaders
from bench.hold import watched
from bench.uploaders import BUCKET, Run

if TYPE_CHECKING:
    from pathlib import Path

    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef
    from tests.support.s3 import S3Server

    from bench.cgroup import Group

MIB = 1 << 20
OURS, BOTO3 = "ours", "boto3.upload_file loop"
Table = dict[str, list[Run]]


@dataclass(frozen=True)
class Bench:
    """Where everything happens."""

    root: Path
    server: S3Server
    group: Group

    def empty_bucket(self) -> None:
        """Delete every object, so that the server's disk does not fill."""
        with self.server.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
            for page in pages:
                keys: list[ObjectIdentifierTypeDef] = [
                    {"Key": item["Key"]} for item in page.get("Contents", [])
                ]
                if keys:
                    client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})

    def peers(self, path: Path, prefix: str) -> dict[str, str]:
        """Return the peers' commands for a file or a directory."""
        which = 1 if path.is_dir() else 0
        return {
            name: pair[which].replace("FROM", str(path)).replace("TO", prefix)
            for name, pair in uploaders.commands(self.server).items()
        }


def make_file(path: Path, size: int) -> Path:
    """Write a file that begins like gzip and does not compress."""
    tile = os.urandom(16 * MIB)
    with path.open("wb") as out:
        out.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
        while (left := size - out.tell()) > 0:
            out.write(tile[:left])
        out.flush()
        os.fsync(out.fileno())
    return path


def compare(bench: Bench, source: Path, rounds: int, *, loop: bool = True) -> Table:
    """Upload a file, or the files of a directory, with each of them in alternating rounds; boto3 only with `loop`."""
    table: Table = defaultdict(list)
    variables = uploaders.environ(bench.server)
    stage = bench.root / "stage"
    with (
        cgroup.group("ours") as own_group,
        uploaders.collector(bench.root / "watch", own_group, bench.server) as ours,
        uploaders.boto3_loop(bench.group, bench.server) as boto3,
    ):
        for turn in range(rounds):
            names = [OURS, *([BOTO3] if loop else []), *bench.peers(source, "")]
            for name in names if turn % 2 == 0 else reversed(names):
                prefix = f"{name.split()[0]}-{turn}/"
                if turn and name != OURS and _is_slow(table, name):
                    continue
                if name == OURS:
                    shutil.rmtree(stage, ignore_errors=True)
                    files = copy_for_us(source, stage, turn)
                    table[name].append(ours.run(files))
                elif name == BOTO3:
                    table[name].append(boto3.run(source, prefix))
                else:
                    command = bench.peers(source, prefix)[name]
                    table[name].append(uploaders.run_command(command, bench.group, variables))
                if source.is_file():
                    bench.empty_bucket()
    return dict(table)


def _is_slow(table: Table, name: str) -> bool:
    return table[name][0].wall > 1.1 * min(runs[0].wall for runs in table.values())


def copy_for_us(source: Path, stage: Path, turn: int) -> list[Path]:
    """Copy the file or files, since ours deletes them; every round has names of its own."""
    stage.mkdir(mode=0o700)
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    copies = []
    for path in paths:
        copy = stage / path.name.replace("core-", f"core-r{turn}-", 1)
        shutil.copyfile(path, copy)
        copies.append(copy)
    os.sync()
    return copies


def raw_core(bench: Bench, core: Path, rounds: int) -> Table:
    """Upload a raw core: compressed on the way, or compressed first and then uploaded."""
    table: Table = defaultdict(list)
    variables = uploaders.environ(bench.server)
    packed, stage = bench.root / "packed.gz", bench.root / "stage"
    then = bench.peers(packed, "raw/")["s5cmd cp"]
    with (
        cgroup.group("ours") as own_group,
        uploaders.collector(bench.root / "watch", own_group, bench.server) as ours,
        uploaders.boto3_loop(bench.group, bench.server) as loop,
    ):
        for turn in range(rounds):
            shutil.rmtree(stage, ignore_errors=True)
            table[OURS].append(ours.run(copy_for_us(core, stage, turn)))
            compress = f"igzip -1 -c {core} > {packed}"
            begin = uploaders.run_command(compress, bench.group, variables)
            end = loop.run(packed, "raw/")
            table["igzip -1, then boto3"].append(Run(begin.wall + end.wall, begin.cpu + end.cpu))
            packed.unlink()
            both = uploaders.run_command(f"{compress} && {then}", bench.group, variables)
            table["igzip -1, then s5cmd"].append(both)
            packed.unlink()
            bench.empty_bucket()
    return dict(table)


def latencies(bench: Bench, count: int) -> list[float]:
    """Return seconds from the rename of a 1 MiB dump until a HEAD request finds its object."""
    times = []
    with (
        cgroup.group("ours") as group,
        uploaders.collector(bench.root / "watch", group, bench.server) as ours,
        bench.server.client() as client,
    ):
        for path in uploaders.make_dumps(bench.root / "single", count, MIB):
            begin = time.perf_counter()
            path.rename(ours.directory / path.name)
            while not _is_there(client, f"{ours.directory.name}/{path.name}"):
                time.sleep(0.001)
            times.append(time.perf_counter() - begin)
            while ours.waiting():
                time.sleep(0.005)
    bench.empty_bucket()
    return times


def _is_there(client: object, key: str) -> bool:
    with contextlib.suppress(client.exceptions.ClientError):  # type: ignore[attr-defined]
        client.head_object(Bucket=BUCKET, Key=key)  # type: ignore[attr-defined]
        return True
    return False


def idle(bench: Bench, seconds: float) -> tuple[int, float, int]:
    """Return PSS in KiB and CPU seconds over so many idle seconds, and how many processes it was."""
    with (
        cgroup.group("ours") as group,
        uploaders.collector(bench.root / "watch", group, bench.server) as ours,
    ):
        time.sleep(2)
        cpu = group.cpu_seconds()
        time.sleep(seconds)
        return ours.pss_kib(), group.cpu_seconds() - cpu, len(group.members())


@dataclass(frozen=True)
class Crowd:
    """A collector that starts on a full directory."""

    names: int
    ready_seconds: float
    first_seconds: float
    per_second: float
    peak_kib: int


def crowded(bench: Bench, names: int, seconds: float) -> Crowd:
    """Start on `names` dumps of 1,000 bytes; note when the first is deleted and the pace for some seconds."""
    directory = bench.root / "crowd"
    shutil.rmtree(directory, ignore_errors=True)
    uploaders.make_dumps(directory, names, 1000)
    os.sync()
    with Deletions(directory) as deletions, cgroup.group("ours") as group, watched(group) as seen:
        begin = time.perf_counter()
        with uploaders.collector(directory, group, bench.server, warm=False) as ours:
            while len(deletions.times) < names and not deletions.last(seconds):
                time.sleep(0.05)
            times = deletions.times
    shutil.rmtree(directory)
    bench.empty_bucket()
    pace = (len(times) - 1) / (times[-1] - times[0])
    return Crowd(names, ours.ready_seconds, times[0] - begin, pace, max(seen.values()))


class Deletions:
    """Notes when files of a directory are deleted, from before the collector starts."""

    def __init__(self, directory: Path) -> None:
        """Watch from now on."""
        self.times: list[float] = []
        self._notify = inotify_simple.INotify()
        self._notify.add_watch(directory, inotify_simple.flags.DELETE)
        self._thread = threading.Thread(target=self._note)
        self._done = threading.Event()

    def last(self, seconds: float) -> bool:
        """Say whether so long has passed since the first."""
        return bool(self.times) and time.perf_counter() - self.times[0] > seconds

    def _note(self) -> None:
        while not self._done.is_set():
            for _ in self._notify.read(timeout=100):
                self.times.append(time.perf_counter())

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._done.set()
        self._thread.join()
        self._notify.close()


def under_limit(bench: Bench, size: int, limit_bytes: int | None) -> tuple[Run, int]:
    """Upload one large file, the collector in a memory cgroup or free; return it and the peak KiB of a process."""
    path = make_file(bench.root / "core-big-1700000000-1-11.gz", size)
    limit = cgroup.memory_limit("limit", limit_bytes) if limit_bytes else contextlib.nullcontext(":")
    with (
        limit as join,
        cgroup.group("ours") as group,
        watched(group) as seen,
        uploaders.collector(bench.root / "watch", group, bench.server, join, warm=False) as ours,
    ):
        run = ours.run([path], seconds=600)
    bench.empty_bucket()
    return run, max(seen.values())


def versions(server: S3Server) -> dict[str, str]:
    """Return what the peers call themselves."""
    found = {}
    for name, arguments in (
        ("aws", ["--version"]),
        ("rclone", ["version"]),
        ("s5cmd", ["version"]),
        ("weed", ["version"]),
    ):
        text = subprocess.check_output(
            [uploaders.program(name), *arguments], text=True, env=uploaders.environ(server)
        )
        found[name] = text.splitlines()[0]
    return found


def median(runs: list[Run], what: str = "wall") -> float:
    """Return the median of a field."""
    return float(statistics.median(getattr(run, what) for run in runs))

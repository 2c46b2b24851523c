"""The price of the vital part for a crashed process, and its use for the reader of a large dump."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.support import kernel, s3
from tests.support.collector import running, wait_until
from tests.support.front import front

from bench import against, hold, machine, victims
from bench.handlers import Workshop
from bench.report import Report, Table, seconds
from core_dump_format.attributes import ATTRIBUTE_PREFIX

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.front import Reply, Request

    from bench.handlers import Handler

GIB = 1 << 30
LARGE_BYTES = 10 * GIB
SEGMENTS = {1_000: 4, 50_000: 1}
"""Mappings, and the pages of each."""
PREPARED_MS = {1_000: 10, 50_000: 150}
"""The most that preparing may take."""
LARGE = """
import ctypes, mmap, sys
path, count = sys.argv[1], int(sys.argv[2])
maps = []
for _ in range(count):
    with open(path, "rb") as file:
        maps.append(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
    maps[-1][0] = 1  # the kernel dumps the whole of a private mapping that was written
ctypes.string_at(8)
"""


def run(root: Path, report: Report, rounds: int) -> None:
    """Measure everything about the vital part."""
    pairs = max(rounds, against.LEAST_PAIRS)
    shop = Workshop(root, None)
    vital, plain = shop.ours("isal"), shop.ours("isal", VITAL_BYTES=0)
    report.add(preparing(shop, vital, pairs))
    report.add(holding(shop, plain, vital, pairs))
    report.add(reading(root, shop))


def preparing(shop: Workshop, handler: Handler, rounds: int) -> Table:
    """Crash programs of many mappings; report how long the helper took before it drained the core."""
    program = shop.root / "maps"
    source = kernel.CRASHER.with_name("maps.cpp")
    subprocess.run(["g++", "-O1", "-w", "-o", program, source], check=True)
    rows, before = [], machine.load()
    for count, pages in SEGMENTS.items():
        times = []
        with kernel.core_pattern(handler.kernel_pattern):
            for _ in range(rounds):
                with subprocess.Popen([program, str(count), str(pages)]) as process:
                    process.wait()
                times.append(prepared_ms(process.pid))
                hold.settle(shop)
        most = f"{PREPARED_MS[count]} ms"
        rows.append((f"{count:,}", f"{statistics.median(times):.1f} ms", *spread(times), most))
    note = f"{rounds} crashes each, from the helper's log; load average {before:.1f} before."
    return Table("vital: preparing", ("mappings", "median", "least", "most", "goal"), rows, note)


def spread(times: list[float]) -> tuple[str, str]:
    """Return the least and the most, in milliseconds."""
    return f"{min(times):.1f} ms", f"{max(times):.1f} ms"


def prepared_ms(pid: int) -> float:
    """Return how long the helper prepared the vital part of a process, according to its log.

    Raises:
        TimeoutError: the log does not say it.
    """
    pattern = re.compile(rf"rocess {pid} .*: vital part of .* prepared in ([0-9.]+) ms")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = pattern.findall(subprocess.check_output(["dmesg"], text=True, errors="replace"))
        if found:
            return float(found[-1])
        time.sleep(0.05)
    raise TimeoutError(f"the log has no line about process {pid}")


def holding(shop: Workshop, plain: Handler, vital: Handler, pairs: int) -> Table:
    """Compare the hold time of a large process with and without the vital part."""
    image = shop.root / "image"
    victims.make_image(image, GIB)
    os.sync()  # or its writing would be measured too
    head = ("core", "VITAL_BYTES=0", "vital part first")
    kinds = {"1 GiB of a service": lambda handler: against.hold_image(handler, image, shop)}
    with machine.warm_memory():
        table, _ = against.compare_pairs("vital: hold", head, kinds, (plain, vital), pairs)
    image.unlink()
    return table


def reading(root: Path, shop: Workshop) -> Table:
    """Crash a process of 10 GiB, upload its dump, and read its backtrace from the bucket."""
    watch_dir = root / "watch"
    watch_dir.mkdir(mode=0o700)
    dump = crash_large(root, shop.ours("isal", WATCH_DIR=watch_dir, MAX_TOTAL_BYTES=0), watch_dir)
    length, vital = (
        int(os.getxattr(dump, ATTRIBUTE_PREFIX + name).decode()) for name in ("bytes", "vital_bytes")
    )
    stored = dump.stat().st_size
    with s3.seaweedfs(root) as server:
        with running(watch_dir, server.environ() | {"BUCKET_NAME": s3.BUCKET}, root):
            wait_until(lambda: not dump.exists(), 900, "the upload")
        rows = [(f"`core-dumps {command}`", *ask(server, root, command)) for command in ("info", "bt")]
    note = f"A core of {length:,} bytes, {stored:,} in the bucket, {vital:,} of its vital part; loopback, empty cache."
    head = ("command", "requests for the object", "bytes of it", "time")
    return Table("vital: reading", head, rows, note)


def crash_large(root: Path, handler: Handler, watch_dir: Path) -> Path:
    """Crash a process with LARGE_BYTES of zeros; return its dump."""
    zeros = root / "zeros"
    zeros.touch()
    os.truncate(zeros, GIB)
    with kernel.core_pattern(handler.kernel_pattern):
        command = [sys.executable, "-S", "-c", LARGE, str(zeros), str(LARGE_BYTES // GIB)]
        with subprocess.Popen(command) as process:
            process.wait()
    wait_until(lambda: any(watch_dir.glob("core-*.gz")), 600, "the dump")
    return next(watch_dir.glob("core-*.gz"))


def ask(server: s3.S3Server, root: Path, command: str) -> tuple[str, str, str]:
    """Run `core-dumps` on the only dump; return requests for the object, bytes of the answers, and the time."""
    fetched: list[int] = []

    def count(request: Request, reply: Reply) -> Reply:
        if request.method == "GET" and request.path.split("?")[0].endswith(".gz"):
            fetched.append(len(reply.body))
        return reply

    with front(server.endpoint, after=count) as endpoint:
        environ = server.environ() | {"AWS_ENDPOINT_URL_S3": endpoint, "BUCKET_NAME": s3.BUCKET}
        environ |= {"CORE_DUMPS_CACHE": str(root / f"cache-{command}"), "AWS_EC2_METADATA_DISABLED": "true"}
        begin = time.monotonic()
        program = [sys.executable, "-m", "core_dumps.cli", command]
        subprocess.run(program, check=True, env=os.environ | environ, stdout=subprocess.DEVNULL)
        took = time.monotonic() - begin
    return str(len(fetched)), f"{sum(fetched):,}", seconds(took)

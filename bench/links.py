"""The collector and its peers where the bucket is far: round trips, rates of connections, throttling, a thin uplink."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support import s3
from tests.support.cleanup import guarded
from tests.support.herd import simulate

from bench import cgroup, machine, plots, uploaders, uploads
from bench.report import Report, Table, parse_seconds, seconds
from bench.uploads import BOTO3, OURS, Bench, median

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIB = 1 << 20
ROUND_TRIPS = (0, 10, 30, 100)
"""Milliseconds: the same machine, a zone, a region, a continent."""
RATES = (8, 80)
"""MB a second of one connection."""
LARGE_BYTES = 256 * MIB
SMALL = 2000
THROTTLED_PERCENT = 5
THIN_BYTES_PER_SECOND = 500_000
THIN_BYTES = 4 * MIB
HERD, HERD_DUMPS, HERD_PER_SECOND = 50, 40, 100
Cell = tuple[int, int]
"""Milliseconds of a round trip, MB a second of a connection."""
LARGE_TABLE, SMALL_TABLE = "links: one dump of 256 MiB", "links: 2,000 dumps of 64 KiB"
PEERS = ("aws s3 cp", "rclone copy", "s5cmd cp")


def run(root: Path, report: Report, rounds: int, wanted: str = "") -> None:
    """Measure the rows whose table and first cell match a pattern; keep the others of earlier runs."""

    def is_wanted(table: str, row: str = "") -> bool:
        return re.search(wanted, f"{table}: {row}") is not None

    (root / "weed").mkdir()
    with machine.warm_memory(), s3.seaweedfs(root / "weed") as server, cgroup.group("peers") as group:
        bench = Bench(root, server, group)
        cells = [(rtt, rate) for rate in RATES for rtt in ROUND_TRIPS]
        if large := [cell for cell in cells if is_wanted(LARGE_TABLE, _name(*cell))]:
            one = uploads.make_file(root / "core-one-1700000000-1-11.gz", LARGE_BYTES)
            _show(report, LARGE_TABLE, cells, {cell: _measure(bench, one, rounds, *cell) for cell in large})
            one.unlink()
        uploaders.make_dumps(root / "many", SMALL, 64 << 10)
        cells = [(rtt, RATES[-1]) for rtt in ROUND_TRIPS]
        if small := [cell for cell in cells if is_wanted(SMALL_TABLE, _name(*cell))]:
            found = {cell: _measure(bench, root / "many", rounds, *cell) for cell in small}
            _show(report, SMALL_TABLE, cells, found, SMALL)
        if is_wanted("links: throttled"):
            _throttled(report, bench, rounds)
        if is_wanted("links: thin"):
            _thin(report, bench)
    if is_wanted("links: herd"):
        herd(report)


@contextlib.contextmanager
def link(bench: Bench, rtt_ms: float, bytes_per_second: float, *flags: str) -> Iterator[tuple[Bench, Path]]:
    """Put a link before the server; yield the bench behind it, and the file that gets the bytes sent."""
    port = s3.free_ports(1)[0]
    numbers = [str(port), str(bench.server.port), str(rtt_ms / 1000), str(bytes_per_second)]
    command = guarded([sys.executable, "-m", "bench.link", *numbers, *flags])
    moved = bench.root / "moved"
    quiet = subprocess.DEVNULL
    with moved.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=quiet) as process:
        try:
            if not s3.wait_for_port(port, process):
                raise RuntimeError("the link did not start")
            server = dataclasses.replace(bench.server, endpoint=f"http://127.0.0.1:{port}", port=port)
            yield dataclasses.replace(bench, server=server), moved
        finally:
            process.terminate()


def _name(rtt_ms: float, megabytes_per_second: float) -> str:
    return f"{rtt_ms:g} ms, {megabytes_per_second:g} MB/s"


def _measure(
    bench: Bench, source: Path, rounds: int, rtt_ms: float, megabytes_per_second: float
) -> uploads.Table:
    """Measure one row. boto3 one by one takes minutes over a link, and its CPU is the same there."""
    with link(bench, rtt_ms, megabytes_per_second * 1e6) as (far, _):
        table = uploads.compare(far, source, rounds, loop=rtt_ms == 0)
    bench.empty_bucket()
    times = {who: [round(run.wall, 2) for run in runs] for who, runs in table.items()}
    print(_name(rtt_ms, megabytes_per_second), times, flush=True)
    return table


def _show(
    report: Report,
    name: str,
    cells: list[Cell],
    found: dict[Cell, uploads.Table],
    dumps: int = 0,
) -> None:
    """Show rows: wall seconds of each, ours as a ratio to the fastest peer, CPU of ours, of boto3's loop and of aws."""
    head = [
        "round trip, rate of a connection",
        OURS,
        *PEERS,
        "ours x fastest peer",
        "CPU ours",
        "CPU boto3",
        "CPU aws",
    ]
    rows = []
    for cell, table in found.items():
        walls = {who: median(runs) for who, runs in table.items()}
        fastest = min(walls[who] for who in PEERS)
        row = [_name(*cell), *(seconds(walls[who]) for who in (OURS, *PEERS)), f"{walls[OURS] / fastest:.2f}"]
        row += [
            f"{median(table[who], 'cpu'):.1f} s" if who in table else "" for who in (OURS, BOTO3, PEERS[0])
        ]
        row += [f"{dumps / walls[OURS]:.0f}"] if dumps else []
        rows.append([*row, f"{machine.load():.1f}"])
    head += ["ours, dumps/s"] if dumps else []
    note = "Medians of two alternating rounds, slow peers once. The rows were measured in several runs."
    whole = report.merge(Table(name, [*head, "load"], rows, note), [_name(*cell) for cell in cells])
    _plot(whole)


def _plot(table: Table) -> None:
    """Draw the rows of the lowest rate, once all are there."""
    rates = [row[0].partition(", ")[2] for row in table.rows]
    shown = [row for row, rate in zip(table.rows, rates, strict=True) if rate == rates[0]]
    if len(shown) != len(ROUND_TRIPS):
        return
    plots.lines(
        table.name.replace(": ", "-").replace(" ", "-").replace(",", ""),
        f"{table.name.partition(': ')[2]}, {rates[0]} a connection, seconds",
        ("ms of a round trip, plus one", "seconds"),
        [rtt + 1 for rtt in ROUND_TRIPS],
        {who: [parse_seconds(row[1 + n]) for row in shown] for n, who in enumerate((OURS, *PEERS))},
    )


def _throttled(report: Report, bench: Bench, rounds: int) -> None:
    """Show small dumps where the store answers some requests with 503 SlowDown."""
    with s3.haproxy(bench.root, bench.server) as proxy:
        body = proxy.body("slow-down.xml", s3.SLOW_DOWN)
        rule = f"http-request return status 503 content-type application/xml file {body}"
        proxy.start(f"{rule} if {{ rand(100) lt {THROTTLED_PERCENT} }}")
        front = dataclasses.replace(bench.server, endpoint=proxy.endpoint, port=proxy.port)
        with link(dataclasses.replace(bench, server=front), 30, RATES[-1] * 1e6) as (far, _):
            table = uploads.compare(far, bench.root / "many", rounds, loop=False)
    bench.empty_bucket()
    rows = [(who, seconds(median(runs)), f"{SMALL / median(runs):.0f}") for who, runs in table.items()]
    note = f"30 ms, {RATES[-1]} MB/s, {THROTTLED_PERCENT} % of all requests answered with 503 SlowDown."
    report.add(Table("links: throttled", ("who", "2,000 dumps of 64 KiB", "dumps/s"), rows, note))


def herd(report: Report) -> None:
    """Show how many collectors drain through a store that throttles them: a simulation with their own decisions."""
    run = simulate(HERD, HERD_DUMPS, HERD_PER_SECOND)
    refused, taken = sum(run.refused), sum(run.taken)
    rows = [
        (
            f"{HERD} x {HERD_DUMPS}",
            seconds(run.seconds),
            seconds(taken / HERD_PER_SECOND),
            f"{taken:,}",
            f"{refused:,}",
            f"{sum(run.refused[5:]):,}",
        )
    ]
    head = ("collectors x dumps", "drained after", "at least", "requests taken", "refused", "after 5 s")
    report.add(Table("links: herd", head, rows))
    series: dict[str, Sequence[float]] = {"taken": run.taken, "refused with 503": run.refused}
    at = [second + 1 for second in range(len(run.taken))]
    plots.lines(
        "links-herd", "requests a second at a store that takes 100", ("second", "requests"), at, series
    )


def _thin(report: Report, bench: Bench) -> None:
    """Show two dumps over an uplink that all connections share, and what is sent beyond their bytes."""
    rows = []
    paths = [uploads.make_file(bench.root / f"core-thin-170000000{n}-1-11.gz", THIN_BYTES) for n in range(2)]
    with (
        link(bench, 30, THIN_BYTES_PER_SECOND, "shared") as (far, moved),
        cgroup.group("ours") as group,
        uploaders.collector(bench.root / "thin", group, far.server) as ours,
    ):
        taken = ours.run(paths, seconds=600)
    sent = int(moved.read_text())
    bench.empty_bucket()
    least = 2 * THIN_BYTES
    rows.append((OURS, seconds(taken.wall), seconds(least / THIN_BYTES_PER_SECOND), f"{sent / least:.3f}"))
    head = ("who", "two dumps of 4 MiB at 500 kB/s", "their bytes alone", "bytes sent x needed")
    report.add(Table("links: thin", head, rows))

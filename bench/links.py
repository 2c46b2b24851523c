"""The collector and its peers where the bucket is far: round trips, rates of connections, throttling, a thin uplink."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support import s3
from tests.support.cleanup import guarded
from tests.support.herd import simulate

from bench import cgroup, machine, plots, uploaders, uploads
from bench.report import Report, Table, seconds
from bench.uploads import OURS, Bench, median

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
Cell = tuple[str, uploads.Table]


def run(root: Path, report: Report, rounds: int) -> None:
    """Measure all cells."""
    (root / "weed").mkdir()
    with machine.warm_memory(), s3.seaweedfs(root / "weed") as server, cgroup.group("peers") as group:
        bench = Bench(root, server, group)
        one = uploads.make_file(root / "core-one-1700000000-1-11.gz", LARGE_BYTES)
        large = [_cell(bench, one, rounds, rtt, rate * 1e6) for rate in RATES for rtt in ROUND_TRIPS]
        _report(report, "links: one dump of 256 MiB", large)
        one.unlink()
        uploaders.make_dumps(root / "many", SMALL, 64 << 10)
        small = [_cell(bench, root / "many", rounds, rtt, RATES[-1] * 1e6) for rtt in ROUND_TRIPS]
        _report(report, "links: 2,000 dumps of 64 KiB", small, SMALL)
        _throttled(report, bench, rounds)
        _thin(report, bench)
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


def _cell(bench: Bench, source: Path, rounds: int, rtt_ms: float, bytes_per_second: float) -> Cell:
    with link(bench, rtt_ms, bytes_per_second) as (far, _):
        table = uploads.compare(far, source, rounds, loop=False)
    bench.empty_bucket()
    name = f"{rtt_ms:g} ms, {bytes_per_second / 1e6:g} MB/s"
    print(name, {who: [round(run.wall, 2) for run in runs] for who, runs in table.items()}, flush=True)
    return name, table


def _report(report: Report, name: str, cells: list[Cell], dumps: int = 0) -> None:
    """Show cells as rows: wall seconds of each, ours as a ratio to the fastest peer, CPU of ours and of it."""
    peers = [who for who in cells[0][1] if who != OURS]
    head = ["round trip, rate of a connection", OURS, *peers, "ours x fastest peer", "CPU ours", "CPU aws"]
    rows = []
    for cell, table in cells:
        walls = {who: median(runs) for who, runs in table.items()}
        fastest = min(walls[who] for who in peers)
        row = [cell, seconds(walls[OURS]), *(seconds(walls[who]) for who in peers)]
        row.append(f"{walls[OURS] / fastest:.2f}")
        row += [f"{median(table[who], 'cpu'):.1f} s" for who in (OURS, peers[0])]
        rows.append([*row, f"{dumps / walls[OURS]:.0f}"] if dumps else row)
    note = f"Medians of {len(cells[0][1][OURS])} alternating rounds, slow ones once; load average {machine.load():.1f}."
    report.add(Table(name, [*head, "ours, dumps/s"] if dumps else head, rows, note))
    shown = [cell for cell in cells if cell[0].endswith(f"{RATES[0]} MB/s")] or cells
    plots.lines(
        name.replace(": ", "-").replace(" ", "-").replace(",", ""),
        name.partition(": ")[2] + ", seconds",
        ("ms of a round trip, plus one", "seconds"),
        [rtt + 1 for rtt in ROUND_TRIPS],
        {who: [median(table[who]) for _, table in shown] for who in (OURS, *peers)},
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

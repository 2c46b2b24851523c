"""The tables of the collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support import s3

from bench import cgroup, machine, plots, uploaders, uploads, victims
from bench.report import Report, Table, seconds, size
from bench.uploads import Bench, median

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
HEAD = ("who", "wall", "x ours", "CPU", "x ours' CPU", "rounds (wall)")


def run(root: Path, report: Report, rounds: int) -> None:
    """Measure everything about the collector."""
    (root / "weed").mkdir()
    with machine.warm_memory(), s3.seaweedfs(root / "weed") as server, cgroup.group("peers") as group:
        bench = Bench(root, server, group)
        uploaders.make_dumps(root / "many", 2000, 64 << 10)
        compare(
            report,
            "upload: 2,000 dumps of 64 KiB",
            uploads.compare(bench, root / "many", rounds),
            2000,
        )
        bench.empty_bucket()
        one = uploads.make_file(root / "core-one-1700000000-1-11.gz", GIB)
        compare(report, "upload: one 1 GiB dump", uploads.compare(bench, one, rounds))
        one.unlink()
        image, core = root / "image", root / "core-raw-1700000000-1-11"
        victims.make_image(core, GIB) if not image.exists() else image.rename(core)
        compare(report, "upload: one raw core of 1 GiB", uploads.raw_core(bench, core, rounds))
        core.unlink()
        latency(report, bench)
        cost(report, bench)
        crowds(report, bench)
        bounds(report, bench)


def compare(report: Report, name: str, table: uploads.Table, dumps: int = 0) -> None:
    """Show one comparison."""
    ours = table[uploads.OURS]
    rows = []
    for who, runs in table.items():
        row = [
            who,
            seconds(median(runs)),
            f"{median(runs) / median(ours):.2f}",
            f"{median(runs, 'cpu'):.1f} s",
        ]
        row += [
            f"{median(runs, 'cpu') / median(ours, 'cpu'):.2f}",
            " ".join(f"{run.wall:.1f}" for run in runs),
        ]
        rows.append([*row, f"{dumps / median(runs):.0f}"] if dumps else row)
    head = [*HEAD, "dumps/s"] if dumps else HEAD
    note = f"Medians of {len(ours)} alternating rounds, slow ones once; load average {machine.load():.1f}."
    report.add(Table(name, head, rows, note))
    plots.bars(
        name.replace(": ", "-").replace(" ", "-").replace(",", ""),
        name,
        {who: median(runs) for who, runs in table.items()},
        "seconds",
    )


def latency(report: Report, bench: Bench) -> None:
    """Show how long a dump takes to be visible."""
    times = sorted(uploads.latencies(bench, 60))
    rows = [(seconds(times[30]), seconds(times[58]), seconds(times[-1]))]
    note = f"60 dumps of 1 MiB, one at a time; asked by HEAD requests; load average {machine.load():.1f}."
    report.add(Table("latency", ("median", "p99", "most"), rows, note))


def cost(report: Report, bench: Bench) -> None:
    """Show what an idle collector costs."""
    pss, cpu, processes = uploads.idle(bench, 60)
    rows = [(str(processes), f"{pss / 1024:.0f} MiB", f"{cpu:.2f} s")]
    report.add(Table("idle", ("processes", "PSS, all", "CPU in 60 s"), rows))


def crowds(report: Report, bench: Bench) -> None:
    """Show what a full directory costs."""
    found = [uploads.crowded(bench, names, 4) for names in (100, 3000, 100_000)]
    rows = [
        (
            f"{c.names:,}",
            seconds(c.ready_seconds),
            seconds(c.first_seconds),
            f"{1000 / c.per_second:.1f} ms",
            size(c.peak_kib << 10),
        )
        for c in found
    ]
    head = ("dumps at start", "ready after", "first one done", "time per dump", "peak of one process")
    report.add(Table("full directory", head, rows, "Dumps of 1,000 bytes, the pace of the first 4 seconds."))
    labels = ("dumps waiting at start", "ms per dump")
    plots.lines(
        "cost-dumps",
        "time per dump",
        labels,
        [c.names for c in found],
        {"ours": [1000 / c.per_second for c in found]},
    )


def bounds(report: Report, bench: Bench) -> None:
    """Show that memory does not grow with the dump, and that a hard limit costs no speed."""
    rows, peaks = [], []
    sizes = [MIB, 16 * MIB, 128 * MIB, GIB, 8 * GIB]
    for count in sizes:
        limit = 128 * MIB if count == 8 * GIB else None
        taken, peak = uploads.under_limit(bench, count, limit)
        peaks.append(peak / 1024)
        rows.append(
            (
                size(count),
                "128 MiB" if limit else "none",
                seconds(taken.wall),
                f"{count / MIB / taken.wall:.0f} MiB/s",
                f"{peak / 1024:.0f} MiB",
            )
        )
    head = ("dump", "memory cgroup", "wall", "pace", "peak of one process")
    report.add(Table("bounded memory", head, rows))
    plots.lines(
        "cost-memory",
        "peak memory of a worker",
        ("MiB of the dump", "MiB"),
        [s / MIB for s in sizes],
        {"ours": peaks},
    )

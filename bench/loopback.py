"""Time and CPU of the collector, compared with an older revision of itself, on loopback, where CPU is the limit."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tests.support import s3

from bench import cgroup, machine, uploaders, uploads
from bench.against import unpack
from bench.report import Report, Table, seconds
from bench.uploads import Bench

if TYPE_CHECKING:
    from pathlib import Path

    from bench.uploaders import Run

LARGE_BYTES = 256 << 20
SMALL = 1000


def run(root: Path, report: Report, rounds: int, revision: str) -> None:
    """Upload one large dump and many small ones with both, in alternating rounds."""
    folders = unpack(revision, root / "old", ("collector", "format"))
    paths = {"before": ":".join(map(str, folders)), "now": ""}
    (root / "weed").mkdir()
    with machine.warm_memory(), s3.seaweedfs(root / "weed") as server, cgroup.group("peers") as group:
        bench = Bench(root, server, group)
        one = uploads.make_file(root / "core-one-1700000000-1-11.gz", LARGE_BYTES)
        uploaders.make_dumps(root / "many", SMALL, 64 << 10)
        rows = []
        for name, source in ("one dump of 256 MiB", one), ("1,000 dumps of 64 KiB", root / "many"):
            runs: dict[str, list[Run]] = {"before": [], "now": []}
            for turn in range(rounds):
                for who in runs if turn % 2 else reversed(runs):
                    runs[who].append(_upload(bench, source, turn, who, paths[who]))
            rows.append((name, *_cells(runs)))
    head = (
        "loopback, no link",
        revision,
        "now",
        "ratio of medians",
        f"CPU {revision}",
        "CPU now",
        "ratio of CPU",
    )
    note = f"Medians of {rounds} alternating rounds, warm; load average {machine.load():.1f}."
    report.add(Table("links: loopback", head, rows, note))


def _upload(bench: Bench, source: Path, turn: int, who: str, path: str) -> Run:
    stage = bench.root / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    files = uploads.copy_for_us(source, stage, turn)
    with (
        cgroup.group(who) as group,
        uploaders.collector(
            bench.root / f"watch-{who}", group, bench.server, variables={"PYTHONPATH": path} if path else {}
        ) as ours,
    ):
        found = ours.run(files)
    bench.empty_bucket()
    print(who, f"{found.wall:.2f} s, CPU {found.cpu:.2f} s", flush=True)
    return found


def _cells(runs: dict[str, list[Run]]) -> list[str]:
    wall = [uploads.median(found) for found in runs.values()]
    cpu = [uploads.median(found, "cpu") for found in runs.values()]
    ratios = [now / before for before, now in (wall, cpu)]
    return [*map(seconds, wall), f"{ratios[0]:.2f}", *map(seconds, cpu), f"{ratios[1]:.2f}"]

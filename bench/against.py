"""Hold time of two versions of the helper, in pairs of crashes: did a change make the process wait longer?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import isal
from tests.support import kernel

from bench import hold, machine, victims
from bench.handlers import PYTHON, Handler, Workshop
from bench.report import Table, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.report import Report

MOST_RATIO = 1.05
"""The largest median ratio of hold times, new to old, that counts as noise."""
LEAST_PAIRS = 20
IMAGE_BYTES = 256 << 20
FOLDERS = ("helper", "format")
ROOT = Path(__file__).parent.parent


def run(root: Path, report: Report, pairs: int, revision: str) -> bool:
    """Compare the working tree with a revision; return whether its hold times are the same within noise."""
    image = root / "image"
    victims.make_image(image, IMAGE_BYTES)
    os.sync()  # or its writing would be measured too
    shop = Workshop(root, None)
    old, new = _install_revision(shop, root / "old", revision), _install_working_tree(shop, root / "new")
    kinds: dict[str, Callable[[Handler], float]] = {
        "0.5 MB": lambda handler: hold.compare_small([handler], 1, shop)[0][0],
        "256 MiB of a service": lambda handler: hold_image(handler, image, shop),
    }
    head = ("core", f"hold, {revision}", "hold, working tree")
    with machine.warm_memory(2 << 30):
        table, ratio = compare_pairs("hold: old and new", head, kinds, (old, new), pairs)
    report.add(table)
    return ratio <= MOST_RATIO


def compare_pairs(
    name: str,
    head: tuple[str, str, str],
    kinds: Mapping[str, Callable[[Handler], float]],
    handlers: tuple[Handler, Handler],
    pairs: int,
) -> tuple[Table, float]:
    """Crash each kind of process into both handlers; return the table, and the largest of its median ratios."""
    before, ratios, rows = machine.load(), [], []
    for kind, crash in kinds.items():
        ratio, cells = _compare(crash, *handlers, pairs)
        ratios.append(ratio)
        rows.append((kind, *cells))
    note = f"{pairs} pairs of crashes, in alternating order; load average {before:.1f} before."
    return Table(name, (*head, "median ratio", "quartiles of the ratio"), rows, note), max(ratios)


def _compare(
    crash: Callable[[Handler], float], old: Handler, new: Handler, pairs: int
) -> tuple[float, tuple[str, ...]]:
    """Crash into both handlers, in alternating order; return the median ratio and a table's cells."""
    for handler in (old, new):
        crash(handler)  # its modules are compiled and in the page cache from here on
    times: dict[str, list[float]] = {old.name: [], new.name: []}
    for turn in range(pairs):
        for handler in (old, new) if turn % 2 else (new, old):
            times[handler.name].append(crash(handler))
        latest = [f"{name} {seconds(found[-1])}" for name, found in times.items()]
        print(f"pair {turn + 1}: {', '.join(latest)}", file=sys.stderr, flush=True)
    ratios = [b / a for a, b in zip(times[old.name], times[new.name], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = [seconds(statistics.median(found)) for found in times.values()]
    return middle, (*medians, f"{middle:.3f}", f"{low:.2f} to {high:.2f}")


def hold_image(handler: Handler, image: Path, shop: Workshop) -> float:
    """Crash a process that holds an image of memory; return how long it was held."""
    with victims.loaded(f"image:{image}") as pid, kernel.core_pattern(handler.kernel_pattern):
        _, (held,) = victims.crash([pid])
    hold.settle(shop)
    return held


def _install_revision(shop: Workshop, place: Path, revision: str) -> Handler:
    """Install the helper as it was at a revision."""
    for folder in unpack(revision, place / "source", FOLDERS):
        for path in folder.iterdir():
            path.rename(place / path.name)
    return _handler(shop, place, revision)


def unpack(revision: str, place: Path, folders: Sequence[str]) -> list[Path]:
    """Unpack folders as they were at a revision; return those that it has.

    Raises:
        SystemExit: git does not know the revision, or it has not the first of them.
    """
    git = ["git", "-C", str(ROOT)]
    known = subprocess.run(
        [*git, "cat-file", "-e", f"{revision}:{folders[0]}"], capture_output=True, check=False
    )
    if known.returncode:
        raise SystemExit(
            f"bench: {revision} is no revision with {folders[0]}: {known.stderr.decode().strip()}"
        )
    names = subprocess.check_output([*git, "ls-tree", "--name-only", revision, *folders], text=True).split()
    place.mkdir(parents=True)
    archive = subprocess.check_output([*git, "archive", revision, *names])
    subprocess.run(["tar", "-x", "-C", place], input=archive, check=True)
    return [place / name for name in names]


def _install_working_tree(shop: Workshop, place: Path) -> Handler:
    place.mkdir()
    kernel.install_helper(place, {}, PYTHON)
    return _handler(shop, place, "working tree")


def _handler(shop: Workshop, place: Path, name: str) -> Handler:
    """Give an installed helper a short path and a configuration that every version knows."""
    program, launcher = place / "h", place / kernel.HELPER.name
    text = launcher.read_text()
    program.write_text(f"#!{PYTHON} -IS\n" + text.partition("\n")[2])
    program.chmod(0o755)
    settings = {
        "WATCH_DIR": shop.out,
        "COMPRESSOR": "isal",
        "RATE_LIMIT": 0,
        "KEEP_FREE_PERCENT": 1,
        "PYTHON_PATH": Path(isal.__file__).parent.parent,
    }
    conf = kernel.write_config(place / "c", settings)
    return Handler(name, f"{program} -C{conf} {kernel.ARGUMENTS}", f"core-dump-helper of {name}")

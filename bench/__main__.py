"""`python -m bench [--only PART] [--rows REGEX] [--against REV] [--rounds N] [--no-write]`: measure, print, draw."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from tests.support.cleanup import exit_on_signals, temporary_directory

from bench import machine
from bench.report import Report, Table

if TYPE_CHECKING:
    from pathlib import Path


def parse_options() -> argparse.Namespace:
    """Return the options; exit if they do not belong together."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only",
        choices=["crashes", "small", "trimmed", "socket", "vital", "modules", "collector", "hold", "links"],
        help="one part of it; vital, modules, hold and links run only if asked for",
    )
    parser.add_argument(
        "--against",
        metavar="REV",
        help="with --only hold: compare the helper with its revision REV; with --only links: the collector",
    )
    parser.add_argument(
        "--rows",
        metavar="REGEX",
        help="with --only links: rows whose table and first cell match; the others stay in docs/benchmarks.md",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="alternating rounds (2; of hold, vital and modules at least 20; of links --against 6)",
    )
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    if options.only == "hold" and not options.against:
        parser.error("--only hold needs --against REV")
    if options.against and options.only not in {"hold", "links"}:
        parser.error("--against REV needs --only hold or --only links")
    if options.rows and (options.only != "links" or options.against):
        parser.error("--rows needs --only links")
    return options


def main() -> None:
    """Run the benchmarks."""
    options = parse_options()
    exit_on_signals()
    machine.require_root()
    report = Report(write=not options.no_write)
    begin = time.monotonic()
    is_same = True
    with temporary_directory("cdb.", "/var/tmp") as root:
        if options.only == "hold":
            is_same = compare(root, report, options)
        else:
            measure(root, report, options)
    print(f"\n{(time.monotonic() - begin) / 60:.1f} minutes")
    if not is_same:
        raise SystemExit("the process is held longer than before")


def measure(root: Path, report: Report, options: argparse.Namespace) -> None:
    """Compare with other programs."""
    machine.require()
    from bench import collecting, crashes, links, loopback, modules, vital  # noqa: PLC0415  their imports may just have been installed

    rounds = options.rounds or 2
    if options.only is None:  # the date stands for all tables
        lines = [[line] for line in machine.describe()]
        report.add(Table("machine", [time.strftime("%Y-%m-%d", time.gmtime())], lines))
    asked_for = {
        "small": crashes.run_small,
        "trimmed": crashes.run_trimmed,
        "socket": crashes.run_socket,
        "vital": vital.run,
        "modules": modules.run,
    }
    if options.only in {None, "crashes"}:
        crashes.run(root, report, rounds)
    if options.only in asked_for:
        asked_for[options.only](root, report, rounds)
    if options.only == "links" and options.against:
        loopback.run(root, report, options.rounds or 6, options.against)
    elif options.only == "links":
        links.run(root, report, rounds, options.rows or "")
    if options.only in {None, "collector"}:
        collecting.run(root, report, rounds)


def compare(root: Path, report: Report, options: argparse.Namespace) -> bool:
    """Compare with an older version; return whether the hold times are the same within noise."""
    from bench import against  # noqa: PLC0415  imports isal, which may be missing

    return against.run(root, report, max(options.rounds or 0, against.LEAST_PAIRS), options.against)


if __name__ == "__main__":
    main()

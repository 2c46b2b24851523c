"""`python -m bench [--only crashes|collector] [--rounds N] [--no-write]`: measure, print, draw."""

from __future__ import annotations

import argparse
import time

from tests.support.cleanup import exit_on_signals, temporary_directory

from bench import machine
from bench.report import Report, Table


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=["crashes", "collector"], help="one half of it")
    parser.add_argument("--rounds", type=int, default=2, help="alternating rounds (2)")
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md alone")
    options = parser.parse_args()
    exit_on_signals()
    machine.require()
    from bench import collecting, crashes  # noqa: PLC0415  what they import may just have been installed

    report = Report(write=not options.no_write)
    begin = time.monotonic()
    lines = [[line] for line in machine.describe()]
    report.add(Table("machine", [time.strftime("%Y-%m-%d", time.gmtime())], lines))
    with temporary_directory("cdb.", "/var/tmp") as root:
        if options.only != "collector":
            crashes.run(root, report, options.rounds)
        if options.only != "crashes":
            collecting.run(root, report, options.rounds)
    print(f"\n{(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

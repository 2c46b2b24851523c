"""What keeping the files behind a crash adds to the time for which a process with many libraries is held."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING

from tests.support import kernel
from tests.support.collector import wait_until

from bench import against, hold, machine, victims
from bench.handlers import Workshop
from bench.report import Report, Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.handlers import Handler

LIBRARIES = 200
LEAST_PAIRS = 20


def run(root: Path, report: Report, rounds: int) -> None:
    """Compare MODULES=yes with MODULES=no; a collector takes the files."""
    pairs, shop, before = max(rounds, LEAST_PAIRS), Workshop(root, None), machine.load()
    taken = shop.out / ".modules"
    taken.mkdir(mode=0o700)
    (taken / "collector").touch()
    program = kernel.build(kernel.CRASHER.with_name("mapper.c"), root / "mapper")
    libraries = make_libraries(root / "libraries")

    def crash(handler: Handler) -> float:
        with mapping(program, libraries) as pid, kernel.core_pattern("|" + handler.pattern):
            _, (held,) = victims.crash([pid])
        hold.settle(shop)
        wait_until(lambda: not any(taken.glob("*.partial")), 60, "the copies")
        return held

    without, kept = shop.ours("isal", MODULES="no"), shop.ours("isal")
    _, row = against.compare_pairs(crash, without, kept, pairs)
    head = ("process", "MODULES=no", "MODULES=yes", "median ratio", "quartiles of the ratio")
    note = f"{pairs} pairs of crashes, in alternating order; load average {before:.1f} before."
    report.add(Table("hold: modules", head, [(f"{LIBRARIES} libraries", *row)], note))


def make_libraries(directory: Path) -> list[Path]:
    """Make libraries, each a file of its own."""
    directory.mkdir()
    source = directory / "a.c"
    source.write_text("int number;\nint add(int more) { return number += more; }\n")
    first = kernel.build(source, directory / "0.so", "-shared", "-fPIC")
    names = [directory / f"{number}.so" for number in range(LIBRARIES)]
    for name in names[1:]:
        name.write_bytes(first.read_bytes())
    return names


@contextlib.contextmanager
def mapping(program: Path, files: list[Path]) -> Iterator[int]:
    """Yield the pid of a process that has files mapped."""
    command = [str(program), *map(str, files)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that maps libraries did not start")
        yield process.pid
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        process.returncode = -signal.SIGSEGV  # it was waited for by its pid

"""Time that keeping the files behind a crash adds to the hold of a process with many libraries."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING

from tests.support import kernel
from tests.support.collector import wait_until

from bench import against, hold, victims
from bench.handlers import Workshop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.handlers import Handler
    from bench.report import Report

LIBRARIES = 200


def run(root: Path, report: Report, rounds: int) -> None:
    """Compare MODULES=yes with MODULES=no; a collector takes the files."""
    shop = Workshop(root, None)
    taken = shop.out / ".modules"
    taken.mkdir(mode=0o700)
    (taken / "collector").touch()
    program = kernel.build(kernel.CRASHER.with_name("mapper.c"), root / "mapper")
    libraries = make_libraries(root / "libraries")

    def crash(handler: Handler) -> float:
        with mapping(program, libraries) as pid, kernel.core_pattern(handler.kernel_pattern):
            _, (held,) = victims.crash([pid])
        hold.settle(shop)
        wait_until(lambda: not any(taken.glob("*.partial")), 60, "the copies")
        return held

    handlers = shop.ours("isal", MODULES="no"), shop.ours("isal")
    head, kinds = ("process", "MODULES=no", "MODULES=yes"), {f"{LIBRARIES} libraries": crash}
    pairs = max(rounds, against.LEAST_PAIRS)
    table, _ = against.compare_pairs("hold: modules", head, kinds, handlers, pairs)
    report.add(table)


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

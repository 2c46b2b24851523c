"""The tables of the hold time."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench import cgroup, hold, machine, plots, victims
from bench.handlers import Workshop
from bench.report import Report, Table, seconds, size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.cgroup import Group
    from bench.handlers import Handler

HEAD = ("handler", "hold", "x limit", "file whole", "CPU", "x igzip's CPU", "written", "rounds (hold)")
GIB = 1 << 30


@dataclass(frozen=True)
class Crashes:
    """Where they happen, and where the tables go. Without a group, handlers run bare."""

    report: Report
    shop: Workshop
    group: Group | None
    rounds: int

    def large(self, name: str, handlers: Sequence[Handler], what: str, rounds: int) -> None:
        """Compare handlers on one kind of memory; the first is the limit, the second igzip."""
        results, loads = self._compare(handlers, what, rounds)
        limit, cpu = results[0].median("hold"), results[1].median("cpu")
        rows = [
            (
                result.handler.name,
                seconds(result.median("hold")),
                f"{result.median('hold') / limit:.1f}",
                seconds(result.median("whole")),
                f"{result.median('cpu'):.1f} s",
                f"{result.median('cpu') / cpu:.2f}",
                size(result.median("written")),
                " ".join(f"{crash.hold:.1f}" for crash in result.crashes),
            )
            for result in results
        ]
        self.report.add(
            Table(name, HEAD, rows, f"Medians of alternating rounds, fewer of slow ones; {loads}.")
        )
        holds = {result.handler.name: result.median("hold") for result in results}
        plots.bars(
            name.replace(": ", "-").replace(" ", "-"), name, holds, "seconds from the signal to waitpid"
        )

    def _compare(
        self,
        handlers: Sequence[Handler],
        what: str,
        rounds: int,
        compare: Callable[..., list[hold.Result]] = hold.compare,
    ) -> tuple[list[hold.Result], str]:
        before = machine.load()
        results = compare(handlers, what, rounds, self.counted, self.shop)
        return results, f"load average {before:.1f} before, {machine.load():.1f} after"

    @property
    def counted(self) -> Group:
        """The control group; only a bare shop has none."""
        if self.group is None:
            raise ValueError("bare handlers are not counted")
        return self.group

    def memory(self, image: Path, choice: str) -> None:
        """Show the peak memory of helper and compressor, and what a large dump leaves of the page cache."""
        group, shop, rows = self.counted, self.shop, []
        kinds = (f"image:{image}", f"zeros:{4 * GIB}")
        for handler, what in (
            (shop.ours(choice, 0), kinds[0]),
            (shop.ours("pigz", 0), kinds[0]),
            (shop.ours("auto"), kinds[0]),
            (shop.ours("auto"), kinds[1]),
        ):
            peak = hold.peak_kib(handler, what, group, shop)
            memory = "1 GiB of a service" if what == kinds[0] else "4 GiB of zeros"
            rows.append((handler.name, memory, f"{peak / 1024:.0f} MiB"))
        self.report.add(Table("peak memory", ("handler", "dump", "peak"), rows))

    def cache(self) -> None:
        """Show what a dump written to the disk leaves of the page cache."""
        rows = []
        for handler, count in ((self.shop.ours("none"), 4 * GIB), (self.shop.raw(), GIB)):
            before = machine.memory_bytes("Cached")
            hold.take_only(handler, f"zeros:{count}", self.counted)
            after = machine.memory_bytes("Cached")
            rows.append((handler.name, size(count), size(before), size(after)))
            self.shop.clean()
        head = ("handler", "written", "Cached before", "Cached after")
        self.report.add(Table("page cache", head, rows))

    def buffers(self, image: Path) -> None:
        """Show what the buffer buys."""
        sizes = [0, 256 << 20, 512 << 20, 1 << 30]
        handlers = [self.shop.limit(), *(self.shop.ours("auto", count) for count in sizes)]
        results, loads = self._compare(handlers, f"image:{image}", self.rounds)
        limit = results[0].median("hold")
        rows = [
            (
                size(count),
                seconds(r.median("hold")),
                f"{r.median('hold') / limit:.1f}",
                seconds(r.median("whole")),
            )
            for count, r in zip(sizes, results[1:], strict=True)
        ]
        note = f"1 GiB of a service; medians of {self.rounds} alternating rounds; {loads}."
        self.report.add(Table("buffer", ("BUFFER_BYTES", "hold", "x limit", "file whole"), rows, note))

    def pressure(self, image: Path) -> None:
        """Show what the buffer costs where memory is short: a neighbour holds all but 2 GiB."""
        rows = []
        leave = 2 * GIB
        with victims.hog(leave + GIB), machine.warm_memory(leave):  # the process that crashes takes a GiB too
            for handler in (self.shop.ours("auto", 0), self.shop.ours("auto")):
                before = hold.stalled_seconds()
                with hold.watched(self.counted) as seen:
                    crash = hold.take(handler, f"image:{image}", self.counted, self.shop)
                waited = hold.stalled_seconds() - before
                peak = f"{sum(seen.values()) / 1024:.0f} MiB"
                rows.append((size(leave), handler.name, seconds(crash.hold), peak, seconds(waited)))
        head = ("available", "handler", "hold", "peak memory", "others stalled for memory")
        self.report.add(Table("memory pressure", head, rows, "1 GiB of a service; one round."))

    def trimmed(self, image: Path) -> None:
        """Compare a trimmed dump with a reader that discards everything: at most a fifth of its time."""
        rows = []
        kinds = (
            ("1 GiB of a service", f"image:{image}", 64),
            ("the same, budget of 1 MiB", f"image:{image}", 1),
            ("4.6 GB touched", f"zeros:{4_600_000_000 >> 20 << 20}", 64),
            ("64 MiB touched, 16 GiB reserved", f"reserve:{16 * GIB}", 64),
        )
        for label, what, budget in kinds:
            handlers = [self.shop.limit(), self.shop.trimming(budget)]
            (limit, ours), loads = self._compare(handlers, what, self.rounds + 1, hold.compare_paired)
            ratio = f"{ours.median('hold') / limit.median('hold'):.2f}"
            held = (seconds(limit.median("hold")), seconds(ours.median("hold")))
            rows.append(
                (label, *held, ratio, seconds(ours.median("whole")), size(ours.median("written")), loads)
            )
        head = (
            "process",
            "kernel, discarded",
            "ours, trimmed",
            "x limit",
            "file whole",
            "written",
            "machine",
        )
        self.report.add(Table("hold: trimmed", head, rows, f"{self.rounds + 1} alternating rounds."))

    def by_size(self, handlers: Sequence[Handler]) -> None:
        """Compare the first handler with the others on processes of each size."""
        rows = []
        for label, count, rounds in (
            ("1 MiB", 1 << 20, 9),
            ("100 MiB", 100 << 20, 7),
            ("1 GiB", GIB, 5),
            ("4 GiB", 4 * GIB, 1),
        ):
            image = self.shop.root / "sized"
            what = f"zeros:{count}"
            if count <= GIB:
                victims.make_image(image, count)
                what = f"image:{image}"
            results, loads = self._compare(handlers, what, rounds)
            held = [result.median("hold") for result in results]
            ratios = [f"{one / held[0]:.2f}" for one in held[1:]]
            rows.append((label, *map(seconds, held), *ratios, f"{rounds} rounds; {loads}"))
        image.unlink()
        head = ("process", *(handler.name for handler in handlers), "x", "machine")
        self.report.add(
            Table("socket: by size", head, rows, "4 GiB: touched zeros; others: memory of a service.")
        )

    def small(self, name: str, handlers: Sequence[Handler], rounds: int, count: int) -> None:
        """Compare handlers on small processes, `count` at once."""
        before = machine.load()
        rows = _spread(handlers, hold.compare_small(handlers, rounds, self.shop, count))
        what = "hold" if count == 1 else "until the last is released"
        note = f"{rounds} alternating rounds; load average {before:.1f} before."
        self.report.add(Table(name, ("handler", f"{what}, median", "least", "most"), rows, note))

    def many_trimmed(self, count: int) -> None:
        """Show what many large processes that crash at once cost each other, trimmed and discarded."""
        handlers, rounds = [self.shop.limit(), self.shop.trimming()], self.rounds
        rows = _spread(handlers, hold.compare_small(handlers, rounds, self.shop, count, f"zeros:{80 << 20}"))
        head = ("handler", "until the last is released, median", "least", "most")
        self.report.add(Table(f"hold: {count} trimmed at once", head, rows, f"80 MiB each; {rounds} rounds."))


def _spread(handlers: Sequence[Handler], times: list[list[float]]) -> list[tuple[str, ...]]:
    """Return a row for each handler: the median, the least and the most of its times."""
    return [
        (handler.name, seconds(statistics.median(mine)), seconds(min(mine)), seconds(max(mine)))
        for handler, mine in zip(handlers, times, strict=True)
    ]


def run(root: Path, report: Report, rounds: int) -> None:
    """Measure everything about crashes."""
    image, noise = root / "image", root / "noise"
    victims.make_image(image, GIB)
    victims.make_random(noise, GIB)
    os.sync()  # or their writing would be measured too
    with cgroup.group("crashes") as group:
        shop = Workshop(root, group)
        crashes = Crashes(report, shop, group, rounds)
        took, choice = shop.calibrate()
        report.add(
            Table("calibrate", ("`core-dump-helper --calibrate` took", "it chose"), [(seconds(took), choice)])
        )
        with machine.warm_memory():
            large_processes(crashes, choice)
        crashes.pressure(image)
    run_small(root, report, rounds)
    Crashes(report, Workshop(root, None), None, rounds).many_trimmed(64)


def run_small(root: Path, report: Report, rounds: int) -> None:
    """Measure small processes alone: one crash, and 64 at once."""
    bare = Crashes(report, Workshop(root, None), None, rounds)
    shop = bare.shop
    with shop.systemd() as systemd:
        handlers = [
            shop.ours("auto"),
            shop.ours("pigz"),
            shop.ours("gzip"),
            systemd,
            shop.manual(),
            shop.limit(),
        ]
        bare.small("hold: 0.5 MB", handlers, 9, 1)
        bare.small("hold: 64 at once", [handlers[0], *handlers[3:]], 3, 64)


def run_socket(root: Path, report: Report, rounds: int) -> None:
    """Compare the socket with the pipe, and with systemd-coredump."""
    bare = Crashes(report, Workshop(root, None), None, rounds)
    with bare.shop.listening("auto") as socket, bare.shop.systemd() as systemd:
        handlers = [bare.shop.ours("auto"), socket, systemd]
        bare.small("socket: 0.5 MB", handlers, 9, 1)
        bare.small("socket: 64 at once", handlers, 5, 64)
    with cgroup.group("crashes") as group, machine.warm_memory():
        shop = Workshop(root, group)
        with shop.listening("isal") as socket:
            Crashes(report, shop, group, rounds).by_size([replace(shop.ours("isal"), most_rounds=9), socket])


def run_trimmed(root: Path, report: Report, rounds: int) -> None:
    """Measure trimmed dumps alone."""
    image = root / "image"
    victims.make_image(image, GIB)
    os.sync()  # or its writing would be measured too
    with cgroup.group("crashes") as group, machine.warm_memory():
        Crashes(report, Workshop(root, group), group, rounds).trimmed(image)
    Crashes(report, Workshop(root, None), None, rounds).many_trimmed(64)


def large_processes(crashes: Crashes, choice: str) -> None:
    """Measure crashes of large processes; `choice` is what `--calibrate` has chosen."""
    shop, image, noise = crashes.shop, crashes.shop.root / "image", crashes.shop.root / "noise"
    base = [shop.limit(), shop.igzip(), shop.ours("auto"), shop.ours(choice, 0)]
    rest = [shop.ours("pigz"), shop.ours("pigz", 0), shop.pigz(), shop.ours("gzip", 0), shop.ours("none")]
    with shop.systemd() as systemd:
        every = [*base, *rest, systemd, shop.manual()]
        crashes.large("hold: 1 GiB of a service", every, f"image:{image}", crashes.rounds + 1)
        crashes.large("hold: 1 GiB of random bytes", [*base[:3], systemd], f"image:{noise}", 1)
        crashes.large("hold: 4 GiB of touched zeros", base[:3], f"zeros:{4 * GIB}", 1)
    noise.unlink()
    crashes.trimmed(image)
    crashes.buffers(image)
    crashes.memory(image, choice)
    crashes.cache()

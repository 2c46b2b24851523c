"""Owns the output of `list` and `stats`: rows as they come, groups, JSON with coredumpctl's keys."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.text import Text

from core_dump_format.text import printable
from core_dumps import show, where
from core_dumps.dump import Dump, signal_name
from core_dumps.fit import Columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

COLUMNS = ("TIME", "NODE", "POD", "PID", "UID", "SIG", "EXE", "SIZE", "STATE")
GROUP_COLUMNS = ("COUNT", "FIRST", "LAST", "NODES", "BUILDS", "SIG", "EXE", "FINGERPRINT", "WHERE")
MOST_NAME = 253
"""Characters of the name of a node or pod: RFC 1123 subdomain."""
_SAMPLE = 200
"""So many rows are collected before the first is printed, because they determine the width of columns."""


def row(dump: Dump) -> list[str]:
    """Return the cells of a dump."""
    return [
        show.moment(dump.timestamp),
        printable(dump.text("node") or "-", MOST_NAME),
        printable(dump.text("pod") or "-", MOST_NAME),
        printable(dump.text("pid") or "-"),
        printable(dump.text("uid") or "-"),
        dump.signal_name or "-",
        printable(dump.program, 80),
        show.size(dump.size_bytes),
        ",".join(dump.states),
    ]


def print_rows(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], *, legend: bool
) -> None:
    """Print rows below a header; rows after the sample may be wider than their columns.

    Rows bypass rich, which takes 0.2 ms for a line: there may be 100,000.
    """
    coming = iter(rows)
    first = list(itertools.islice(coming, _SAMPLE))
    if not first:
        return
    sample = [columns, *first] if legend else first
    fitted = Columns(columns, sample, console.width if console.is_terminal else None)
    plain = console.color_system is None or console.no_color
    for number, cells in enumerate(itertools.chain(sample, coming)):
        line = fitted.line(cells)
        if not plain and legend and number == 0:
            console.print(Text(line, style="bold"))
        elif plain or columns[-1] != "STATE":
            console.file.write(f"{line}\n")
        else:
            console.file.write(f"{_coloured(line, cells[-1])}\n")


def _coloured(line: str, states: str) -> str:
    """Colour the states at the end of a line."""
    names = [show.coloured_state(name) for name in states.split(",")]
    return line[: len(line) - len(states)] + ",".join(names)


def document(dump: Dump) -> dict[str, Any]:
    """Return a dump as JSON: coredumpctl's keys first, then every other known field."""
    fields = {**dump.from_key, **(dump.metadata or {})}
    head: dict[str, Any] = {
        "time": dump.timestamp * 1_000_000,
        "pid": dump.number("pid"),
        "uid": dump.number("uid"),
        "gid": dump.number("gid"),
        "sig": dump.number("signal"),
        "corefile": ",".join(dump.states),
        "exe": dump.executable,
        "size": dump.size_bytes,
        "key": dump.key,
    }
    problem = dump.damage or dump.failure
    if problem:
        head["damage"] = problem
    return head | {name: value for name, value in fields.items() if name not in head and name != "size_bytes"}


def print_json(console: Console, documents: Iterable[dict[str, Any]], style: str) -> None:
    """Print a JSON array; `short` prints one object a line as they come, `pretty` indents. All of it is ASCII."""
    indent = 2 if style == "pretty" else None
    console.file.write("[")
    for number, content in enumerate(documents):
        console.file.write(("," if number else "") + "\n" + json.dumps(content, indent=indent))
    console.file.write("\n]\n")


def print_values(console: Console, dumps: Iterable[Dump], name: str) -> None:
    """Print one field of each dump that has it, one value a line, as `coredumpctl -F` does."""
    for dump in dumps:
        value = dump.executable if name == "exe" else dump.get(name)
        if value is not None:
            console.file.write(printable(value, 2000) + "\n")


@dataclass(slots=True)
class Group:
    """Dumps of one crash."""

    count: int
    first: int
    last: int
    newest: Dump
    nodes: set[str] = field(default_factory=set)
    builds: set[str] = field(default_factory=set)

    def add(self, dump: Dump) -> None:
        """Count a dump."""
        self.count += 1
        self.first = min(self.first, dump.timestamp)
        if dump.timestamp > self.last:
            self.last, self.newest = dump.timestamp, dump
        for name, values in (("node", self.nodes), ("build_id", self.builds)):
            value = dump.text(name)
            if value:
                values.add(value)


def groups(dumps: Iterable[Dump]) -> list[Group]:
    """Return each distinct crash once, the latest first.

    Dumps without a fingerprint are grouped by executable and signal.
    """
    found: dict[tuple[str, ...], Group] = {}
    for dump in dumps:
        fingerprint, version = dump.text("fingerprint"), str(dump.fingerprint_version)
        identity = (version, fingerprint) if fingerprint else (dump.program, str(dump.number("signal")), "")
        group = found.setdefault(identity, Group(0, dump.timestamp, dump.timestamp, dump))
        group.add(dump)
    return sorted(found.values(), key=lambda group: group.last, reverse=True)


def versions(groups: Iterable[Group]) -> set[int]:
    """Return the versions of the groups' fingerprints; the same crash has a different fingerprint in each version."""
    return {group.newest.fingerprint_version for group in groups if group.newest.text("fingerprint")}


def group_row(group: Group) -> list[str]:
    """Return the cells of a group."""
    newest = group.newest
    return [
        str(group.count),
        show.moment(group.first),
        show.moment(group.last),
        str(len(group.nodes)),
        str(len(group.builds)),
        newest.signal_name or "-",
        printable(newest.program, 80),
        printable(newest.text("fingerprint") or "-", 16),
        printable(where.where(newest.text("frames") or "") or "-", 120),
    ]


def group_document(group: Group) -> dict[str, Any]:
    """Return a group as JSON."""
    return {
        "count": group.count,
        "first": group.first * 1_000_000,
        "last": group.last * 1_000_000,
        "sig": group.newest.number("signal"),
        "exe": group.newest.executable,
        "fingerprint": group.newest.text("fingerprint"),
        "fingerprint_version": group.newest.fingerprint_version,
        "frames": where.words(group.newest.text("frames") or ""),
        "nodes": sorted(group.nodes),
        "builds": sorted(group.builds),
        "newest": group.newest.key,
    }


def _kinds(dumps: Iterable[Dump]) -> list[tuple[tuple[str, int | None], int]]:
    """Return executable, signal and count of each kind of crash, the most frequent first."""
    return Counter((dump.program, dump.number("signal")) for dump in dumps).most_common()


def stat_rows(dumps: Iterable[Dump]) -> Iterator[list[str]]:
    """Yield the cells of each kind of crash."""
    for (program, signal), count in _kinds(dumps):
        yield [str(count), "-" if signal is None else signal_name(signal), printable(program, 100)]


def stat_documents(dumps: Iterable[Dump]) -> Iterator[dict[str, Any]]:
    """Yield each kind of crash as JSON."""
    for (program, signal), count in _kinds(dumps):
        yield {"count": count, "sig": signal, "exe": program}

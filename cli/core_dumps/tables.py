"""Owns what `list` prints: rows as they come, columns as wide as what was seen, JSON with coredumpctl's keys."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.dump import Dump, signal_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

COLUMNS = ("TIME", "NODE", "POD", "PID", "UID", "SIG", "EXE", "SIZE", "STATE")
GROUP_COLUMNS = ("COUNT", "FIRST", "LAST", "SIG", "EXE", "FINGERPRINT", "WHERE")
_RIGHT = frozenset({"PID", "UID", "SIZE", "COUNT"})
_SAMPLE = 200
"""So many rows are seen before the first is printed, for the width of the columns."""


def row(dump: Dump) -> list[str]:
    """Return the cells of a dump."""
    return [
        show.moment(dump.timestamp),
        printable(dump.text("node") or "-", 63),
        printable(dump.text("pod") or "-", 63),
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
    """Print rows below a header; what comes after the first rows may be wider than its column.

    Written past rich, which takes a fifth of a millisecond for a line: there may be 100,000.
    """
    coming = iter(rows)
    first = list(itertools.islice(coming, _SAMPLE))
    if legend and first:
        first.insert(0, columns)
    widths = [max(len(cells[n]) for cells in first) for n in range(len(columns))] if first else []
    for number, cells in enumerate(itertools.chain(first, coming)):
        line = _line(columns, cells, widths)
        if console.color_system is None or console.no_color:
            console.file.write(f"{line}\n")
        elif legend and number == 0:
            console.print(Text(line, style="bold"))
        else:
            console.file.write(f"{_coloured(line, cells[-1]) if columns[-1] == 'STATE' else line}\n")


def _coloured(line: str, states: str) -> str:
    """Colour the states at the end of a line."""
    names = [show.coloured_state(name) for name in states.split(",")]
    return line[: len(line) - len(states)] + ",".join(names)


def _line(columns: Sequence[str], cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for column, cell, width in zip(columns, cells, widths, strict=True)
    ]
    padded[-1] = cells[-1]
    return " ".join(padded)


def document(dump: Dump) -> dict[str, Any]:
    """Return a dump as JSON: coredumpctl's keys first, then all that is known."""
    told = {**dump.named, **(dump.told or {})}
    told.pop("key", None)
    head: dict[str, Any] = {
        "time": dump.timestamp * 1_000_000,
        "pid": dump.number("pid"),
        "uid": dump.number("uid"),
        "gid": dump.number("gid"),
        "sig": dump.number("signal"),
        "corefile": ",".join(dump.states),
        "exe": dump.text("exe"),
        "size": dump.size_bytes,
        "key": dump.key,
    }
    if dump.damage:
        head["damage"] = dump.damage
    return head | {name: value for name, value in told.items() if name not in head and name != "size_bytes"}


def print_json(console: Console, documents: Iterable[dict[str, Any]], style: str) -> None:
    """Print a JSON array; `short` one object a line as they come, `pretty` indented. ASCII, so nothing steers."""
    indent = 2 if style == "pretty" else None
    console.file.write("[")
    for number, content in enumerate(documents):
        console.file.write(("," if number else "") + "\n" + json.dumps(content, indent=indent))
    console.file.write("\n]\n")


@dataclass(slots=True)
class Group:
    """Dumps of one crash."""

    count: int
    first: int
    last: int
    newest: Dump


def groups(dumps: Iterable[Dump]) -> list[Group]:
    """Return each distinct crash once, the latest first.

    A dump without a fingerprint is told apart by its executable and signal.
    """
    found: dict[tuple[str, ...], Group] = {}
    for dump in dumps:
        fingerprint = dump.text("fingerprint")
        identity = (fingerprint,) if fingerprint else (dump.program, str(dump.number("signal")))
        known = found.get(identity)
        if known is None:
            found[identity] = Group(1, dump.timestamp, dump.timestamp, dump)
            continue
        known.count += 1
        known.first = min(known.first, dump.timestamp)
        if dump.timestamp > known.last:
            known.last, known.newest = dump.timestamp, dump
    return sorted(found.values(), key=lambda group: group.last, reverse=True)


def group_row(group: Group) -> list[str]:
    """Return the cells of a group."""
    newest = group.newest
    return [
        str(group.count),
        show.moment(group.first),
        show.moment(group.last),
        newest.signal_name or "-",
        printable(newest.program, 80),
        printable(newest.text("fingerprint") or "-", 16),
        printable((newest.text("frames") or "-"), 120),
    ]


def group_document(group: Group) -> dict[str, Any]:
    """Return a group as JSON."""
    return {
        "count": group.count,
        "first": group.first * 1_000_000,
        "last": group.last * 1_000_000,
        "sig": group.newest.number("signal"),
        "exe": group.newest.text("exe"),
        "fingerprint": group.newest.text("fingerprint"),
        "frames": (group.newest.text("frames") or "").split(),
        "newest": group.newest.key,
    }


def stat_rows(dumps: Iterable[Dump]) -> Iterator[list[str]]:
    """Yield count, signal and executable of each kind of crash, the most frequent first."""
    counts = Counter((dump.program, dump.number("signal")) for dump in dumps)
    for (program, signal), count in counts.most_common():
        yield [str(count), "-" if signal is None else signal_name(signal), printable(program, 100)]

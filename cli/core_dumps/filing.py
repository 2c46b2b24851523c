"""Owns the command `modules`: the executables and libraries of a dump, and the bucket's modules as a whole."""

# ruff: noqa: FBT002  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports its own modules only: completion and --help must be quick

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.app import app
from core_dumps.errors import CliError, UsageError
from core_dumps.options import Json, Selection, with_selection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

COLUMNS = ("STATE", "SIZE", "BUILD ID", "PATH")
_SHOWN_DIGITS = 16


@app.command()
@with_selection
def modules(
    selection: Selection,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all modules of the bucket and remove those with wrong content"),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove the modules that no dump needs and that are over 30 days old"),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without a question")] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
) -> None:
    """List the executable and the libraries of the newest matching dump, or look after those in the bucket."""
    if verify or prune:
        if json is not Json.OFF and not yes:
            raise UsageError("modules --json asks nothing: give --yes")
        if not selection.query().selects_everything:
            raise UsageError(
                "--verify and --prune are about all modules of the bucket: give no MATCH and no filter"
            )
        if not yes and not sys.stdin.isatty():
            raise UsageError("modules asks before it removes something, and there is no terminal: give --yes")
        with selection.open() as bucket:
            _look_after(bucket, verify=verify, prune=prune, yes=yes, json=json)
        return
    from core_dumps import tables

    with selection.open() as bucket:
        dump = selection.newest(bucket)
        if dump.size_bytes is None:
            raise CliError("this is a record without a dump")
        rows = list(_rows(selection, bucket, dump))
    if json is not Json.OFF:
        tables.print_json(show.console(), rows, json)
    else:
        tables.print_rows(show.console(), COLUMNS, map(_cells, rows), legend=True)


def _cells(row: dict[str, Any]) -> list[Any]:
    return [
        row["state"],
        show.size(row["size"]) if row["size"] is not None else "-",
        (row["build_id"] or "-")[:_SHOWN_DIGITS],
        printable(row["path"], 1000),
    ]


def _rows(selection: Selection, bucket: Bucket, dump: Dump) -> Iterator[dict[str, Any]]:
    """Yield the facts about each module; from the core itself if the dump has no list."""
    from core_dumps import head, stored
    from core_dumps.pool import Pool

    listed = stored.read_list(bucket, dump)
    if listed is None:
        selection.note("this dump has no list of modules; these are the files that its core names")
        core = head.read_head(bucket, dump)
        if core.problem:
            raise CliError(f"its files are not known: {core.problem}")
        for path, build_id in core.build_ids.items():
            yield {"path": path, "build_id": build_id, "size": None, "sha256": None, "state": "unlisted"}
        return
    known = list(dict.fromkeys(module.sha256 for module in listed.modules if module.sha256))
    with Pool(stored.FETCHERS) as pool:
        sizes = dict(zip(known, pool.map(lambda sha256: stored.find(bucket, sha256), known), strict=True))
    for module in listed.modules:
        kept = "stored" if sizes.get(module.sha256) is not None else "absent"
        yield {
            "path": module.path.decode("utf-8", "backslashreplace"),
            "build_id": module.build_id or None,
            "size": module.size_bytes if module.sha256 else None,
            "sha256": module.sha256 or None,
            "state": module.missing or kept,
        }
    if listed.left_out:
        selection.note(f"{listed.left_out} more files are not in the list, which had no room for them")


def _look_after(bucket: Bucket, *, verify: bool, prune: bool, yes: bool, json: Json) -> None:
    from core_dumps import tables

    said = typer.echo if json is Json.OFF else _nothing
    wrong = _verify(bucket, said, yes=yes) if verify else []
    rows = wrong + (_prune(bucket, said, yes=yes) if prune else [])
    if json is not Json.OFF:
        tables.print_json(show.console(), rows, json)
    stays = sum(not row["removed"] for row in rows)
    if stays:
        raise CliError(f"{show.count(stays, 'module')} could not be removed")
    if wrong:
        raise CliError("the bucket held wrong modules: who can write to it?")


def _nothing(_: str) -> None:
    """Print nothing: the JSON output contains the same facts."""


def _verify(bucket: Bucket, said: Callable[[str], None], *, yes: bool) -> list[dict[str, Any]]:
    """Remove modules with wrong content; return the facts about each."""
    from core_dumps import keeping
    from core_dumps.progress import Bars

    with Bars() as bars:
        count, wrong = keeping.find_wrong(bucket, bars)
    for key, problem in wrong.items():
        said(f"{printable(key)}: {problem}")
    said(f"verified {count} modules: {len(wrong)} are not what their names say")
    if not wrong:
        return []
    _confirm(len(wrong), yes=yes)
    return _remove(bucket, wrong, said)


def _prune(bucket: Bucket, said: Callable[[str], None], *, yes: bool) -> list[dict[str, Any]]:
    """Remove modules that no list names; return the facts about each."""
    from core_dumps import keeping

    lists = keeping.Lists(bucket)
    count, unneeded = keeping.find_unneeded(bucket, lists)
    said(f"{len(unneeded)} of {count} modules are in no list and over {keeping.YOUNG_DAYS} days old")
    if not unneeded:
        return []
    _confirm(len(unneeded), yes=yes)
    lists.read_new()  # the question may have waited for hours, while nodes published lists
    still = {key: "in no list" for sha256, key in unneeded.items() if not lists.need(sha256)}
    return _remove(bucket, still, said)


def _confirm(count: int, *, yes: bool) -> None:
    """Ask before modules are removed.

    Raises:
        CliError: the answer is no.
    """
    if not yes and not typer.confirm(f"Remove {show.count(count, 'module')}?"):
        raise CliError("nothing was removed")


def _remove(bucket: Bucket, reasons: dict[str, str], said: Callable[[str], None]) -> list[dict[str, Any]]:
    """Delete objects and return the result for each."""
    rows = []
    for key, problem in bucket.delete_objects(reasons):
        rows.append({"key": key, "reason": reasons[key], "removed": problem is None, "problem": problem})
        if problem:
            show.note(f"{printable(key)}: {problem}")
    said(f"removed {[row['removed'] for row in rows].count(True)} of {len(rows)}")
    return rows

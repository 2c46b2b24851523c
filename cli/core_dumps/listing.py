"""Owns the commands about sets of dumps: `list`, `rm`, `stats`."""

# ruff: noqa: FBT002, PLR0913, PLR0917  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports its own modules only: completion and --help must be quick

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.app import app
from core_dumps.errors import CliError, UsageError
from core_dumps.options import Json, Selection, with_selection
from core_dumps.pager import NoPager, paged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from core_dumps import tables
    from core_dumps.bucket import Bucket, Deletion
    from core_dumps.dump import Dump

MOST_READ = 1000
"""Without --all, `list` reads the metadata of so many dumps and shows the rest from their keys."""


@app.command("list")
@with_selection
def list_dumps(
    selection: Selection,
    count: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help="Show only the newest N dumps or groups")
    ] = None,
    one: Annotated[bool, typer.Option("-1", help="Show only the newest dump or group")] = False,
    reverse: Annotated[
        bool, typer.Option("--reverse", "-r", help="Print the newest first, which is the default here")
    ] = False,
    oldest_first: Annotated[bool, typer.Option("--oldest-first", help="Print the oldest first")] = False,
    group: Annotated[bool, typer.Option("--group", help="Print each distinct crash once")] = False,
    field: Annotated[
        str | None,
        typer.Option("--field", "-F", metavar="FIELD", help="Print only this field of each dump that has it"),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help=f"Read every metadata object, not only the newest {MOST_READ}")
    ] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
    no_legend: Annotated[bool, typer.Option("--no-legend", help="Print no header")] = False,
    no_pager: NoPager = False,
) -> None:
    """List dumps, newest first. This is the default command."""
    from core_dumps import match, tables

    field, limit = match.field_name(field) if field else None, 1 if one else count
    if reverse and oldest_first:
        raise UsageError("give either --reverse or --oldest-first")
    with selection.open() as bucket:
        found = _some(selection, bucket, reads_all=everything or group, count=None if group else limit)
        if oldest_first and not group:
            found = iter(list(found)[::-1])
        dumps = selection.some(bucket, found)
        look = {"legend": not no_legend, "no_pager": no_pager}
        if not group or field:
            _print_dumps(dumps, field, json, **look)
            return
        groups = tables.groups(dumps)[:limit][:: -1 if oldest_first else 1]
        _print_groups(groups, json, **look)
        _note_versions(selection, groups)


def _print_dumps(
    dumps: Iterable[Dump], field: str | None, json: Json, *, legend: bool, no_pager: bool
) -> None:
    from core_dumps import tables

    with paged(off=no_pager):
        if field:
            tables.print_values(show.console(), dumps, field)
        elif json is not Json.OFF:
            tables.print_json(show.console(), map(tables.document, dumps), json)
        else:
            tables.print_rows(show.console(), tables.COLUMNS, map(tables.row, dumps), legend=legend)


def _print_groups(groups: list[tables.Group], json: Json, *, legend: bool, no_pager: bool) -> None:
    from core_dumps import tables

    with paged(off=no_pager):
        if json is not Json.OFF:
            tables.print_json(show.console(), map(tables.group_document, groups), json)
        else:
            rows = map(tables.group_row, groups)
            tables.print_rows(show.console(), tables.GROUP_COLUMNS, rows, legend=legend)


def _note_versions(selection: Selection, groups: list[tables.Group]) -> None:
    """Tell the user if one crash may be several groups, because releases compute fingerprints differently."""
    from core_dumps import tables

    versions = tables.versions(groups)
    if len(versions) > 1:
        known = " and ".join(map(str, sorted(versions)))
        selection.note(f"fingerprints of versions {known}: one crash can be a group in each")


def _some(selection: Selection, bucket: Bucket, *, reads_all: bool, count: int | None) -> Iterator[Dump]:
    """Yield the newest dumps; read metadata only of the newest ones if keys can decide the query."""
    query = selection.query()
    if reads_all or query.needs_metadata:
        yield from itertools.islice(selection.dumps(bucket), count)
        return
    by_key = itertools.islice(selection.dumps(bucket, read=False), count)
    newest = bucket.read_metadata(itertools.islice(by_key, MOST_READ))
    yield from (dump for dump in newest if query.matches_dump(dump))
    rest = 0
    for rest, dump in enumerate(by_key, start=1):  # noqa: B007  used after the loop
        yield dump
    if rest:
        selection.note(
            f"{rest} older dumps are shown from their keys alone; --all reads every metadata object"
        )


@app.command()
@with_selection
def rm(
    selection: Selection,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted")] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
) -> None:
    """Delete all matching dumps and their metadata objects."""
    from core_dumps import tables

    if selection.query().selects_everything:
        raise UsageError(
            "rm deletes all that matches: give MATCH, --node, --namespace, --pod, --image, --since or --until"
        )
    if json is not Json.OFF and not (yes or dry_run):
        raise UsageError("rm --json asks nothing: give --yes or --dry-run")
    with selection.open() as bucket:
        dumps = list(_some(selection, bucket, reads_all=False, count=None))
        if not dumps:
            raise selection.no_match(bucket)
        if json is not Json.OFF:
            rows = _deletions([] if dry_run else bucket.delete(dumps), dumps)
            tables.print_json(show.console(), rows, json)
            if not dry_run and not all(row["deleted"] for row in rows):
                raise CliError("not all dumps were deleted")
            return
        tables.print_rows(show.console(), tables.COLUMNS, map(tables.row, dumps), legend=True)
        if dry_run:
            return
        if not yes and not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and there is no terminal: give --yes")
        if not yes and not typer.confirm(f"Delete {show.count(len(dumps), 'dump')}?"):
            raise CliError("nothing was deleted")
        _delete(bucket, dumps)


def _deletions(deletions: Iterable[Deletion], dumps: list[Dump]) -> list[dict[str, Any]]:
    """Return the result for each dump, as JSON."""
    problems = {deletion.dump.key: deletion.problem for deletion in deletions}
    return [
        {
            "key": dump.key,
            "deleted": dump.key in problems and problems[dump.key] is None,
            "problem": problems.get(dump.key),
        }
        for dump in dumps
    ]


def _delete(bucket: Bucket, dumps: list[Dump]) -> None:
    """Delete dumps and print each that is not gone.

    Raises:
        CliError: not all are gone.
    """
    deleted = tried = 0
    try:
        for tried, deletion in enumerate(bucket.delete(dumps), start=1):  # noqa: B007  used after the loop
            if deletion.problem is None:
                deleted += 1
            else:
                show.note(f"{printable(deletion.dump.key, 1100)}: {deletion.problem}")
    finally:
        typer.echo(f"deleted {deleted} of {len(dumps)}")
    if deleted < len(dumps):
        untried = f", {len(dumps) - tried} were not tried" if tried < len(dumps) else ""
        raise CliError(f"{show.count(tried - deleted, 'dump')} could not be deleted{untried}")


@app.command()
@with_selection
def stats(
    selection: Selection,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
    no_pager: NoPager = False,
) -> None:
    """Count crashes by executable and signal, and plot them over time."""
    from core_dumps import plot, tables

    with selection.open() as bucket:
        dumps = list(selection.dumps(bucket))
        if not dumps:
            raise selection.no_match(bucket)
    with paged(off=no_pager):
        console = show.console()
        if json is not Json.OFF:
            tables.print_json(console, tables.stat_documents(dumps), json)
            return
        tables.print_rows(console, ("COUNT", "SIG", "EXE"), tables.stat_rows(dumps), legend=True)
        console.print()
        for line in plot.plot([dump.timestamp for dump in dumps], console.width, sys.stdout.encoding):
            console.print(line)

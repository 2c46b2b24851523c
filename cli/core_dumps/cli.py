"""Turns the command line of `core-dumps` into calls: one function a command, in coredumpctl's words."""

# ruff: noqa: FBT001, FBT002, PLR0913, PLR0917  the parameters of a command are its options
# ruff: noqa: PLC0415  a command imports what it alone needs: completion and --help are to be quick

from __future__ import annotations

import gc
import itertools
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from core_dump_format.text import printable
from core_dumps import __version__, show, when
from core_dumps.errors import CliError, NoMatchError, UsageError
from core_dumps.options import Selection, ending, with_selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

MOST_SIDECARS = 1000
"""Without --all, `list` reads the sidecars of so many dumps and shows the rest as their keys tell."""
WEEK_SECONDS = 7 * 86400

app = typer.Typer(
    name="core-dumps",
    help="Find the core dumps of a fleet in their bucket, and bring them to a debugger.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Json(StrEnum):
    """How to print JSON."""

    OFF = "off"
    SHORT = "short"
    PRETTY = "pretty"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"core-dumps {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it")
    ] = False,
) -> None:
    pass


@app.command("list")
@with_selection
def list_dumps(
    selection: Selection,
    count: Annotated[int | None, typer.Option("-n", metavar="N", min=1, help="Show the N newest")] = None,
    one: Annotated[bool, typer.Option("-1", help="Show the newest")] = False,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Oldest first")] = False,
    group: Annotated[
        bool, typer.Option("--group", help="Each distinct crash once: count, first, last")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help=f"Read all sidecars, not those of the newest {MOST_SIDECARS}")
    ] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
    no_legend: Annotated[bool, typer.Option("--no-legend", help="No header")] = False,
) -> None:
    """List dumps, newest first."""
    from core_dumps import tables

    with selection.open() as bucket:
        asked_all = everything or group
        found = _some(selection, bucket, asked_all=asked_all, count=1 if one else count)
        if reverse:
            found = iter(list(found)[::-1])
        first = next(found, None)
        if first is None:
            raise NoMatchError("no dump matches")
        dumps = itertools.chain([first], found)
        console = show.console()
        if group:
            groups = tables.groups(dumps)
            if json is not Json.OFF:
                tables.print_json(console, map(tables.group_document, groups), json)
            else:
                rows = map(tables.group_row, groups)
                tables.print_rows(console, tables.GROUP_COLUMNS, rows, legend=not no_legend)
        elif json is not Json.OFF:
            tables.print_json(console, map(tables.document, dumps), json)
        else:
            tables.print_rows(console, tables.COLUMNS, map(tables.row, dumps), legend=not no_legend)


def _some(selection: Selection, bucket: Bucket, *, asked_all: bool, count: int | None) -> Iterator[Dump]:
    """Yield dumps; sidecars of those alone that are shown, where the keys tell enough to choose them."""
    if asked_all or selection.query().needs_sidecars:
        yield from itertools.islice(selection.dumps(bucket), count)
        return
    by_key = itertools.islice(selection.dumps(bucket, read=False), count)
    query = selection.query()
    newest = bucket.read_sidecars(itertools.islice(by_key, MOST_SIDECARS))
    yield from (dump for dump in newest if query.matches_dump(dump))
    rest = 0
    for rest, dump in enumerate(by_key, start=1):  # noqa: B007  counted
        yield dump
    if rest:
        show.note(f"of {rest} older dumps only what their keys say; --all reads everything (state unread)")


@app.command()
@with_selection
def info(
    selection: Selection,
    no_core: Annotated[bool, typer.Option("--no-core", help="Do not look into the core itself")] = False,
) -> None:
    """Show everything known of the newest dump that matches, and what the core itself tells."""
    from core_dumps import details
    from core_dumps.head import read_head

    with selection.open() as bucket:
        dump = selection.newest(bucket)
        head = None if no_core or dump.size_bytes is None else read_head(bucket, dump)
        details.print_info(show.console(), bucket.name, dump, head)


@app.command()
@with_selection
def get(
    selection: Selection,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Save it here; - writes it out")
    ] = None,
    keep_compressed: Annotated[bool, typer.Option("--keep-compressed", help="Do not decompress")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE")] = False,
) -> None:
    """Download the newest dump that matches: verified, decompressed, resumed when run again."""
    from core_dumps.fetch import default_name, fetch
    from core_dumps.progress import Bars
    from core_dumps.stream import stream

    if output == "-" and sys.stdout.isatty():
        raise UsageError("a core is no text: send it into a pipe or file, or give -o FILE")
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        if output == "-":
            warn(dump, stream(bucket, dump, sys.stdout.buffer, bars, keep_compressed=keep_compressed))
            return
        target = output or default_name(dump, compressed=keep_compressed)
        fetched = fetch(bucket, dump, target, bars, keep_compressed=keep_compressed, force=force)
    warn(dump, fetched.warning)
    verified = ", ".join(fetched.verified) or "nothing: no checksum is known"
    typer.echo(f"{printable(fetched.path)}: {show.size(fetched.size_bytes)}, verified: {verified}")


def warn(dump: Dump, *texts: str | None) -> None:
    """Say what to know before using a dump."""
    for text in texts:
        if text:
            show.note(text)
    if dump.get("state") == "truncated" or dump.get("truncated"):
        show.note(f"this dump was cut short when it was made ({dump.text('truncated') or 'unknown'})")
    if dump.sensitive:
        show.note(
            f"sensitive ({dump.text('sensitive_reason') or 'unknown'}): it may hold another user's secrets"
        )
    if not dump.has_sidecar:
        show.note("incomplete: there is no sidecar, so its upload may not have ended")


Sysroot = Annotated[
    list[str] | None,
    typer.Option(
        "--sysroot", metavar="DIR", show_default=False, help="Files of the node or image; can be repeated"
    ),
]
Full = Annotated[
    bool, typer.Option("--full", help="Fetch the whole dump, not only the part that backtraces need")
]
Debugger = Annotated[str, typer.Option("--debugger", metavar="PROGRAM", help="gdb or lldb")]
Extra = Annotated[
    str,
    typer.Option(
        "--debugger-arguments", "-A", metavar="ARGS", show_default=False, help="More arguments for it"
    ),
]


@app.command()
@with_selection
def debug(
    selection: Selection,
    sysroot: Sysroot = None,
    debugger_program: Debugger = "gdb",
    arguments: Extra = "",
    full: Full = False,
) -> None:
    """Open the newest dump that matches in a debugger, with the executable of its build ID."""
    from core_dumps import debugger

    line = _debugger_line(selection, sysroot or [], debugger_program, arguments, batch=False, full=full)
    raise typer.Exit(debugger.run(line))


@app.command()
@with_selection
def bt(
    selection: Selection,
    sysroot: Sysroot = None,
    debugger_program: Debugger = "gdb",
    arguments: Extra = "",
    full: Full = False,
) -> None:
    """Print a backtrace of all threads of the newest dump that matches, for pasting into a ticket."""
    from core_dumps import debugger

    line = _debugger_line(selection, sysroot or [], debugger_program, arguments, batch=True, full=full)
    code, text = debugger.backtrace(line)
    for part in text.splitlines():
        typer.echo(printable(part, 10_000))
    if code:
        raise CliError(f"{debugger_program} failed (exit {code})")


def _debugger_line(
    selection: Selection, roots: list[str], program: str, arguments: str, *, batch: bool, full: bool
) -> list[str]:
    from core_dumps import debugger
    from core_dumps.progress import Bars

    debugger.check(program, roots)
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        core = debugger.load(bucket, dump, bars, full=full)
    warn(dump)
    found = debugger.modules(core, dump, roots)
    return debugger.command(program, core, found, roots, arguments, batch=batch)


@app.command()
@with_selection
def rm(
    selection: Selection,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted")] = False,
) -> None:
    """Delete all dumps that match, with their sidecars."""
    from core_dumps import tables

    query = selection.query()
    if not query.matches and not query.since and query.until == float("inf"):
        raise UsageError(
            "rm deletes all that match: say which (MATCH, --node, --namespace, --since or --until)"
        )
    with selection.open() as bucket:
        dumps = list(_some(selection, bucket, asked_all=False, count=None))
        if not dumps:
            raise NoMatchError("no dump matches")
        tables.print_rows(show.console(), tables.COLUMNS, map(tables.row, dumps), legend=True)
        if dry_run:
            return
        if not yes and not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and there is no terminal: give --yes")
        if not yes and not typer.confirm(f"Delete {len(dumps)} dumps?"):
            raise CliError("nothing was deleted")
        deleted = sum(1 for _ in bucket.delete(dumps))
    typer.echo(f"deleted {deleted}")


@app.command()
@with_selection
def share(
    selection: Selection,
    expires: Annotated[
        str, typer.Option("--expires", metavar="SPAN", help="How long it works, at most 7d")
    ] = "1h",
) -> None:
    """Print a URL from which the newest dump that matches can be downloaded without credentials."""
    seconds = int(when.span(expires))
    if not 1 <= seconds <= WEEK_SECONDS:
        raise UsageError("--expires takes 1s to 7d (what S3 signs at most)")
    with selection.open() as bucket:
        dump = selection.newest(bucket)
        if dump.size_bytes is None:
            raise CliError("there is only a record, no dump")
        warn(dump)
        show.note(f"whoever has this URL has the dump's secrets, for {expires}")
        typer.echo(bucket.presign(dump, seconds))


@app.command()
@with_selection
def stats(selection: Selection) -> None:
    """Count crashes by executable and signal, and plot them over time."""
    from core_dumps import plot, tables

    with selection.open() as bucket:
        dumps = list(selection.dumps(bucket))
    if not dumps:
        raise NoMatchError("no dump matches")
    console = show.console()
    tables.print_rows(console, ("COUNT", "SIG", "EXE"), tables.stat_rows(dumps), legend=True)
    console.print()
    for line in plot.plot([dump.timestamp for dump in dumps], console.width):
        console.print(line)


@app.command(hidden=True)
def man() -> None:
    """Print the manual page."""
    from core_dumps import manpage

    with ending():
        typer.echo(manpage.render(typer.main.get_command(app)), nl=False)
        sys.stdout.flush()


def main() -> None:
    """Run `core-dumps`.

    A listing makes some 100,000 objects that live until the end: looking through them for garbage is most of its time.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    app(prog_name="core-dumps")


if __name__ == "__main__":
    main()

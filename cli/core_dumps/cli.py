"""Turns the command line of `core-dumps` into calls: one function for each command, in coredumpctl's words."""

# ruff: noqa: FBT001, FBT002, PLR0913, PLR0917  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports only what it needs: completion and --help must be quick

from __future__ import annotations

import gc
import itertools
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from core_dump_format.text import printable
from core_dumps import __version__, show, when
from core_dumps.errors import CliError, UsageError
from core_dumps.options import Selection, ending, with_selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps import debugger
    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

MOST_READ = 1000
"""Without --all, `list` reads the metadata of so many dumps and shows the rest from their keys."""
WEEK_SECONDS = 7 * 86400

app = typer.Typer(
    name="core-dumps",
    help="Find the core dumps of a fleet in their bucket, and open them in a debugger.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


class Json(StrEnum):
    """The forms of JSON."""

    OFF = "off"
    SHORT = "short"
    PRETTY = "pretty"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"core-dumps {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001  its callback ends the program
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        command = typer.main.get_command(app).commands["list"]  # type: ignore[attr-defined]
        with command.make_context("core-dumps list", []) as sub:
            command.invoke(sub)


@app.command("list")
@with_selection
def list_dumps(
    selection: Selection,
    count: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help="Show only the newest N dumps or groups")
    ] = None,
    one: Annotated[bool, typer.Option("-1", help="Show only the newest dump or group")] = False,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Print the oldest first")] = False,
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
) -> None:
    """List dumps, newest first. This is the default command."""
    from core_dumps import match, tables

    field = match.field_name(field) if field else None
    limit = 1 if one else count
    with selection.open() as bucket:
        found = _some(selection, bucket, reads_all=everything or group, count=None if group else limit)
        if reverse and not group:
            found = iter(list(found)[::-1])
        first = next(found, None)
        if first is None:
            raise selection.no_match(bucket)
        dumps = itertools.chain([first], found)
        console = show.console()
        if field:
            tables.print_values(console, dumps, field)
        elif group:
            groups = tables.groups(dumps)[:limit]
            groups = groups[::-1] if reverse else groups
            if json is not Json.OFF:
                tables.print_json(console, map(tables.group_document, groups), json)
            else:
                rows = map(tables.group_row, groups)
                tables.print_rows(console, tables.GROUP_COLUMNS, rows, legend=not no_legend)
        elif json is not Json.OFF:
            tables.print_json(console, map(tables.document, dumps), json)
        else:
            tables.print_rows(console, tables.COLUMNS, map(tables.row, dumps), legend=not no_legend)


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
def info(
    selection: Selection,
    no_core: Annotated[bool, typer.Option("--no-core", help="Read only the metadata, not the core")] = False,
) -> None:
    """Print everything known about the newest matching dump: its metadata and the front of its core."""
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
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write to FILE; - is standard output")
    ] = None,
    keep_compressed: Annotated[
        bool, typer.Option("--keep-compressed", help="Write the object as it is in the bucket")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists")] = False,
) -> None:
    """Download the newest matching dump, verify and decompress it. The same command resumes a download."""
    from core_dumps.fetch import default_name, fetch
    from core_dumps.progress import Bars
    from core_dumps.stream import stream

    if output == "-" and sys.stdout.isatty():
        raise UsageError("a core is not text: redirect the output, or give -o FILE")
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        if output == "-":
            warning = stream(bucket, dump, sys.stdout.buffer, bars, keep_compressed=keep_compressed)
            _warn(selection, dump, warning)
            return
        target = output or default_name(dump, compressed=keep_compressed)
        fetched = fetch(bucket, dump, target, bars, keep_compressed=keep_compressed, force=force)
    _warn(selection, dump, fetched.warning)
    verified = ", ".join(fetched.verified) or "nothing, no checksum is known"
    typer.echo(f"{printable(fetched.path)}: {show.size(fetched.size_bytes)}, verified: {verified}")


def _warn(selection: Selection, dump: Dump, warning: str | None = None) -> None:
    """Print what a user must know before using a dump."""
    if warning:
        selection.note(warning)
    if dump.truncated:
        selection.note(f"this dump was cut short on its node ({dump.text('truncated') or 'unknown reason'})")
    if dump.sensitive:
        reason = dump.text("sensitive_reason") or "unknown reason"
        selection.note(f"this dump is sensitive ({reason}): it may contain another user's secrets")
    if not dump.has_metadata:
        selection.note("this dump has no metadata object; its upload may be incomplete")
    if dump.damage:
        selection.note(f"the metadata object of this dump is damaged: {dump.damage}")


Sysroot = Annotated[
    list[str] | None,
    typer.Option(
        "--sysroot",
        metavar="DIR",
        show_default=False,
        help="Directory with the files of the node or image; repeatable",
    ),
]
Executable = Annotated[
    str | None, typer.Option("--exe", metavar="FILE", help="The executable, if its build ID is not known")
]
Full = Annotated[
    bool, typer.Option("--full", help="Download the whole dump, not only the part that backtraces need")
]
Debugger = Annotated[str, typer.Option("--debugger", metavar="PROGRAM", help="gdb, lldb or the path of one")]
Extra = Annotated[
    str,
    typer.Option(
        "--debugger-arguments",
        "-A",
        metavar="ARGS",
        show_default=False,
        help="More arguments for the debugger",
    ),
]


@app.command()
@with_selection
def debug(
    selection: Selection,
    sysroot: Sysroot = None,
    debugger_program: Debugger = "gdb",
    arguments: Extra = "",
    executable: Executable = None,
    full: Full = False,
) -> None:
    """Open the newest matching dump in a debugger, with the executable that has its build ID."""
    from core_dumps import debugger

    session = _session(selection, sysroot or [], debugger_program, executable, full=full)
    raise typer.Exit(debugger.run(session.command(arguments, batch=False)))


@app.command()
@with_selection
def bt(
    selection: Selection,
    sysroot: Sysroot = None,
    debugger_program: Debugger = "gdb",
    arguments: Extra = "",
    executable: Executable = None,
    full: Full = False,
) -> None:
    """Print a backtrace of all threads of the newest matching dump, for a ticket."""
    from core_dumps import debugger

    session = _session(selection, sysroot or [], debugger_program, executable, full=full)
    code, text = debugger.backtrace(session.command(arguments, batch=True))
    for line in text.splitlines():
        typer.echo(printable(line.expandtabs(), 10_000))
    if code:
        raise CliError(f"{debugger_program} failed (exit {code})")
    if not debugger.has_resolved_frame(text):
        raise CliError("no address could be resolved to a function: see the notes above for missing files")


def _session(
    selection: Selection, roots: list[str], program: str, executable: str | None, *, full: bool
) -> debugger.Session:
    """Download a dump into the cache and find the files that belong to it."""
    from core_dumps import cache, debugger
    from core_dumps.progress import Bars

    debugger.check(program, roots, executable)
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        core = cache.load(bucket, dump, bars, full=full)
    _warn(selection, dump)
    return debugger.prepare(program, core, dump, roots, executable)


@app.command()
@with_selection
def rm(
    selection: Selection,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted")] = False,
) -> None:
    """Delete all matching dumps and their metadata objects."""
    from core_dumps import tables

    if selection.query().selects_everything:
        raise UsageError(
            "rm deletes all that matches: give MATCH, --node, --namespace, --pod, --since or --until"
        )
    with selection.open() as bucket:
        dumps = list(_some(selection, bucket, reads_all=False, count=None))
        if not dumps:
            raise selection.no_match(bucket)
        tables.print_rows(show.console(), tables.COLUMNS, map(tables.row, dumps), legend=True)
        if dry_run:
            return
        if not yes and not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and there is no terminal: give --yes")
        if not yes and not typer.confirm(f"Delete {len(dumps)} dumps?"):
            raise CliError("nothing was deleted")
        _delete(bucket, dumps)


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
        raise CliError(f"{tried - deleted} dumps could not be deleted{untried}")


@app.command()
@with_selection
def share(
    selection: Selection,
    expires: Annotated[
        str, typer.Option("--expires", metavar="SPAN", help="How long the URL works, at most 7d")
    ] = "1h",
) -> None:
    """Print a URL that downloads the newest matching dump without credentials."""
    seconds = int(when.span(expires))
    if not 1 <= seconds <= WEEK_SECONDS:
        raise UsageError("--expires takes 1s to 7d, the limit of S3")
    with selection.open() as bucket:
        dump = selection.newest(bucket)
        if dump.size_bytes is None:
            raise CliError("this is a record without a dump")
        _warn(selection, dump)
        selection.note(f"everyone who has this URL can download the dump and its secrets, for {expires}")
        typer.echo(bucket.presign(dump, seconds))


@app.command()
@with_selection
def stats(selection: Selection) -> None:
    """Count crashes by executable and signal, and plot them over time."""
    from core_dumps import plot, tables

    with selection.open() as bucket:
        dumps = list(selection.dumps(bucket))
        if not dumps:
            raise selection.no_match(bucket)
    console = show.console()
    tables.print_rows(console, ("COUNT", "SIG", "EXE"), tables.stat_rows(dumps), legend=True)
    console.print()
    for line in plot.plot([dump.timestamp for dump in dumps], console.width, sys.stdout.encoding):
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

    A listing makes some 100,000 objects that live until the end; searching them for garbage would take most of its
    time.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    show.never_fail_on_a_character()
    app(prog_name="core-dumps")


if __name__ == "__main__":
    main()

"""Owns the commands about one dump: `info`, `get`, `debug`, `bt`, `share`."""

# ruff: noqa: FBT002  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports only what it needs: completion and --help must be quick

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from core_dump_format.text import printable
from core_dumps import show, when
from core_dumps.app import app
from core_dumps.errors import CliError, UsageError
from core_dumps.options import Json, Selection, with_selection
from core_dumps.pager import NoPager, paged

if TYPE_CHECKING:
    from core_dumps import debugger
    from core_dumps.dump import Dump

WEEK_SECONDS = 7 * 86400


@app.command()
@with_selection
def info(
    selection: Selection,
    no_core: Annotated[bool, typer.Option("--no-core", help="Read only the metadata, not the core")] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
    no_pager: NoPager = False,
) -> None:
    """Show the metadata and the core of the newest matching dump."""
    from core_dumps import details, tables
    from core_dumps.head import read_head

    with selection.open() as bucket:
        dump = selection.newest(bucket)
        head = None if no_core or dump.size_bytes is None else read_head(bucket, dump)
    with paged(off=no_pager):
        if json is Json.OFF:
            details.print_info(show.console(), bucket.name, dump, head)
        else:
            tables.print_json(show.console(), [details.document(dump, head)], json)


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
    """Download the newest matching dump, verify and decompress it.

    The same command continues a download that was interrupted.
    """
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
    from core_dumps import details

    if warning:
        selection.note(warning)
    if dump.trimmed:
        selection.note(f"this dump was trimmed on its node ({dump.trimmed}): {details.trimmed_note(dump)}")
    elif dump.truncated:
        selection.note(f"this dump was cut short on its node ({dump.text('truncated') or 'unknown reason'})")
    if dump.sensitive:
        reason = dump.text("sensitive_reason") or "unknown reason"
        selection.note(f"this dump is sensitive ({reason}): it may contain another user's secrets")
    if not dump.has_metadata:
        selection.note("this dump has no metadata object; its upload may be incomplete")
    if dump.damage:
        selection.note(f"the metadata object of this dump is damaged: {dump.damage}")


@dataclass(frozen=True, slots=True)
class Debugging:
    """The options of the commands that run a debugger."""

    sysroot: Annotated[
        list[str] | None,
        typer.Option(
            "--sysroot",
            metavar="DIR",
            show_default=False,
            help="Directory with the files of the node or image; repeatable",
        ),
    ] = None
    program: Annotated[
        str, typer.Option("--debugger", metavar="PROGRAM", help="gdb, lldb, eu-stack or the path of one")
    ] = "gdb"
    arguments: Annotated[
        str,
        typer.Option(
            "--debugger-arguments",
            "-A",
            metavar="ARGS",
            show_default=False,
            help="More arguments for the debugger",
        ),
    ] = ""
    executable: Annotated[
        str | None, typer.Option("--exe", metavar="FILE", help="The executable, if its build ID is not known")
    ] = None
    symbols: Annotated[
        list[str] | None,
        typer.Option(
            "--symbols",
            metavar="FILE",
            show_default=False,
            help="File with the symbols of a stripped executable or library; repeatable",
        ),
    ] = None
    full: Annotated[
        bool, typer.Option("--full", help="Download the whole dump, not only the part that backtraces need")
    ] = False


@app.command()
@with_selection
def debug(selection: Selection, debugging: Debugging) -> None:
    """Open the newest matching dump in a debugger."""
    from core_dumps import serving

    with _session(selection, debugging) as session:
        code = serving.run(session, debugging.arguments)
    raise typer.Exit(code)


@app.command()
@with_selection
def bt(selection: Selection, debugging: Debugging, no_pager: NoPager = False) -> None:
    """Print the backtraces of the newest matching dump."""
    from core_dumps import debugger, serving

    with _session(selection, debugging) as session:

        def write(line: str) -> None:
            typer.echo(printable(session.shorten(line.expandtabs()), 10_000))

        backtrace = debugger.Backtrace(write)
        with paged(off=no_pager):
            code = serving.trace(session, debugging.arguments, backtrace)
    if code:
        raise CliError(f"{debugging.program} failed (exit {code})")
    if not backtrace.resolved:
        raise CliError("no address could be resolved to a function: see the notes above for missing files")


def _session(selection: Selection, debugging: Debugging) -> debugger.Session:
    """Download a dump into the cache and find the files that belong to it."""
    from core_dumps import cache, debugger, gathering
    from core_dumps.progress import Bars

    files = debugger.Files(
        debugging.program, debugging.sysroot or [], debugging.executable, debugging.symbols or []
    )
    debugger.check(files)
    notes: list[str] = []
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        core = cache.load(bucket, dump, bars, full=debugging.full)
        modules = gathering.gather(bucket, dump, core, files.roots, bars, notes.append)
    _warn(selection, dump)
    for line in notes:
        selection.note(line)
    return debugger.prepare(core, dump, modules, files)


@app.command()
@with_selection
def share(
    selection: Selection,
    expires: Annotated[
        str, typer.Option("--expires", metavar="SPAN", help="How long the URL works, at most 7d")
    ] = "1h",
) -> None:
    """Print a download URL of the newest matching dump."""
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

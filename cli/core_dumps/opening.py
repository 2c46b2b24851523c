"""Owns the commands about one dump: `info`, `get`, `share`."""

# ruff: noqa: FBT002  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports its own modules only: completion and --help must be quick

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from core_dump_format.text import printable
from core_dumps import show, when
from core_dumps.app import app
from core_dumps.errors import CliError, UsageError
from core_dumps.options import Json, Selection, with_selection
from core_dumps.pager import NoPager, paged

if TYPE_CHECKING:
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
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
) -> None:
    """Download the newest matching dump, verify and decompress it.

    The same command continues a download that was interrupted.
    """
    from core_dumps import tables
    from core_dumps.fetch import default_name, fetch
    from core_dumps.progress import Bars
    from core_dumps.stream import stream

    if output == "-" and sys.stdout.isatty():
        raise UsageError("a core is not text: redirect the output, or give -o FILE")
    if output == "-" and json is not Json.OFF:
        raise UsageError("--json and -o - both write to standard output: give -o FILE")
    with selection.open() as bucket, Bars() as bars:
        dump = selection.newest(bucket)
        if output == "-":
            warning = stream(bucket, dump, sys.stdout.buffer, bars, keep_compressed=keep_compressed)
            _warn(selection, dump, warning)
            return
        target = output or default_name(dump, compressed=keep_compressed)
        fetched = fetch(bucket, dump, target, bars, keep_compressed=keep_compressed, force=force)
    _warn(selection, dump, fetched.warning)
    if json is not Json.OFF:
        row = {"key": dump.key, "path": fetched.path, "size": fetched.size_bytes}
        tables.print_json(show.console(), [row | {"verified": list(fetched.verified)}], json)
        return
    verified = ", ".join(fetched.verified) or "nothing, no checksum is known"
    typer.echo(f"{printable(fetched.path)}: {show.size(fetched.size_bytes)}, verified: {verified}")


def _warn(selection: Selection, dump: Dump, warning: str | None) -> None:
    if warning:
        selection.note(warning)
    selection.warn(dump)


@app.command()
@with_selection
def share(
    selection: Selection,
    expires: Annotated[
        str, typer.Option("--expires", metavar="SPAN", help="How long the URL works, at most 7d")
    ] = "1h",
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
) -> None:
    """Print a download URL of the newest matching dump."""
    from core_dumps import tables

    seconds = int(when.span(expires))
    if not 1 <= seconds <= WEEK_SECONDS:
        raise UsageError("--expires takes 1s to 7d, the limit of S3")
    with selection.open() as bucket:
        dump = selection.newest(bucket)
        if dump.size_bytes is None:
            raise CliError("this is a record without a dump")
        selection.warn(dump)
        selection.note(f"everyone who has this URL can download the dump and its secrets, for {expires}")
        url = bucket.presign(dump, seconds)
    if json is not Json.OFF:
        tables.print_json(show.console(), [{"key": dump.key, "url": url, "expires_seconds": seconds}], json)
    else:
        typer.echo(url)

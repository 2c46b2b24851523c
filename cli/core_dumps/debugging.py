"""Owns the commands that bring a debugger to a dump: `bt`, `debug`, `debuginfod`."""

# ruff: noqa: FBT002, PLR0913, PLR0917  the parameters of a command are its options
# ruff: noqa: PLC0415  each command imports its own modules only: completion and --help must be quick

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from core_dump_format.text import printable
from core_dumps import show
from core_dumps.app import app
from core_dumps.errors import UsageError
from core_dumps.options import Json, Selection, with_selection
from core_dumps.pager import NoPager, paged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from core_dumps import debugger
    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump
    from core_dumps.tools import Files
    from core_dumps.traces import Traces


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
        str | None,
        typer.Option(
            "--debugger",
            metavar="PROGRAM",
            show_default="gdb, or drgn without gdb",
            help="gdb, drgn, lldb, eu-stack or the path of one",
        ),
    ] = None
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

    def files(self, note: Callable[[str], None]) -> Files:
        """Return the files that the user names, and the debugger.

        Raises:
            UsageError: one of them does not exist.
        """
        from core_dumps import tools

        files = tools.Files(
            tools.choose(self.program, note), self.sysroot or [], self.executable, self.symbols or []
        )
        tools.check(files)
        return files


@app.command()
@with_selection
def bt(
    selection: Selection,
    debugging: Debugging,
    count: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help="Backtraces of the newest N matching dumps")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Backtraces of all matching dumps, such as fingerprint=1f2e3d4c")
    ] = False,
    json: Annotated[Json, typer.Option(help="Print JSON")] = Json.OFF,
    no_pager: NoPager = False,
) -> None:
    """Print the backtraces of the newest matching dump."""
    from core_dumps import tables, tools
    from core_dumps.traces import Once, Traces, open_session

    files, several = debugging.files(selection.note), everything or count is not None
    if debugging.arguments and files.program == tools.DRGN:
        raise UsageError("--debugger-arguments: drgn takes none for a backtrace; debug gives it some")
    traces, note = Traces(files, debugging.arguments), Once(selection.note)
    with selection.open() as bucket:

        def open_one(dump: Dump) -> debugger.Session:
            return open_session(bucket, dump, files, note, full=debugging.full)

        dumps = _several(selection, bucket, count) if several else iter([selection.newest(bucket)])
        sessions = traces.sessions(dumps, open_one, keep=not several)
        first = next(sessions)  # it shows its progress before the pager has the terminal
        with contextlib.closing(sessions), paged(off=no_pager):
            rest = itertools.chain([first], sessions)
            if json is not Json.OFF:
                tables.print_json(show.console(), itertools.starmap(traces.document, rest), json)
            else:
                _print(traces, rest, headings=several)
    traces.check()


def _several(selection: Selection, bucket: Bucket, count: int | None) -> Iterator[Dump]:
    found = (dump for dump in selection.dumps(bucket) if dump.size_bytes is not None)
    return selection.some(bucket, itertools.islice(found, count))


def _print(
    traces: Traces, sessions: Iterable[tuple[Dump, debugger.Session | None]], *, headings: bool
) -> None:
    for number, (dump, session) in enumerate(sessions):
        if headings:
            typer.echo("\n" * (number > 0) + _heading(dump))
        problem = traces.write(session, typer.echo)
        if problem is not None and headings:
            show.note(str(problem))


def _heading(dump: Dump) -> str:
    """Return the line above one of several backtraces."""
    from core_dumps import tables

    words = [show.moment(dump.timestamp), printable(dump.program, 80), dump.signal_name or "-"]
    words += [printable(dump.text(name) or "", tables.MOST_NAME) for name in ("node", "pod")]
    return "  ".join([*filter(None, words), printable(dump.key, 1100)])


@app.command()
@with_selection
def debug(selection: Selection, debugging: Debugging) -> None:
    """Open the newest matching dump in a debugger."""
    from core_dumps import serving
    from core_dumps.traces import open_session

    files = debugging.files(selection.note)
    with selection.open() as bucket:
        session = open_session(bucket, selection.newest(bucket), files, selection.note, full=debugging.full)
    with session:
        code = serving.run(session, debugging.arguments)
    raise typer.Exit(code)


@app.command()
@with_selection
def debuginfod(
    selection: Selection,
    count: Annotated[
        int, typer.Option("-n", metavar="N", min=1, help="Only the newest N matching dumps")
    ] = 100,
) -> None:
    """Serve the files of all matching dumps to any debugger on this machine, until Ctrl-C.

    It prints the DEBUGINFOD_URLS for the debugger. A file is downloaded and verified when it is asked for.
    """
    from core_dumps import cache, lending, serving

    with selection.open() as bucket:
        dumps = list(_several(selection, bucket, count))
        shelf = lending.Shelf(bucket, dumps, cache.cache_directory(), selection.note)
        with serving.served(shelf.find) as address:
            typer.echo(f"export DEBUGINFOD_URLS={address}")
            sys.stdout.flush()
            selection.note(
                f"serving {show.count(len(shelf), 'file')} of {show.count(len(dumps), 'dump')} until Ctrl-C"
            )
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()

"""Owns the backtraces of one dump or several: the sessions of the debugger, and the dumps with a problem."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from core_dump_format.text import printable
from core_dumps import backtrace, cache, debugger, gathering, serving, tables
from core_dumps.cautions import cautions
from core_dumps.errors import CliError
from core_dumps.progress import Bars

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from core_dumps.bucket import Bucket
    from core_dumps.debugger import Session
    from core_dumps.dump import Dump
    from core_dumps.tools import Files

MOST_NOTES = 1000
MOST_LINE = 10_000
"""Characters of a line."""


class Once:
    """Tells the user each line only once, even if several dumps cause it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """Tell lines with `note`."""
        self._note = note
        self._said: set[str] = set()

    def __call__(self, line: str) -> None:
        """Tell a line, unless it was told before."""
        if line not in self._said and len(self._said) < MOST_NOTES:
            self._said.add(line)
            self._note(line)


def open_session(
    bucket: Bucket, dump: Dump, files: Files, note: Callable[[str], None], *, full: bool
) -> Session:
    """Download a dump into the cache and find the files that belong to it; the user gets notes about both.

    Raises:
        CliError: the dump cannot be read.
    """
    notes: list[str] = []
    with Bars() as bars:
        core = cache.load(bucket, dump, bars, notes.append, full=full)
        modules = gathering.gather(bucket, dump, core, files.roots, bars, notes.append)
    for line in (*cautions(dump), *notes):
        note(line)
    return debugger.prepare(core, dump, modules, files, note)


class Traces:
    """The backtraces of one dump or several."""

    def __init__(self, files: Files, arguments: str) -> None:
        """Run the debugger of `files` with more arguments."""
        self._files, self._arguments = files, arguments
        self._problems: list[CliError] = []
        self._count = 0

    def sessions(
        self, dumps: Iterable[Dump], open_one: Callable[[Dump], Session], *, keep: bool
    ) -> Generator[tuple[Dump, Session | None], None, None]:
        """Yield each dump with its session, which ends with the next one; None if it cannot be opened.

        Without `keep`, cores that are new in the cache are removed again: a group can have more than the disk holds.
        """
        before = cache.names()
        for dump in dumps:
            self._count += 1
            try:
                session = open_one(dump)
            except CliError as error:
                self._problems.append(error)
                yield dump, None
                continue
            try:
                with session:
                    yield dump, session
            finally:
                if not keep and os.path.basename(session.core) not in before:
                    os.unlink(session.core)

    def write(self, session: Session | None, write: Callable[[str], None]) -> CliError | None:
        """Write the lines of a backtrace; return the problem if the debugger failed or named no function."""
        if session is None:
            return self._problems[-1]

        def clean(line: str) -> None:
            write(printable(session.shorten(line.expandtabs()), MOST_LINE))

        trace = backtrace.Backtrace(clean)
        code = serving.trace(session, self._arguments, trace)
        if code:
            problem = f"{self._files.program} failed (exit {code})"
        elif not trace.resolved:
            problem = "no address could be resolved to a function: see the notes above for missing files"
        else:
            return None
        self._problems.append(CliError(problem))
        return self._problems[-1]

    def document(self, dump: Dump, session: Session | None) -> dict[str, Any]:
        """Return the backtrace of a dump as JSON."""
        lines: list[str] = []
        problem = self.write(session, lines.append)
        trace = {"backtrace": backtrace.threads(lines), "problem": None if problem is None else str(problem)}
        return tables.document(dump) | {"debugger": self._files.program} | trace

    def check(self) -> None:
        """Raise the problem of the only dump, or the number of dumps with a problem.

        Raises:
            CliError: a dump has a problem.
        """
        if self._problems and self._count > 1:
            raise CliError(f"no backtrace of {len(self._problems)} of {self._count} dumps")
        if self._problems:
            raise self._problems[0]

"""Owns the options that all commands share, and how a command ends: errors to one line, exit codes, closed pipes."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from core_dump_format.text import printable
from core_dumps import match, show, when
from core_dumps.errors import CliError, NoMatchError, UsageError
from core_dumps.match import Query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

DEFAULT_TEMPLATE = "{node}/{name}"
CLOSED_PIPE = 141
"""What a shell reports of a program that died of SIGPIPE."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which bucket, and which dumps in it."""

    matches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MATCH",
            show_default=False,
            help="PID, command name, path of an executable, or field=value",
        ),
    ] = None
    bucket: Annotated[
        str | None,
        typer.Option(
            "--bucket", envvar="BUCKET_NAME", metavar="BUCKET", help="Bucket, or s3://bucket/prefix"
        ),
    ] = None
    since: Annotated[
        str | None,
        typer.Option("--since", "-S", metavar="TIME", help="Not before: yesterday, -2h, 2025-06-30 14:00"),
    ] = None
    until: Annotated[str | None, typer.Option("--until", "-U", metavar="TIME", help="Not after")] = None
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Of this node")] = None
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="NAME", help="Of this Kubernetes namespace")
    ] = None
    key_template: Annotated[
        str, typer.Option(envvar="KEY_TEMPLATE", metavar="TEMPLATE", help="As the collectors have it")
    ] = DEFAULT_TEMPLATE
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say how many requests were made")] = False

    def query(self) -> Query:
        """Return what is asked for."""
        return Query(
            match.parse(self.matches or [], node=self.node, namespace=self.namespace),
            when.parse(self.since) if self.since else 0.0,
            when.parse(self.until) if self.until else float("inf"),
        )

    @contextmanager
    def open(self) -> Iterator[Bucket]:
        """Open the bucket, and say what it cost when asked to."""
        if self.bucket is None:
            raise UsageError("no bucket: set BUCKET_NAME or give --bucket s3://bucket/prefix")
        from core_dumps.bucket import Bucket  # noqa: PLC0415  botocore takes 0.3 s, --help does without

        bucket = Bucket(self.bucket, self.key_template)
        try:
            yield bucket
        finally:
            bucket.close()
            if self.verbose:
                counts = ", ".join(f"{count} {name}" for name, count in sorted(bucket.requests.items()))
                show.note(f"requests: {counts or 'none'}")

    def dumps(self, bucket: Bucket, *, read: bool = True) -> Iterator[Dump]:
        """Yield what is asked for, newest first."""
        query = self.query()
        for found in bucket.find(query):
            if read or query.needs_sidecars:
                yield from (dump for dump in bucket.read_sidecars(found) if query.matches_dump(dump))
            else:
                yield from found

    def newest(self, bucket: Bucket) -> Dump:
        """Return the newest dump that is asked for, as coredumpctl does; a record without a dump only if alone.

        Raises:
            NoMatchError: there is none.
        """
        query, record, others = self.query(), None, False
        for found in bucket.find(query):
            for read in bucket.read_sidecars(found):
                if not query.matches_dump(read):
                    continue
                if read.size_bytes is None:
                    record = record or read
                    continue
                others = len(found) > 1
                if others and not self.matches:
                    show.note(f"the newest of several: {read.key}")
                return read
        if record is None:
            raise NoMatchError("no dump matches")
        return record


def with_selection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a Selection, the options of one, and ends as they should be."""
    hints = get_type_hints(Selection, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(Selection)
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name])
        for p in list(inspect.signature(command).parameters.values())[1:]
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401  typer's values
        names = {parameter.name for parameter in shared}
        selection = Selection(**{name: given.pop(name) for name in names & given.keys()})
        with ending():
            command(selection, **given)
            sys.stdout.flush()

    del run.__wrapped__  # or its signature would be the one that is seen
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*shared, *own]}
    return run


@contextmanager
def ending() -> Iterator[None]:
    """Turn errors into one line and an exit code.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except CliError as error:
        show.note(str(error))
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        _abandon_stdout()
        raise typer.Exit(CLOSED_PIPE) from None
    except OSError as error:
        _abandon_stdout()
        what = "writing the output" if error.errno == errno.ENOSPC else printable(error.filename or "")
        show.note(f"{what}: {error.strerror or error}".removeprefix(": "))
        raise typer.Exit(1) from None


def _abandon_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's end does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

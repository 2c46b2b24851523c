"""Owns the options that all commands share, and the end of a command: its error message and exit status."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import itertools
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from core_dump_format.keys import DEFAULT_TEMPLATE, FORMER_TEMPLATE
from core_dump_format.text import printable
from core_dumps import match, show, when
from core_dumps.cautions import cautions
from core_dumps.errors import INTERRUPTED, CliError, NoMatchError, UsageError
from core_dumps.match import Query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

DEFAULT_TEMPLATES = f"{DEFAULT_TEMPLATE} {FORMER_TEMPLATE}"
CLOSED_PIPE = 141
"""The status that a shell reports for a program that died of SIGPIPE."""
MOST_COMPARED = 100
"""So many further dumps are compared with the query to count those that match."""


class Json(StrEnum):
    """The forms of JSON."""

    OFF = "off"
    SHORT = "short"
    PRETTY = "pretty"


@dataclass(frozen=True, slots=True)
class Selection:
    """The bucket, and the dumps in it that a command is about."""

    matches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MATCH",
            show_default=False,
            help="A PID, a name, the path of an executable, or FIELD=VALUE",
        ),
    ] = None
    bucket: Annotated[
        str | None,
        typer.Option(
            "--bucket", envvar="BUCKET_NAME", metavar="BUCKET", help="Bucket, or s3://BUCKET/PREFIX"
        ),
    ] = None
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            "-S",
            metavar="TIME",
            help="Only dumps since this time: yesterday, -2h, 2025-06-30 14:00",
        ),
    ] = None
    until: Annotated[
        str | None, typer.Option("--until", "-U", metavar="TIME", help="Only dumps up to this time")
    ] = None
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Only dumps from this node")] = (
        None
    )
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", metavar="NAME", help="Only dumps from this Kubernetes namespace"),
    ] = None
    pod: Annotated[str | None, typer.Option("--pod", metavar="NAME", help="Only dumps from this pod")] = None
    image: Annotated[
        str | None, typer.Option("--image", metavar="NAME", help="Only dumps from containers of this image")
    ] = None
    key_template: Annotated[
        str,
        typer.Option(
            "--key-template",
            envvar="KEY_TEMPLATE",
            metavar="TEMPLATE",
            help="KEY_TEMPLATE of the collectors; several with spaces between them",
        ),
    ] = DEFAULT_TEMPLATES
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes, only errors")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the number of requests")] = False

    def query(self) -> Query:
        """Return the query.

        Raises:
            UsageError: a word or a time is invalid.
        """
        return Query(
            match.parse(
                self.matches or [], node=self.node, namespace=self.namespace, pod=self.pod, image=self.image
            ),
            when.parse(self.since) if self.since else 0.0,
            when.parse(self.until) if self.until else float("inf"),
        )

    @contextmanager
    def open(self) -> Iterator[Bucket]:
        """Open the bucket; with --verbose print the number of requests at the end.

        Raises:
            UsageError: no bucket is named.
        """
        if self.bucket is None:
            raise UsageError("no bucket: set BUCKET_NAME or give --bucket s3://BUCKET/PREFIX")
        from core_dumps.bucket import Bucket  # noqa: PLC0415  botocore takes 0.3 s, which --help does not need

        bucket = Bucket(self.bucket, self.key_template)
        try:
            yield bucket
        finally:
            bucket.close()
            if bucket.failures:
                objects = show.count(len(bucket.failures), "metadata object")
                self.note(f"{objects} could not be read; the last one: {bucket.failures[-1]}")
            if self.verbose:
                counts = ", ".join(f"{count} {name}" for name, count in sorted(bucket.requests.items()))
                show.note(f"requests: {counts or 'none'}")

    def note(self, text: str) -> None:
        """Print a note, unless --quiet was given."""
        if not self.quiet:
            show.note(text)

    def warn(self, dump: Dump) -> None:
        """Print the cautions about a dump, unless --quiet was given."""
        for line in cautions(dump):
            self.note(line)

    def dumps(self, bucket: Bucket, *, read: bool = True) -> Iterator[Dump]:
        """Yield the selected dumps, newest first; without `read` only with metadata if the query needs it."""
        query = self.query()
        for group in bucket.find(query):
            if read or query.needs_metadata:
                yield from (dump for dump in bucket.read_metadata(group) if query.matches_dump(dump))
            else:
                yield from group

    def newest(self, bucket: Bucket) -> Dump:
        """Return the newest selected dump, as coredumpctl does; a record without a dump only if there is no dump.

        Raises:
            NoMatchError: nothing matches.
        """
        query, record = self.query(), None
        groups = bucket.find(query)
        for group in groups:
            for dump in bucket.read_metadata(group):
                if not query.matches_dump(dump):
                    continue
                if dump.size_bytes is not None:
                    keys = [each.key for each in group]
                    rest = group[keys.index(dump.key) + 1 :]
                    self._note_others(bucket, dump, rest, complete=next(groups, None) is None)
                    return dump
                record = record or dump
        if record is None:
            raise self.no_match(bucket)
        return record

    def _note_others(self, bucket: Bucket, taken: Dump, rest: list[Dump], *, complete: bool) -> None:
        """Tell the user how many dumps were selected, if more than the one that was taken."""
        query = self.query()
        others = [dump for dump in rest if dump.size_bytes is not None]
        if query.needs_metadata:
            complete = complete and len(others) <= MOST_COMPARED
            others = list(filter(query.matches_dump, bucket.read_metadata(others[:MOST_COMPARED])))
        if others or not complete:
            count = f"{'' if complete else 'at least '}{len(others) + 1}"
            self.note(f"this is the newest of {count} dumps that match: {taken.key}")

    def some(self, bucket: Bucket, dumps: Iterator[Dump]) -> Iterator[Dump]:
        """Return the dumps.

        Raises:
            NoMatchError: the iterator is empty.
        """
        if (first := next(dumps, None)) is None:
            raise self.no_match(bucket)
        return itertools.chain([first], dumps)

    def no_match(self, bucket: Bucket) -> NoMatchError:
        """Return the error for a selection that matches nothing; an empty bucket has another one."""
        if bucket.is_empty():
            place = f"s3://{bucket.name}/{bucket.prefix}"
            return NoMatchError(f"{place} is empty: no collector has uploaded a dump to it")
        return NoMatchError("no dump matches")


def with_selection(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the fields of a command's dataclasses, such as Selection, into options, and add the common ending."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        options += _options(groups[name]) if name in groups else [own]

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401  typer's values
        for name, group in groups.items():
            fields = {field.name for field in dataclasses.fields(group)} & given.keys()
            given[name] = group(**{field: given.pop(field) for field in fields})
        with ending():
            command(**given)
            sys.stdout.flush()

    del run.__wrapped__  # or typer would see its signature
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _options(group: type) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]


@contextmanager
def ending() -> Iterator[None]:
    """Turn errors into one line and an exit status.

    Raises:
        typer.Exit: with the exit status.
    """
    try:
        yield
    except CliError as error:
        show.note(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        show.note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _abandon_stdout()
        raise typer.Exit(CLOSED_PIPE) from None
    except OSError as error:
        _abandon_stdout()
        what = "writing the output" if error.errno == errno.ENOSPC else printable(error.filename or "")
        show.note(f"{what}: {error.strerror or error}".removeprefix(": "))
        raise typer.Exit(1) from None


def _abandon_stdout() -> None:
    """Send what is still buffered to /dev/null, so that the interpreter does not fail on it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

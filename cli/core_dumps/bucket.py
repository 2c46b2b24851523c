"""Owns the bucket: which dumps there are and what their sidecars say, with as few requests as the keys allow.

A key template is walked folder by folder: a segment that the query knows costs no request, dates outside the asked
time are left out, the rest is listed, many folders at a time. Every request is counted.
"""

from __future__ import annotations

import re
import string
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.utils import parse_timestamp

from core_dump_collector import corefile
from core_dump_collector.errors import ConfigError
from core_dumps import __version__
from core_dumps.dump import MOST_SIDECAR_BYTES, SIDECAR_SUFFIX, Dump, Value
from core_dumps.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mypy_boto3_s3 import S3Client

    from core_dumps.match import Query

DEFAULT_TEMPLATE = "{node}/{name}"
SIDECAR_READERS = 24
LISTERS = 12
DAY_SECONDS = 86400
_RECORD = re.compile(r"storm-[0-9a-f]+-(?P<timestamp>[0-9]{1,12})")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ADVICE = {
    "NoSuchBucket": "there is no such bucket: correct BUCKET_NAME or --bucket",
    "AccessDenied": "access denied: these credentials need s3:ListBucket and s3:GetObject",
    "InvalidAccessKeyId": "the store does not know these credentials",
    "SignatureDoesNotMatch": "the store refuses these credentials: check AWS_SECRET_ACCESS_KEY and the clock",
    "ExpiredToken": "the credentials have expired: log in again",
    "PreconditionFailed": "the object was replaced meanwhile: start again",
}


def explain(error: Exception, what: str) -> CliError:
    """Turn an error of boto3 into one line."""
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", "error"))
        return CliError(f"{what}: {_ADVICE.get(code) or corefile.display(str(error))}")
    return CliError(f"{what}: {corefile.display(str(error))}")


def make_client() -> S3Client:
    """Return a client; endpoint, region and credentials come from where boto3 looks for them."""
    config = Config(
        max_pool_connections=SIDECAR_READERS + LISTERS,
        retries={"mode": "standard", "total_max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra=f"core-dumps/{__version__}",
    )
    session = botocore.session.Session()
    # botocore's own parser costs more than all else in a listing of 100,000 keys
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    try:
        return boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"S3: {corefile.display(str(error))}") from None


def _timestamp(value: Any) -> datetime:  # noqa: ANN401  what botocore found
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return parse_timestamp(value)


class Bucket:
    """A bucket, or what lies below a prefix of it."""

    def __init__(
        self, address: str, template: str = DEFAULT_TEMPLATE, client: S3Client | None = None
    ) -> None:
        """Connect to nothing yet.

        Raises:
            UsageError: the address or the template cannot be.
        """
        name, _, prefix = address.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(name):
            raise UsageError("--bucket or BUCKET_NAME takes a bucket's name or s3://bucket/prefix")
        try:
            corefile.check_template(template)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        self.name = name
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.requests: Counter[str] = Counter()
        self._template = template
        self._pattern = _pattern(template)
        self._lock = threading.Lock()
        self.client = client or make_client()
        self.client.meta.events.register("before-send.s3.*", self._count)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _count(self, request: Any, event_name: str, **_: object) -> None:  # noqa: ANN401, ARG002  botocore's hook
        with self._lock:
            self.requests[event_name.rpartition(".")[2]] += 1

    def find(self, query: Query) -> Iterator[list[Dump]]:
        """Yield the dumps that may be meant, without their sidecars, newest first.

        In several pieces where the template puts dates first, so that the newest can be shown before the rest is
        listed; else in one, since names that begin with a command say nothing of the order in time.
        """
        segments = self._template.split("/")
        folders = [self.prefix]
        pieces = False
        with ThreadPoolExecutor(LISTERS) as pool:
            for depth, segment in enumerate(segments[:-1]):
                if segment == "{date}" and not pieces and all("{" not in s for s in segments[:depth]):
                    pieces = True
                folders = self._descend(pool, folders, segment, query)
            groups = _by_date(folders, len(self.prefix), segments.index("{date}")) if pieces else [folders]
            for group in groups:
                leaves = pool.map(lambda folder: self._leaf(folder, segments[-1], query), group)
                found = [dump for leaf in leaves for dump in leaf]
                found.sort(key=lambda dump: (dump.timestamp, dump.key), reverse=True)
                if found:
                    yield found

    def _descend(self, pool: ThreadPoolExecutor, folders: list[str], segment: str, query: Query) -> list[str]:
        """Return the folders one level down that may hold what is meant."""
        if "{" not in segment:
            return [folder + segment + "/" for folder in folders]
        field = segment[1:-1]
        known = query.only(field) if field in {"node", "namespace", "pod", "container"} else None
        if known is not None:
            return [f"{folder}{corefile.clean(known)}/" for folder in folders]
        first, last = _dates(query) if field == "date" else ("", "")
        below = pool.map(lambda folder: self._folders(folder, first), folders)
        return [f for each in below for f in each if not last or f.split("/")[-2] <= last]

    def _folders(self, folder: str, first: str) -> list[str]:
        after = {"StartAfter": f"{folder}{first}~"} if first else {}
        pages = self._pages(Prefix=folder, Delimiter="/", **after)
        return [row["Prefix"] for page in pages for row in page.get("CommonPrefixes", [])]

    def _leaf(self, folder: str, segment: str, query: Query) -> list[Dump]:
        """List one folder. A thread's name asked for is a prefix, and then the time is one to start after."""
        prefix, after = folder, {}
        thread = query.only("thread")
        if segment == "{name}" and thread is not None:
            prefix += f"core-{corefile.clean(thread)}-"
            if query.since >= 10**9:  # so many digits have all times since 2001, so text sorts as numbers
                after = {"StartAfter": f"{prefix}{int(query.since) - 1}~"}
        rows = {
            row["Key"]: row
            for page in self._pages(Prefix=prefix, **after)
            for row in page.get("Contents", [])
        }
        found = []
        for key, row in rows.items():
            owner = key.removesuffix(SIDECAR_SUFFIX)
            if owner == key:
                found.append(
                    self._dump(
                        key, row["Size"], row["LastModified"], has_sidecar=f"{key}{SIDECAR_SUFFIX}" in rows
                    )
                )
            elif owner not in rows:
                found.append(self._dump(owner, None, row["LastModified"], has_sidecar=True))
        return [dump for dump in found if query.may_match(dump)]

    def _pages(self, **arguments: Any) -> Iterator[Any]:  # noqa: ANN401  botocore's arguments and pages
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, **arguments)
            yield from pages
        except (BotoCoreError, ClientError) as error:
            raise explain(error, f"listing s3://{self.name}") from error

    def _dump(self, key: str, size: int | None, modified: datetime, *, has_sidecar: bool) -> Dump:
        match = self._pattern.fullmatch(key.removeprefix(self.prefix))
        parts = {name: value for name, value in match.groupdict().items() if value} if match else {}
        named: dict[str, Value] = {
            k: v for k, v in parts.items() if k in {"node", "namespace", "pod", "container"}
        }
        last = key.rpartition("/")[2]
        core = corefile.parse(last)
        record = _RECORD.fullmatch(last)
        timestamp = int(modified.timestamp())
        if core is not None:
            named |= {
                "thread": core.comm,
                "pid": core.pid,
                "signal": core.signal,
                "timestamp": core.timestamp,
            }
            timestamp = core.timestamp
        elif record is not None:
            timestamp = int(record["timestamp"])
        return Dump(key, size, timestamp, has_sidecar, named)

    def read_sidecars(self, dumps: Iterable[Dump]) -> Iterator[Dump]:
        """Yield dumps in their order, each with its sidecar, reading many at a time and not far ahead."""
        with ThreadPoolExecutor(SIDECAR_READERS) as pool:
            waiting: list[Any] = []
            try:
                for dump in dumps:
                    waiting.append(pool.submit(self.with_sidecar, dump))
                    if len(waiting) > 4 * SIDECAR_READERS:
                        yield waiting.pop(0).result()
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()

    def with_sidecar(self, dump: Dump) -> Dump:
        """Return a dump with what its sidecar says; at most 64 KiB of it are read."""
        if not dump.has_sidecar or dump.told is not None:
            return dump
        try:
            answer = self.client.get_object(Bucket=self.name, Key=dump.key + SIDECAR_SUFFIX)
            with answer["Body"] as body:
                return dump.with_sidecar(body.read(MOST_SIDECAR_BYTES + 1))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in {"NoSuchKey", "404"}:
                return dump
            raise explain(error, f"reading {corefile.display(dump.key)}{SIDECAR_SUFFIX}") from error
        except BotoCoreError as error:
            raise explain(error, f"reading {corefile.display(dump.key)}{SIDECAR_SUFFIX}") from error

    def delete(self, dumps: Iterable[Dump]) -> Iterator[Dump]:
        """Delete dumps and yield each that is gone: the object first, so that a sidecar left behind is found again."""
        for dump in dumps:
            keys = [dump.key] if dump.size_bytes is not None else []
            keys += [dump.key + SIDECAR_SUFFIX] if dump.has_sidecar else []
            try:
                for key in keys:
                    self.client.delete_object(Bucket=self.name, Key=key)
            except (BotoCoreError, ClientError) as error:
                raise explain(error, f"deleting {corefile.display(dump.key)}") from error
            yield dump

    def presign(self, dump: Dump, seconds: int) -> str:
        """Return a URL that gives the dump to whoever has it."""
        try:
            parameters = {"Bucket": self.name, "Key": dump.key}
            url = self.client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds)
        except BotoCoreError as error:
            raise explain(error, "signing a URL") from error
        return str(url)


def _pattern(template: str) -> re.Pattern[str]:
    """Return what keys of a template look like."""
    seen: set[str] = set()
    pattern = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if field is not None:
            pattern += "[^/]+?" if field in seen else f"(?P<{field}>[^/]+?)"
            seen.add(field)
    return re.compile(pattern + r"(\.gz)?")


def _dates(query: Query) -> tuple[str, str]:
    """Return the day before the first, and the last, that a query can mean, as `YYYY-MM-DD`; empty for any.

    The day before with a `~` is what to start after: some stores take a folder's bare name for the folder itself.
    """
    before = query.since - DAY_SECONDS
    first = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d") if before > 0 else ""
    last = (
        datetime.fromtimestamp(query.until, UTC).strftime("%Y-%m-%d")
        if query.until < 10**11
        else "9999-12-31"
    )
    return first, last


def _by_date(folders: list[str], prefix: int, depth: int) -> list[list[str]]:
    """Group folders by their date, the newest first."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        groups.setdefault(folder[prefix:].split("/")[depth], []).append(folder)
    return [groups[date] for date in sorted(groups, reverse=True)]

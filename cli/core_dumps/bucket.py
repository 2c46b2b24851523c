"""Owns the bucket: which dumps it holds, their metadata, their deletion. Every request is counted."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.keys import MODULES_LIST_SUFFIX, check_template, parse_location
from core_dump_format.text import printable
from core_dumps import layouts
from core_dumps.client import BODY_ERRORS, S3, Page, Row, error_code, explain
from core_dumps.dump import METADATA_SUFFIX, MOST_METADATA_BYTES, Dump
from core_dumps.errors import CliError, UsageError
from core_dumps.pool import Pool
from core_dumps.status import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from botocore.response import StreamingBody

    from core_dumps.match import Query

METADATA_READERS = 24
MOST_DELETED = 1000
"""The most keys that DeleteObjects takes (Amazon S3 API Reference)."""
_GONE = frozenset({"NoSuchKey", "404"})
_CONCERNS_ALL = frozenset(
    {"NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
    | {"RequestTimeTooSkewed"}
)
"""Errors that no other object would be spared."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """The outcome of deleting one dump."""

    dump: Dump
    problem: str | None
    """What is left and why; None if dump and metadata object are gone."""


def _read(body: StreamingBody, most_bytes: int) -> bytes:
    """Return some bytes, and more than `most_bytes` of a longer body.

    A body is compared with its announced length only when read to its end.
    """
    document = b""
    while len(document) <= most_bytes and (piece := body.read(most_bytes)):
        document += piece
    return document


class Bucket:
    """A bucket, or the part of it below a prefix."""

    def __init__(self, address: str, template: str) -> None:
        """Prepare the client; no request is sent.

        Args:
            address: a bucket's name or `s3://bucket/prefix`.
            template: one KEY_TEMPLATE, or several separated by spaces.

        Raises:
            UsageError: the address or the template is invalid.
        """
        try:
            self.name, self.prefix = parse_location(address)
        except ValueError as error:
            raise UsageError(f"--bucket or BUCKET_NAME: {error}") from None
        try:
            for each in template.split() or [template]:
                check_template(each)
        except ValueError as error:
            raise UsageError(f"KEY_TEMPLATE={printable(template)!r}: {error}") from None
        self.requests: Counter[str] = Counter()
        self.failures: list[str] = []
        """Why metadata objects could not be read, one line each."""
        self._templates = template.split()
        self._lock = threading.Lock()
        self._status = Status()
        self._s3 = S3()
        self.client = self._s3.client
        self.client.meta.events.register("before-send.s3.*", self._count)
        self._quick = self._s3.quick_reader(self.name)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _count(self, event_name: str, **_: object) -> None:
        operation = event_name.rpartition(".")[2]
        if operation != "PutObject":  # the client prepares one to find the bucket, and never sends it
            with self._lock:
                self.requests[operation] += 1

    def find(self, query: Query) -> Iterator[list[Dump]]:
        """Yield the dumps that can match, newest first, without metadata; in groups if keys begin with dates."""
        try:
            for group in layouts.find(self._pages, self.prefix, self._templates, query):
                self._status.end()
                yield group
        finally:
            self._status.end()

    def is_empty(self) -> bool:
        """Tell whether nothing lies below the prefix."""
        arguments = {"prefix": self.prefix, "max-keys": "1"}
        return not self._page({name: value for name, value in arguments.items() if value}).rows

    def _pages(self, prefix: str, *, after: str = "", delimiter: str = "") -> Iterator[Page]:
        arguments = {"prefix": prefix, "start-after": after, "delimiter": delimiter}
        arguments = {name: value for name, value in arguments.items() if value}
        while True:
            page = self._page(arguments)
            self._status.add(len(page.rows))
            yield page
            if page.next_token is None:
                return
            if page.next_token == arguments.get("continuation-token"):
                raise CliError(f"listing s3://{self.name}: the store repeats the same page")
            arguments["continuation-token"] = page.next_token

    def _page(self, arguments: Mapping[str, str]) -> Page:
        if self._quick is not None:
            self._count("before-send.s3.ListObjectsV2")
            page = self._quick.page(arguments)
            if page is not None:
                return page
        parameters: dict[str, Any] = {
            "".join(map(str.title, name.split("-"))): int(value) if name == "max-keys" else value
            for name, value in arguments.items()
        }
        try:
            answer = self.client.list_objects_v2(Bucket=self.name, **parameters)
        except (BotoCoreError, ClientError) as error:
            raise explain(error, f"listing s3://{self.name}") from error
        rows = [Row(r["Key"], r["Size"], r["LastModified"].isoformat()) for r in answer.get("Contents", [])]
        folders = [folder["Prefix"] for folder in answer.get("CommonPrefixes", [])]
        return Page(rows, folders, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    def read_metadata(self, dumps: Iterable[Dump]) -> Iterator[Dump]:
        """Yield dumps in their order, each with its metadata; the more are consumed, the further it reads ahead."""
        coming, ahead, waiting = iter(dumps), 2, deque[Any]()
        with Pool(METADATA_READERS) as pool:
            while True:
                some = itertools.islice(coming, ahead - len(waiting))
                waiting.extend(pool.submit(self.with_metadata, dump) for dump in some)
                if not waiting:
                    return
                yield waiting.popleft().result()
                ahead = min(2 * ahead, 4 * METADATA_READERS)

    def with_metadata(self, dump: Dump) -> Dump:
        """Return a dump with its metadata, or with the reason why that is not known; at most 64 KiB are read.

        Raises:
            CliError: no object of the bucket can be read.
        """
        if not dump.has_metadata or dump.metadata is not None:
            return dump
        key = dump.key + METADATA_SUFFIX
        try:
            return dump.with_metadata(self._get(key, MOST_METADATA_BYTES))
        except (BotoCoreError, ClientError, *BODY_ERRORS) as error:
            if error_code(error) in _GONE:
                return dump
            problem = explain(error, f"reading {printable(key)}")
            one_object = isinstance(error, (ClientError, *BODY_ERRORS))
            if not one_object or error_code(error) in _CONCERNS_ALL:
                raise problem from error
            self.failures.append(str(problem))
            return dump.with_failure(str(problem))

    def delete(self, dumps: Iterable[Dump]) -> Iterator[Deletion]:
        """Delete dumps and yield the outcome of each; end early if a whole request failed.

        Metadata object and list of modules are deleted only after their dump, so a refused dump keeps them.
        """
        coming = iter(dumps)
        while batch := list(itertools.islice(coming, MOST_DELETED)):
            objects = [dump.key for dump in batch if dump.size_bytes is not None]
            refused = self._delete_keys(objects)
            rest = [dump for dump in batch if dump.key not in refused]
            stays = self._delete_keys([dump.key + METADATA_SUFFIX for dump in rest if dump.has_metadata])
            listed = [dump.key + MODULES_LIST_SUFFIX for dump in rest if dump.has_modules]
            stays |= {
                key.removesuffix(MODULES_LIST_SUFFIX) + METADATA_SUFFIX: why
                for key, why in self._delete_keys(listed).items()
            }
            for dump in batch:
                left = stays.get(dump.key + METADATA_SUFFIX)
                metadata_left = (
                    left and f"the dump is deleted, its metadata or list of modules is not: {left}"
                )
                yield Deletion(dump, refused.get(dump.key) or metadata_left)
            if len(refused) + len(stays) >= len(batch):
                return

    def _delete_keys(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete up to 1,000 keys; return the reason for each that is not gone."""
        if not keys:
            return {}
        try:
            answer = self.client.delete_objects(
                Bucket=self.name, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in {403, 404}:
                return dict.fromkeys(keys, str(explain(error, "", "s3:DeleteObject")))
            return self._delete_each(keys)  # the store has no DeleteObjects
        except BotoCoreError as error:
            return dict.fromkeys(keys, str(explain(error, "")))
        problems = {}
        for problem in answer.get("Errors", []):
            code, message = str(problem.get("Code", "error")), str(problem.get("Message", ""))
            refused = ClientError({"Error": {"Code": code, "Message": message}}, "DeleteObjects")
            problems[str(problem.get("Key"))] = str(explain(refused, "", "s3:DeleteObject"))
        return problems

    def _delete_each(self, keys: Sequence[str]) -> dict[str, str]:
        problems = {}
        for key in keys:
            try:
                self.client.delete_object(Bucket=self.name, Key=key)
            except (BotoCoreError, ClientError) as error:
                problems[key] = str(explain(error, "", "s3:DeleteObject"))
        return problems

    def objects(self, prefix: str) -> Iterator[Row]:
        """Yield every object whose key begins with a prefix; that of the bucket is not added."""
        for page in self._pages(prefix):
            yield from page.rows
        self._status.end()

    def small_object(self, key: str, most_bytes: int) -> bytes:
        """Return an object, or more than `most_bytes` of a longer one.

        Raises:
            CliError: it cannot be read.
        """
        try:
            return self._get(key, most_bytes)
        except (BotoCoreError, ClientError, *BODY_ERRORS) as error:
            raise explain(error, f"reading {printable(key)}") from error

    def _get(self, key: str, most_bytes: int) -> bytes:
        """Return an object, or more than `most_bytes` of a longer one; raise botocore's errors."""
        if self._quick is not None:
            self._count("before-send.s3.GetObject")
            content = self._quick.object(key, most_bytes + 1)
            if content is not None:
                return content
        answer = self.client.get_object(Bucket=self.name, Key=key)
        with contextlib.closing(answer["Body"]) as body:
            return _read(body, most_bytes)

    def delete_objects(self, keys: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """Delete objects; yield each key, and the reason why it could not be deleted or None."""
        coming = iter(keys)
        while batch := list(itertools.islice(coming, MOST_DELETED)):
            problems = self._delete_keys(batch)
            yield from ((key, problems.get(key)) for key in batch)

    def presign(self, dump: Dump, seconds: int) -> str:
        """Return a URL that gives the dump to everyone who has it."""
        try:
            parameters = {"Bucket": self.name, "Key": dump.key}
            url = self.client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds)
        except (BotoCoreError, ClientError) as error:
            raise explain(error, "signing a URL") from error
        return str(url)

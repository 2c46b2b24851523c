"""Owns the bucket: which dumps there are, what their sidecars say, what is done to them. Every request is counted."""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_format.keys import check_template, parse_location
from core_dump_format.text import printable
from core_dumps.client import S3, Page, Row, explain
from core_dumps.dump import MOST_SIDECAR_BYTES, SIDECAR_SUFFIX, Dump
from core_dumps.errors import CliError, UsageError
from core_dumps.status import Status
from core_dumps.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from core_dumps.match import Query

SIDECAR_READERS = 24
MOST_DELETED = 1000
"""So many keys DeleteObjects takes (Amazon S3 API Reference)."""
_GONE = frozenset({"NoSuchKey", "404"})


class Bucket:
    """A bucket, or what lies below a prefix of it."""

    def __init__(self, address: str, template: str) -> None:
        """Connect to nothing yet.

        Raises:
            UsageError: the address or the template cannot be.
        """
        try:
            self.name, self.prefix = parse_location(address)
        except ValueError as error:
            raise UsageError(f"--bucket or BUCKET_NAME: {error}") from None
        try:
            check_template(template)
        except ValueError as error:
            raise UsageError(f"KEY_TEMPLATE={printable(template)!r}: {error}") from None
        self.requests: Counter[str] = Counter()
        self._template = template
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
        with self._lock:
            self.requests[event_name.rpartition(".")[2]] += 1

    def find(self, query: Query) -> Iterator[list[Dump]]:
        """Yield the dumps that may be meant, without their sidecars, newest first, in pieces where keys allow it."""
        try:
            for group in Walk(self._pages, self.prefix, self._template, query).groups():
                self._status.end()
                yield group
        finally:
            self._status.end()

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
                raise CliError(f"listing s3://{self.name}: the store gives the same page again")
            arguments["continuation-token"] = page.next_token

    def _page(self, arguments: Mapping[str, str]) -> Page:
        if self._quick is not None:
            self._count("before-send.s3.ListObjectsV2")
            page = self._quick.page(arguments)
            if page is not None:
                return page
        names = {name: "".join(map(str.title, name.split("-"))) for name in arguments}
        try:
            answer = self.client.list_objects_v2(
                Bucket=self.name,
                **{names[name]: value for name, value in arguments.items()},  # type: ignore[arg-type]
            )
        except (BotoCoreError, ClientError) as error:
            raise explain(error, f"listing s3://{self.name}") from error
        rows = [Row(r["Key"], r["Size"], r["LastModified"].isoformat()) for r in answer.get("Contents", [])]
        folders = [folder["Prefix"] for folder in answer.get("CommonPrefixes", [])]
        return Page(rows, folders, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    def read_sidecars(self, dumps: Iterable[Dump]) -> Iterator[Dump]:
        """Yield dumps in their order, each with its sidecar, reading the further ahead the more are taken."""
        coming, ahead, waiting = iter(dumps), 2, deque[Any]()
        with ThreadPoolExecutor(SIDECAR_READERS) as pool:
            try:
                while True:
                    some = itertools.islice(coming, ahead - len(waiting))
                    waiting.extend(pool.submit(self.with_sidecar, dump) for dump in some)
                    if not waiting:
                        return
                    yield waiting.popleft().result()
                    ahead = min(2 * ahead, 4 * SIDECAR_READERS)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def with_sidecar(self, dump: Dump) -> Dump:
        """Return a dump with what its sidecar says; at most 64 KiB of it are read."""
        if not dump.has_sidecar or dump.told is not None:
            return dump
        key = dump.key + SIDECAR_SUFFIX
        if self._quick is not None:
            self._count("before-send.s3.GetObject")
            document = self._quick.object(key, MOST_SIDECAR_BYTES + 1)
            if document is not None:
                return dump.with_sidecar(document)
        try:
            answer = self.client.get_object(Bucket=self.name, Key=key)
            with answer["Body"] as body:
                return dump.with_sidecar(body.read(MOST_SIDECAR_BYTES + 1))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _GONE:
                return dump
            raise explain(error, f"reading {printable(key)}") from error
        except BotoCoreError as error:
            raise explain(error, f"reading {printable(key)}") from error

    def delete(self, dumps: Iterable[Dump]) -> Iterator[Dump]:
        """Delete dumps and yield each that is gone: the objects first, so that a sidecar left behind is found again.

        Raises:
            CliError: one could not be deleted; those before it are.
        """
        coming = iter(dumps)
        while batch := list(itertools.islice(coming, MOST_DELETED)):
            self._delete_keys([dump.key for dump in batch if dump.size_bytes is not None])
            self._delete_keys([dump.key + SIDECAR_SUFFIX for dump in batch if dump.has_sidecar])
            yield from batch

    def _delete_keys(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 keys in one request; one by one where the store does not know how."""
        if not keys:
            return
        try:
            answer = self.client.delete_objects(
                Bucket=self.name, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in {403, 404}:
                raise explain(error, f"deleting from s3://{self.name}", "s3:DeleteObject") from error
            self._delete_each(keys)
            return
        except BotoCoreError as error:
            raise explain(error, f"deleting from s3://{self.name}") from error
        for problem in answer.get("Errors", []):
            code, message = str(problem.get("Code", "error")), str(problem.get("Message", ""))
            told = ClientError({"Error": {"Code": code, "Message": message}}, "DeleteObjects")
            raise explain(told, f"deleting {printable(str(problem.get('Key')))}", "s3:DeleteObject")

    def _delete_each(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self.client.delete_object(Bucket=self.name, Key=key)
            except (BotoCoreError, ClientError) as error:
                raise explain(error, f"deleting {printable(key)}", "s3:DeleteObject") from error

    def presign(self, dump: Dump, seconds: int) -> str:
        """Return a URL that gives the dump to whoever has it."""
        try:
            parameters = {"Bucket": self.name, "Key": dump.key}
            url = self.client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds)
        except (BotoCoreError, ClientError) as error:
            raise explain(error, "signing a URL") from error
        return str(url)

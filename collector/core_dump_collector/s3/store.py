"""Owns the requests to S3: one method for each, its parameters, and what its response says.

Retries of botocore are off: a retry inside it would meet the object that the first try stored and call it a
collision. Every checksum goes in a header and is known before the body is sent, so no store needs trailers.
"""

from __future__ import annotations

import contextlib
import re
import urllib.parse
import zlib
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3 import classify, tries
from core_dump_collector.s3.client import sends_checksums, signs_bodies
from core_dump_collector.s3.condition import PROBE_NAME, Condition
from core_dump_collector.s3.errors import (
    ConditionRefusedError,
    ConflictError,
    GoneError,
    HeadRefusedError,
    RetryableError,
    StoreError,
    TakenError,
)
from core_dump_collector.s3.flow import FirstAlone
from core_dump_collector.s3.record import Place
from core_dump_collector.s3.smallbody import SmallPut
from core_dump_collector.s3.verdict import Content, Found
from core_dump_format.crc32 import encode_crc32
from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mypy_boto3_s3 import S3Client

    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.flow import Flow
    from core_dump_collector.s3.parts import Part

_UPLOAD_ID = re.compile(r"[\x21-\x7e]{1,512}")
_MOST_LIST_PAGES = 20
_PART_FIELDS = {"PartNumber", "ETag", "Size"}


class Store:
    """The bucket, as the settings describe it."""

    def __init__(self, client: S3Client, options: UploadOptions, flow: Flow) -> None:
        """Remember what goes with every request."""
        self._client = client
        self.flow = flow
        self._first = FirstAlone(flow)
        self._put_small = SmallPut(client)
        self._bucket = options.bucket
        endpoint = urllib.parse.urlsplit(client.meta.endpoint_url)
        self.place = Place(options.bucket, endpoint.netloc)
        self.sends_checksums = sends_checksums(client)
        self.signs_bodies = signs_bodies(client)
        self.condition = Condition(options.conditional, endpoint.hostname or "")
        self.condition_key = options.node_folder + PROBE_NAME
        self.may_list = True
        """Whether ListMultipartUploads is allowed, as far as this client has seen."""
        owner = options.expected_bucket_owner
        self._owner: dict[str, Any] = {"ExpectedBucketOwner": owner} if owner else {}
        self._object = _object_parameters(options)
        self._dump = {"StorageClass": options.storage_class} if options.storage_class else {}

    def put(
        self, key: str, part: Part, crc32: int, headers: Mapping[str, Any], *, conditional: bool
    ) -> Found:
        """Store a whole object with one request; return what the response says of it.

        Raises:
            TakenError, ConditionRefusedError, RetryableError, PermanentError
        """
        body = part.body()
        return _found(
            self._call(
                self._put_small if isinstance(body, bytes) else self._client.put_object,
                part,
                Key=key,
                Body=body,
                **self._checksum(crc32),
                **_condition(conditional),
                **self._object,
                **(self._dump | dict(headers)),
            )
        )

    def create_multipart(self, key: str, headers: Mapping[str, Any]) -> str:
        """Begin a multipart upload and return its id."""
        checksum = (
            {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if self.sends_checksums else {}
        )
        call, same = self._client.create_multipart_upload, {**self._object, **self._dump}
        answer = self._call(call, None, Key=key, **checksum, **same, **headers)
        upload_id = str(answer.get("UploadId", ""))
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise RetryableError(RetryReason.SERVER, "the store gave a multipart upload an unusable id")
        return upload_id

    def put_part(self, key: str, upload_id: str, part: Part, crc32: int) -> Found:
        """Send a part; return what the response says of it.

        Raises:
            GoneError, RetryableError, PermanentError
        """
        return _found(
            self._call(
                self._client.upload_part,
                part,
                Key=key,
                UploadId=upload_id,
                PartNumber=part.number,
                Body=part.body(),
                **self._checksum(crc32),
            )
        )

    def list_parts(self, key: str, upload_id: str) -> dict[int, Found]:
        """Return the parts that the store has, by number.

        Raises:
            GoneError, RetryableError, PermanentError
        """
        parts: dict[int, Found] = {}
        marker = 0
        for _ in range(_MOST_LIST_PAGES):
            call = self._client.list_parts
            page = self._call(call, None, Key=key, UploadId=upload_id, PartNumberMarker=marker)
            for part in page.get("Parts", []):
                if not part.keys() >= _PART_FIELDS:
                    continue  # it is sent again
                found = Found(part["Size"], part.get("ChecksumCRC32"), str(part["ETag"]))
                parts[part["PartNumber"]] = found
            following = page.get("NextPartNumberMarker", 0)
            if not page.get("IsTruncated") or following <= marker:
                break
            marker = following
        return parts

    def find_uploads(self, key: str) -> list[str] | None:
        """Return the ids of the unfinished multipart uploads of a key, newest first; None if that is not allowed.

        Raises:
            RetryableError: no response to rely on.
        """
        if not self.may_list:
            return None
        try:
            page = self._call(self._client.list_multipart_uploads, None, Prefix=key, MaxUploads=1000)
        except RetryableError as error:
            if error.reason != RetryReason.FORBIDDEN:
                raise
            self.may_list = False
            return None
        uploads = [item for item in page.get("Uploads", []) if item.get("Key") == key]
        uploads.sort(key=lambda item: str(item.get("Initiated", "")), reverse=True)
        return [item["UploadId"] for item in uploads if _UPLOAD_ID.fullmatch(str(item.get("UploadId", "")))]

    def complete(
        self, key: str, upload_id: str, parts: list[dict[str, Any]], content: Content, *, conditional: bool
    ) -> Found:
        """Make the object of the parts; return what the response says of it.

        Raises:
            TakenError, ConditionRefusedError, GoneError, RetryableError, PermanentError
        """
        checksum: dict[str, Any] = {}
        if self.sends_checksums:
            checksum = {"ChecksumType": "FULL_OBJECT", "MpuObjectSize": content.size_bytes}
            checksum |= self._checksum(content.crc32)
        return _found(
            self._call(
                self._client.complete_multipart_upload,
                None,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **checksum,
                **_condition(conditional),
            )
        )

    def abort(self, key: str, upload_id: str) -> None:
        """Abort a multipart upload, if the store allows it; a lifecycle rule does it otherwise."""
        ask = {"Bucket": self._bucket, "Key": key, "UploadId": upload_id, **self._owner}
        with contextlib.suppress(ClientError, BotoCoreError):
            self._client.abort_multipart_upload(**ask)

    def look(self, key: str) -> Found | None:
        """Return what HEAD says of the object under a key, None if there is none. What can pass is tried again.

        Raises:
            HeadRefusedError: normal for an identity that may only write.
            RetryableError: no response to rely on.
        """
        for number in range(tries.TRIES - 1):
            try:
                return self._look_once(key)
            except RetryableError as error:
                if error.reason not in tries.TRANSIENT:
                    raise
            tries.pause(number)
        return self._look_once(key)

    def _look_once(self, key: str) -> Found | None:
        ask = {"Bucket": self._bucket, "Key": key, **self._owner}
        try:
            with self._first.request():
                answer = self._client.head_object(ChecksumMode="ENABLED", **ask)
        except ClientError as error:
            status = classify.status_of(error)
            if status == 404:  # noqa: PLR2004
                return None
            if 400 <= status < 500 and status not in {408, 429}:  # noqa: PLR2004  a HEAD has no body to say more
                raise HeadRefusedError(status) from error
            raise classify.translate(error) from error
        except BotoCoreError as error:
            raise classify.translate(error) from error
        except ValueError as error:
            raise _unreadable(error) from error
        if "ContentLength" not in answer:
            raise _unreadable("it has no Content-Length")
        return Found(answer["ContentLength"], answer.get("ChecksumCRC32"), str(answer.get("ETag", "")))

    def put_document(self, key: str, document: bytes, *, conditional: bool) -> Found:
        """Store a small JSON document; return what the response says of it.

        Raises:
            TakenError, ConditionRefusedError, RetryableError, PermanentError
        """
        headers = {"ContentType": "application/json", **_condition(conditional), **self._object}
        checksum = self._checksum(zlib.crc32(document))
        return _found(self._call(self._put_small, None, Key=key, Body=document, **checksum, **headers))

    def probe(self, key: str) -> None:
        """Ask for an object that does not exist: any response but an error of bucket or credentials is good.

        An identity that may only write gets AccessDenied, like one that may do nothing: that is not told apart.

        Raises:
            RetryableError: the store cannot be reached, or knows the bucket or the credentials not.
        """
        try:
            with self._first.request():
                ask = {"Bucket": self._bucket, "Key": key, **self._owner}
                self._client.get_object(Range="bytes=0-0", **ask)["Body"].close()
        except ClientError as error:
            if classify.code_of(error) not in {"NoSuchKey", "AccessDenied", "InvalidRange"}:
                raise classify.translate(error) from error
        except BotoCoreError as error:
            raise classify.translate(error) from error

    def delete(self, key: str) -> bool:
        """Delete an object; False when that is not allowed."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key, **self._owner)
        except (ClientError, BotoCoreError):
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _checksum(self, crc32: int) -> dict[str, str]:
        return {"ChecksumCRC32": encode_crc32(crc32)} if self.sends_checksums else {}

    def _call(self, call: Callable[..., Any], part: Part | None, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
        try:
            with self._first.request():
                answer: dict[str, Any] = call(Bucket=self._bucket, **self._owner, **parameters)
        except ClientError as error:
            raise self._explain(error, parameters) from error
        except BotoCoreError as error:
            if part is not None and part.error is not None:
                raise part.error from error
            raise classify.translate(error) from error
        except ValueError as error:
            raise _unreadable(error) from error
        return answer

    def _explain(self, error: ClientError, parameters: Mapping[str, Any]) -> Exception:
        if "IfNoneMatch" in parameters:
            explained = self._explain_condition(error, parts="UploadId" in parameters)
            if explained is not None:
                return explained
        gone = "UploadId" in parameters and classify.code_of(error) == "NoSuchUpload"
        return GoneError() if gone else classify.translate(error)

    def _explain_condition(self, error: ClientError, *, parts: bool) -> StoreError | None:
        """Return what an error means for a conditional request; None if it has nothing to do with the condition."""
        status, code = classify.status_of(error), classify.code_of(error)
        if status == 412 and code in {"PreconditionFailed", "412"}:  # noqa: PLR2004  the code if there is no body
            self.condition.trust(parts=parts)
            return TakenError()
        if status == 409:  # noqa: PLR2004  never a reason to write without the condition: another writer is there
            return ConflictError(_shown(error))
        unknown_400 = status == 400 and not classify.is_known(code)  # noqa: PLR2004
        if status in {412, 501} or unknown_400:
            if self.condition.mode == "true":
                detail = f"{_shown(error)}; if the store refuses If-None-Match, set CONDITIONAL=auto"
                return RetryableError(RetryReason.FORBIDDEN, detail)
            return ConditionRefusedError(_shown(error))
        return None


def _object_parameters(options: UploadOptions) -> dict[str, Any]:
    """Return what dumps and documents have in common."""
    parameters: dict[str, Any] = {}
    if options.sse or options.kms_key_id:
        parameters["ServerSideEncryption"] = options.sse or "aws:kms"
    if options.kms_key_id:
        parameters["SSEKMSKeyId"] = options.kms_key_id
    if options.object_tags:
        parameters["Tagging"] = urllib.parse.urlencode(options.object_tags)
    return parameters


def _found(answer: Mapping[str, Any]) -> Found:
    """Return what a response says of the object.

    Raises:
        RetryableError: it has no ETag, so it is not a store's; a proxy's log-in page, perhaps.
    """
    etag = str(answer.get("ETag", ""))
    if not etag.strip('"'):
        raise RetryableError(RetryReason.SERVER, "the response has no ETag", outcome_unknown=True)
    return Found(None, answer.get("ChecksumCRC32"), etag)


def _unreadable(why: ValueError | str) -> RetryableError:
    """Return the error for an answer that lacks a field, or has a number or a date that is none (botocore's parser)."""
    detail = printable(f"the store's answer cannot be read: {why}")[:200]
    return RetryableError(RetryReason.SERVER, detail, outcome_unknown=True)


def _condition(conditional: bool) -> dict[str, str]:  # noqa: FBT001  one parameter
    return {"IfNoneMatch": "*"} if conditional else {}


def _shown(error: ClientError) -> str:
    return str(classify.translate(error))

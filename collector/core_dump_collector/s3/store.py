"""Owns the requests to S3: one method for each, its parameters, and what its answer proves.

Retries of botocore are off: a retry inside it would meet the object that the first try stored and call it a
collision. Every checksum goes in a header and is known before the body is sent, so no store needs trailers.
"""

from __future__ import annotations

import re
import urllib.parse
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from core_dump_collector.errors import RetryableError
from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3 import classify
from core_dump_collector.s3.smallbody import SmallPut
from core_dump_format.crc32 import encode_crc32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mypy_boto3_s3 import S3Client

    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.parts import Part

_MD5 = re.compile(r"[0-9a-f]{32}")
_UPLOAD_ID = re.compile(r"[\x21-\x7e]{1,512}")
_MOST_LIST_PAGES = 20


class TakenError(Exception):
    """The key is taken: If-None-Match was not fulfilled (412)."""

    def __init__(self, *, by_us: bool = False) -> None:
        """Say whether a request of ours just before, its outcome unknown, may have taken it."""
        super().__init__("the key is taken")
        self.by_us = by_us


class ConflictError(RetryableError):
    """Another conditional request for the key was under way (409): a multipart upload has to begin anew."""

    def __init__(self) -> None:
        """Call it the store's."""
        super().__init__(RetryReason.SERVER, "409 ConditionalRequestConflict: the key is being written to")


class UnconditionalStoreError(Exception):
    """The store does not know If-None-Match (501, or 412 for the header itself)."""


class GoneError(Exception):
    """The multipart upload does not exist any more: completed, aborted or expired."""


@dataclass(frozen=True, slots=True)
class Found:
    """What lies under a key."""

    size_bytes: int
    crc32: str | None
    """As S3 writes it; with `-N` for a checksum of the checksums of N parts."""
    etag: str


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part that the store has."""

    etag: str
    crc32: str | None
    size_bytes: int


class Store:
    """The bucket, as the settings describe it."""

    def __init__(self, client: S3Client, options: UploadOptions) -> None:
        """Remember what goes with every request."""
        self._client = client
        self._put_small = SmallPut(client)
        self._bucket = options.bucket
        self.sends_checksums = options.checksum == "when_supported"
        self.conditional = True
        """Whether the store knows If-None-Match, as far as we have seen."""
        owner = options.expected_bucket_owner
        self._owner: dict[str, Any] = {"ExpectedBucketOwner": owner} if owner else {}
        self._object = self._object_parameters(options)

    @staticmethod
    def _object_parameters(options: UploadOptions) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        if options.storage_class:
            parameters["StorageClass"] = options.storage_class
        if options.kms_key_id:
            parameters |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": options.kms_key_id}
        if options.object_tags:
            parameters["Tagging"] = urllib.parse.urlencode(options.object_tags)
        return parameters

    def put(self, key: str, part: Part, crc32: int, headers: Mapping[str, Any]) -> bool:
        """Store a whole object with one request; tell whether the answer proves that it arrived whole.

        Raises:
            TakenError, UnconditionalStoreError, RetryableError, PermanentError
        """
        body = part.body()
        answer = self._call(
            self._put_small if isinstance(body, bytes) else self._client.put_object,
            part,
            Key=key,
            Body=body,
            **self._checksum(crc32),
            **self._condition(),
            **self._object,
            **headers,
        )
        return self._is_proven(answer, part, crc32)

    def create_multipart(self, key: str, headers: Mapping[str, Any]) -> str:
        """Begin a multipart upload and return its id."""
        checksum = (
            {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if self.sends_checksums else {}
        )
        call = self._client.create_multipart_upload
        answer = self._call(call, None, Key=key, **checksum, **self._object, **headers)
        upload_id = str(answer.get("UploadId", ""))
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise RetryableError(RetryReason.SERVER, "the store gave a multipart upload an unusable id")
        return upload_id

    def put_part(self, key: str, upload_id: str, part: Part, crc32: int) -> str:
        """Send a part and return its ETag.

        Raises:
            GoneError, RetryableError, PermanentError
        """
        answer = self._call(
            self._client.upload_part,
            part,
            Key=key,
            UploadId=upload_id,
            PartNumber=part.number,
            Body=part.body(),
            **self._checksum(crc32),
        )
        self._is_proven(answer, part, crc32)
        return str(answer["ETag"])

    def list_parts(self, key: str, upload_id: str) -> dict[int, StoredPart]:
        """Return the parts that the store has, by number.

        Raises:
            GoneError, RetryableError, PermanentError
        """
        parts: dict[int, StoredPart] = {}
        marker = 0
        for _ in range(_MOST_LIST_PAGES):
            call = self._client.list_parts
            page = self._call(call, None, Key=key, UploadId=upload_id, PartNumberMarker=marker)
            for part in page.get("Parts", []):
                etag = str(part["ETag"])
                parts[part["PartNumber"]] = StoredPart(etag, part.get("ChecksumCRC32"), part["Size"])
            following = page.get("NextPartNumberMarker", 0)
            if not page.get("IsTruncated") or following <= marker:
                break
            marker = following
        return parts

    def complete(
        self, key: str, upload_id: str, parts: list[dict[str, Any]], *, crc32: int, size_bytes: int
    ) -> dict[str, Any]:
        """Make the object of the parts; the answer is for the caller to check.

        Raises:
            TakenError, UnconditionalStoreError, GoneError, RetryableError, PermanentError
        """
        checksum: dict[str, Any] = {}
        if self.sends_checksums:
            checksum = {"ChecksumType": "FULL_OBJECT", "MpuObjectSize": size_bytes, **self._checksum(crc32)}
        call = self._client.complete_multipart_upload
        listed = {"Parts": parts}
        return self._call(
            call, None, Key=key, UploadId=upload_id, MultipartUpload=listed, **checksum, **self._condition()
        )

    def abort(self, key: str, upload_id: str) -> None:
        """Give a multipart upload up, if the store lets us; a lifecycle rule does it otherwise."""
        try:
            self._client.abort_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload_id, **self._owner
            )
        except (ClientError, BotoCoreError):
            return

    def look(self, key: str) -> Found | None:
        """Return what lies under a key, None when nothing does.

        Raises:
            PermissionError: we may not look, which is normal for an identity that may only write.
            RetryableError: no answer to rely on.
        """
        try:
            answer = self._client.head_object(
                Bucket=self._bucket, Key=key, ChecksumMode="ENABLED", **self._owner
            )
        except ClientError as error:
            status = classify.status_of(error)
            if status == 404:  # noqa: PLR2004
                return None
            if 400 <= status < 500:  # noqa: PLR2004  a HEAD has no body: 403 is all that it says
                raise PermissionError(status) from error
            raise classify.translate(error) from error
        except BotoCoreError as error:
            raise classify.translate(error) from error
        return Found(answer["ContentLength"], answer.get("ChecksumCRC32"), str(answer.get("ETag", "")))

    def put_document(self, key: str, document: bytes) -> None:
        """Store a small JSON document; one that is there already is ours and stays.

        Raises:
            RetryableError, PermanentError
        """
        try:
            self._put_document(key, document)
        except UnconditionalStoreError:
            self._put_document(key, document)
        except TakenError:
            return

    def put_probe(self, key: str, document: bytes) -> None:
        """Store a document on the condition that the key is free.

        Raises:
            TakenError, UnconditionalStoreError, RetryableError, PermanentError
        """
        self._put_document(key, document)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _put_document(self, key: str, document: bytes) -> None:
        headers = {"ContentType": "application/json", **self._condition(), **self._object}
        checksum = self._checksum(zlib.crc32(document))
        etag_of(self._call(self._put_small, None, Key=key, Body=document, **checksum, **headers))

    def delete(self, key: str) -> bool:
        """Delete an object; False when that is not allowed."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key, **self._owner)
        except (ClientError, BotoCoreError):
            return False
        return True

    def _checksum(self, crc32: int) -> dict[str, str]:
        return {"ChecksumCRC32": encode_crc32(crc32)} if self.sends_checksums else {}

    def _condition(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self.conditional else {}

    def _call(self, call: Callable[..., Any], part: Part | None, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
        try:
            answer: dict[str, Any] = call(Bucket=self._bucket, **self._owner, **parameters)
        except ClientError as error:
            raise self._explain(error, parameters) from error
        except BotoCoreError as error:
            if part is not None and part.error is not None:
                raise part.error from error
            raise classify.translate(error) from error
        return answer

    def _explain(self, error: ClientError, parameters: Mapping[str, Any]) -> Exception:
        status, code = classify.status_of(error), classify.code_of(error)
        if "IfNoneMatch" in parameters:
            if status == 412 and code == "PreconditionFailed":  # noqa: PLR2004
                return TakenError()
            if status == 501 or (status == 412 and code == "InvalidRequest"):  # noqa: PLR2004  Swift says both
                self.conditional = False
                return UnconditionalStoreError()
            if code == "ConditionalRequestConflict":
                return ConflictError()
        if code == "NoSuchUpload":
            return GoneError()
        return classify.translate(error)

    def _is_proven(self, answer: Mapping[str, Any], part: Part, crc32: int) -> bool:
        """Compare what the store says it got with what was sent; False when its answer says neither.

        Raises:
            RetryableError: it got something else, or this is not the answer of a store.
        """
        etag = etag_of(answer)
        told = answer.get("ChecksumCRC32")
        if told is not None:
            if told != encode_crc32(crc32):
                raise RetryableError(RetryReason.CHECKSUM, "the store reports another CRC32 than was sent")
            return True
        encrypted = str(answer.get("ServerSideEncryption", "AES256")) != "AES256"  # then an ETag is no MD5
        if encrypted or not _MD5.fullmatch(etag):
            return False
        if etag != part.md5():
            raise RetryableError(RetryReason.CHECKSUM, "the store reports another MD5 than was sent")
        return True


def etag_of(answer: Mapping[str, Any]) -> str:
    """Return the bare ETag of an answer, lower-case.

    Raises:
        RetryableError: there is none, so it is not a store that has answered; a proxy's log-in page, say.
    """
    etag = str(answer.get("ETag", "")).strip('"').lower()
    if not etag:
        raise RetryableError(RetryReason.SERVER, "the answer has no ETag", outcome_unknown=True)
    return etag

"""Owns PutObject for small bodies: botocore's credentials and connections without the rest of botocore.

`client.put_object` takes 3.3 ms of CPU for 64 KiB. Validation, endpoint rules, serialising, signing and parsing are
most of it, with the same result each time; two such requests are most of the work on a small dump (docs/benchmarks.md).
The client sends the first request, which becomes the pattern of the next ones, of all threads. Any answer but success
discards the pattern, so that the client handles redirects, changed credentials and errors. An answer that redirects,
or names the bucket's region, has stored nothing: the client repeats that request at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import ClientError
from botocore.parsers import create_parser
from botocore.utils import percent_encode

from core_dump_collector.s3 import signature

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest, AWSResponse
    from botocore.signers import RequestSigner
    from mypy_boto3_s3 import S3Client

_HEADERS = {
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ContentEncoding": "Content-Encoding",
    "ContentType": "Content-Type",
    "ExpectedBucketOwner": "x-amz-expected-bucket-owner",
    "IfNoneMatch": "If-None-Match",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
}
"""Parameters of PutObject and their headers (Amazon S3 API Reference, "PutObject")."""
_ANSWER = {
    "ETag": "ETag",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ServerSideEncryption": "x-amz-server-side-encryption",
}
_OK = 200
_SERVER_ERROR = 500
_OPERATION = "PutObject"


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What stays the same from one request to the next."""

    bucket: str
    url: str
    """Without the key."""
    user_agent: str
    context: dict[str, Any]
    signer: RequestSigner
    signing_name: str
    region: str
    signature: str


class SmallPut:
    """PutObject with the client's parameters, answers and errors, for bodies that are `bytes`."""

    def __init__(self, client: S3Client) -> None:
        """Learn from the client's requests."""
        self._client = client
        self._session = client._endpoint.http_session  # type: ignore[attr-defined]  # noqa: SLF001  proxies, CA bundle, pool
        self._parser = create_parser("rest-xml")
        self._asked = threading.local()
        """Bucket and key of the request that this thread has given to the client."""
        self._pattern: _Pattern | None = None
        client.meta.events.register(f"before-sign.s3.{_OPERATION}", self._learn)

    def __call__(self, *, Bucket: str, Key: str, Body: bytes, **parameters: Any) -> dict[str, Any]:  # noqa: N803, ANN401  as the client's
        """Store an object.

        Raises:
            ClientError, BotoCoreError: as from the client.
        """
        pattern = self._pattern
        if pattern is None or pattern.bucket != Bucket:
            return self._ask_client(Bucket, Key, Body, parameters)
        try:
            answer = self._send(pattern, Key, Body, parameters)
        except BaseException:
            self._forget(pattern)
            raise
        if answer.status_code == _OK:
            return {
                name: answer.headers[header] for name, header in _ANSWER.items() if header in answer.headers
            }
        if answer.status_code < _SERVER_ERROR:  # such an error teaches nothing about the request
            self._forget(pattern)
        response = self._parse(answer)
        if _is_redirect(answer, response):
            return self._ask_client(Bucket, Key, Body, parameters)
        raise ClientError(response, _OPERATION)  # type: ignore[arg-type]  # a typed dict

    def _forget(self, pattern: _Pattern) -> None:
        if self._pattern is pattern:  # or another thread has learnt a new one
            self._pattern = None

    def _ask_client(self, bucket: str, key: str, body: bytes, parameters: dict[str, Any]) -> dict[str, Any]:
        self._asked.names = (bucket, key)
        return dict(self._client.put_object(Bucket=bucket, Key=key, Body=body, **parameters))

    def _learn(
        self,
        request: AWSRequest,
        request_signer: RequestSigner,
        signing_name: str,
        region_name: str,
        signature_version: str,
        **_: object,
    ) -> None:
        """Remember a request of the client's that is about to be signed.

        After a redirect this is called again; the region is then in the request's context alone.
        """
        bucket, key = getattr(self._asked, "names", ("", ""))
        signing = request.context.get("signing", {})
        quoted, url = percent_encode(key, safe="/~"), str(request.url)
        signing_name = signing.get("signing_name") or signing_name
        region = signing.get("region") or region_name
        if not key or signature_version != signature.VERSION or not url.endswith("/" + quoted):
            return  # other kinds of signers cannot be made in this way
        if signature.can_sign(request_signer.get_auth_instance(signing_name, region, signature_version)):
            self._pattern = _Pattern(
                bucket,
                url.removesuffix(quoted),
                request.headers["User-Agent"],
                request.context,
                request_signer,
                signing_name,
                region,
                signature_version,
            )

    def _send(self, pattern: _Pattern, key: str, body: bytes, parameters: dict[str, Any]) -> AWSResponse:
        auth = pattern.signer.get_auth_instance(pattern.signing_name, pattern.region, pattern.signature)
        metadata = parameters.get("Metadata", {})
        headers = {_HEADERS[name]: value for name, value in parameters.items() if name != "Metadata"}
        headers |= {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        url = pattern.url + percent_encode(key, safe="/~")
        signature.sign(auth, signature.Request(url, headers, body, dict(pattern.context)))
        headers |= {"User-Agent": pattern.user_agent, "Content-Length": str(len(body))}
        request = AWSPreparedRequest("PUT", url, headers, body, stream_output=False)  # type: ignore[arg-type]  # a mapping
        answer: AWSResponse = self._session.send(request)
        return answer

    def _parse(self, answer: AWSResponse) -> dict[str, Any]:
        shape = self._client.meta.service_model.operation_model(_OPERATION).output_shape
        response = {"status_code": answer.status_code, "headers": answer.headers, "body": answer.content}
        parsed: dict[str, Any] = self._parser.parse(response, shape)  # type: ignore[arg-type]  # it has one
        return parsed


def _is_redirect(answer: AWSResponse, response: dict[str, Any]) -> bool:
    """Tell whether an answer sends the request elsewhere: by its status, or by naming the bucket's region."""
    if 300 <= answer.status_code < 400:  # noqa: PLR2004
        return True
    named = "x-amz-bucket-region" in answer.headers or "Region" in response.get("Error", {})
    return named and answer.status_code < 500  # noqa: PLR2004  after a server's error the outcome is unknown

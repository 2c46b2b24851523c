"""Owns the classification of boto3's errors: whether and why to retry, and the text for the log.

A store's answers are hostile: codes are matched against known ones, texts are bounded and made printable.
"""

from __future__ import annotations

import re

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004  botocore's, the base of what goes wrong on the wire
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    SSOError,
    TokenRetrievalError,
)

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3.errors import PermanentError, RetryableError
from core_dump_format.advice import advise
from core_dump_format.text import printable

_MOST_DETAIL = 200

_BY_CODE = {
    RetryReason.THROTTLED: "SlowDown Throttling ThrottlingException RequestLimitExceeded TooManyRequests "
    "RequestThrottled BandwidthLimitExceeded KMS.ThrottlingException",
    RetryReason.CREDENTIALS: "ExpiredToken ExpiredTokenException TokenRefreshRequired InvalidToken RequestExpired "
    "InvalidAccessKeyId SignatureDoesNotMatch InvalidClientTokenId IDPCommunicationError InvalidIdentityToken "
    # One of the clocks is wrong by more than 15 minutes. Like an expired credential, somebody corrects it.
    "RequestTimeTooSkewed",
    RetryReason.NO_SUCH_BUCKET: "NoSuchBucket PermanentRedirect AuthorizationHeaderMalformed InvalidBucketName",
    RetryReason.CHECKSUM: "BadDigest InvalidDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch",
    RetryReason.NETWORK: "RequestTimeout IncompleteBody",
    RetryReason.SERVER: "ConditionalRequestConflict OperationAborted NoSuchUpload InvalidPart InvalidPartOrder "
    "InternalError ServiceUnavailable",
}
REASON_OF_CODE = {code: reason for reason, codes in _BY_CODE.items() for code in codes.split()}
"""Amazon S3 API Reference, "Error responses"."""

REFUSED_FOR_GOOD = frozenset({"EntityTooLarge", "KeyTooLongError", "MetadataTooLarge"})
"""These errors are about the object and not about the configuration: neither a retry nor an operator can help."""

_NOTHING_STORED = frozenset({"SlowDown", "ServiceUnavailable"})
"""5xx codes of a store that did not begin to process the request."""

_SETTINGS = tuple(
    (re.compile(pattern, re.IGNORECASE), advice)
    for pattern, advice in (
        (
            r"x-amz-(sdk-)?checksum|x-amz-trailer|aws-chunked",
            "if the store knows no checksums, set CHECKSUM=when_required",
        ),
        (r"storage.?class", "correct STORAGE_CLASS"),
        (r"tagging|InvalidTag", "correct OBJECT_TAGS, or allow s3:PutObjectTagging (iam/tags.json)"),
        (r"server-side-encryption", "correct SSE and KMS_KEY_ID"),
        (
            r"explicit deny in a resource-based policy",
            "the bucket's policy denies it; if it requires encryption, set SSE",
        ),
    )
)
"""What helps if a store's words name a header or a rule that a setting decides about."""

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    CredentialRetrievalError,
    TokenRetrievalError,
    SSOError,
)


def status_of(error: ClientError) -> int:
    """Return the HTTP status; 0 if the error has none."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def code_of(error: ClientError) -> str:
    """Return the error code."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_known(code: str) -> bool:
    """Tell whether an error code has a meaning of its own."""
    return code in REASON_OF_CODE or code in REFUSED_FOR_GOOD


def translate(error: ClientError | BotoCoreError) -> RetryableError | PermanentError:
    """Return the exception by which the dump is retried, or given up."""
    if isinstance(error, ClientError):
        return _translate_answer(error)
    detail = _shorten(str(error))
    if isinstance(error, _NO_CREDENTIALS):
        return RetryableError(RetryReason.CREDENTIALS, f"{detail}; see docs/configuration.md, credentials")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError | ProxyConnectionError):
        return RetryableError(RetryReason.NETWORK, detail)
    if isinstance(error, HTTPClientError | ConnectionError):
        return RetryableError(RetryReason.NETWORK, detail, outcome_unknown=True)
    # For example an answer that cannot be parsed, or a parameter that boto3 refuses.
    return RetryableError(RetryReason.SERVER, detail, outcome_unknown=True)


def advice_for(error: ClientError) -> str | None:
    """Return the setting or the permission that helps against a refusal; None if nobody knows."""
    code = code_of(error)
    message = str(error.response.get("Error", {}).get("Message", ""))
    advice = advise(code, message)
    if advice is None:
        said = f"{code} {message}"
        advice = next((text for pattern, text in _SETTINGS if pattern.search(said)), None)
    return advice


def _translate_answer(error: ClientError) -> RetryableError | PermanentError:
    status, code = status_of(error), code_of(error)
    message = error.response.get("Error", {}).get("Message", "")
    detail = _shorten(f"{error.operation_name}: {status} {code}: {message}")
    advice = advice_for(error)
    if advice is not None:
        detail = f"{detail}; {advice}"
    if code in REFUSED_FOR_GOOD:
        return PermanentError(detail)
    reason = REASON_OF_CODE.get(code)
    if reason is None:
        reason = _reason_of_status(status)
    if error.operation_name.startswith("AssumeRole") or error.operation_name == "GetRoleCredentials":
        reason = RetryReason.CREDENTIALS
    unknown = status >= 500 and code not in _NOTHING_STORED  # noqa: PLR2004  HTTP's server errors
    return RetryableError(reason, detail, outcome_unknown=unknown)


def _reason_of_status(status: int) -> RetryReason:
    match status:
        case 401:
            return RetryReason.CREDENTIALS
        case 404:
            return RetryReason.NO_SUCH_BUCKET
        case 408:
            return RetryReason.NETWORK
        case 429:
            return RetryReason.THROTTLED
        case _ if 400 <= status < 500:  # noqa: PLR2004  what is left asks for another policy or setting
            return RetryReason.FORBIDDEN
        case _:
            return RetryReason.SERVER


def _shorten(text: str) -> str:
    return printable(" ".join(text.split()))[:_MOST_DETAIL]

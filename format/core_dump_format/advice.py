"""Owns what people should do about an error of the store; collector and `core-dumps` give the same advice."""

from __future__ import annotations

import re

_ENDPOINT = re.compile(r"https?://[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]*(/\S*)?", re.ASCII)
_UNREACHABLE = (
    "check the network, AWS_ENDPOINT_URL_S3, HTTPS_PROXY and, in a private subnet, the VPC endpoint"
)
_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
ADVICE = {
    "NoSuchBucket": "there is no such bucket: create it, or correct BUCKET_NAME",
    "PermanentRedirect": "the bucket is in another region: correct AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region: correct AWS_REGION",
    "InvalidAccessKeyId": "the store does not know these credentials: correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the store refuses these credentials: correct AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired: log in again, or renew them",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's by over 15 minutes: synchronise it "
    "(timedatectl, chronyc tracking)",
    "PreconditionFailed": "the object was replaced in the meantime: start again",
    "NoCredentialsError": "there are no credentials: " + _CREDENTIALS,
    "PartialCredentialsError": "the credentials are incomplete: " + _CREDENTIALS,
    "ProfileNotFound": "there is no such profile: correct AWS_PROFILE",
    "EndpointConnectionError": "nothing answers at the endpoint: " + _UNREACHABLE,
    "ConnectTimeoutError": "nothing answers at the endpoint: " + _UNREACHABLE,
    "ProxyConnectionError": "the proxy does not answer, or refuses (password?): correct HTTPS_PROXY and NO_PROXY",
    "SSLError": "the endpoint's certificate is not trusted: set AWS_CA_BUNDLE",
}
"""By error code of S3 (Amazon S3 API Reference, "Error responses"), else by name of botocore's exception."""

_KMS = re.compile(r"\bkms\b|key management service", re.IGNORECASE)
_KMS_ADVICE = (
    "the KMS key decides here: allow kms:GenerateDataKey to upload, kms:Decrypt to read, or take another key"
)


def advise(code: str, message: str) -> str | None:
    """Return what to do about an error of the store, by its own words and else by its code; None if nobody knows."""
    if _KMS.search(f"{code} {message}") and "Throttling" not in code:
        return _KMS_ADVICE
    return ADVICE.get(code)


def check_endpoint(url: str) -> None:
    """Check AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3.

    Raises:
        ValueError: one line that says what is accepted.
    """
    if not _ENDPOINT.fullmatch(url):
        raise ValueError("takes a URL with its scheme, e.g. https://s3.example.com")

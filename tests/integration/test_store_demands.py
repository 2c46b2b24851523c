"""Stores that demand or refuse a header: a setting meets them, and a refusal names it."""

from __future__ import annotations

import os

import pytest
from tests.support import s3
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, options, send

from core_dump_collector import storecheck
from core_dump_collector.errors import ConfigError
from core_dump_collector.jobs import Outcome, RetryReason

SMALL, LARGE = 1000, 11 * MEBIBYTE
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["one request", "multipart"])
STARTS_AN_OBJECT = ["{ method PUT } !{ url_sub uploadId= }", "{ method POST } { url_sub uploads }"]


@pytest.fixture
def dump(watch_dir):
    """Write a dump of a size; return its path."""

    def write(size):
        (watch_dir / NAME).write_bytes(b"\x1f\x8b" + os.urandom(size))
        return watch_dir / NAME

    return write


@pytest.fixture
def refusing(seaweed, tmp_path):
    """Put a proxy that refuses requests before the store; yield a function that takes an error and conditions."""
    with s3.haproxy(tmp_path, seaweed) as proxy:

        def refuse(status, code, message, conditions):
            body = proxy.body(
                "refused.xml", f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            )
            answer = f"http-request return status {status} content-type application/xml file {body}"
            proxy.start(*(f"{answer} if {condition}" for condition in conditions))

        with connected(seaweed.environ(), AWS_ENDPOINT_URL_S3=proxy.endpoint):
            yield refuse


CHECKSUM_REFUSED = (
    400,
    "InvalidArgument",
    "Unsupported header 'x-amz-checksum-crc32' received for this API call.",
    [f"{{ req.hdr({name}) -m found }}" for name in ("x-amz-checksum-crc32", "x-amz-checksum-algorithm")],
)


@SIZES
@pytest.mark.parametrize("through", ["setting", "variable", "profile"])
def test_checksums_can_be_switched_off_as_boto3_documents_it(
    refusing, bucket, dump, tmp_path, monkeypatch, size, through
):
    refusing(*CHECKSUM_REFUSED)
    changes = {}
    if through == "setting":
        changes["checksum"] = "when_required"
    elif through == "variable":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_REQUIRED")
    else:
        (tmp_path / "profile").write_text("[default]\nrequest_checksum_calculation = when_required\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "profile"))
    assert send(dump(size), **changes).outcome is Outcome.UPLOADED
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}


@SIZES
def test_setting_goes_before_the_variable_and_a_refused_checksum_names_it(
    refusing, bucket, dump, monkeypatch, size
):
    refusing(*CHECKSUM_REFUSED)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    result = send(dump(size), checksum="when_supported")
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.FORBIDDEN)
    assert "Unsupported header 'x-amz-checksum-crc32'" in result.detail
    assert "CHECKSUM=when_required" in result.detail
    assert s3.keys_in(bucket) == {}


def test_check_names_the_setting_for_a_refused_checksum_and_not_a_permission(refusing):
    refusing(*CHECKSUM_REFUSED)
    with pytest.raises(ConfigError, match="CHECKSUM=when_required") as caught:
        storecheck.verify_store(options())
    assert "s3:PutObject" not in str(caught.value)


@SIZES
@pytest.mark.parametrize("sse", ["AES256", "aws:kms", "aws:kms:dsse"])
def test_policy_that_demands_encryption_is_met_by_a_setting(refusing, bucket, dump, size, sse):
    lacks = f"!{{ req.hdr(x-amz-server-side-encryption) -m str {sse} }}"
    key = "{ req.hdr(x-amz-server-side-encryption-aws-kms-key-id) -m found }"
    demanded = [f"{starts} {lacks}" for starts in STARTS_AN_OBJECT]
    if sse != "AES256":
        demanded += [f"{starts} !{key}" for starts in STARTS_AN_OBJECT]
    words = "not authorized to perform: s3:PutObject with an explicit deny in a resource-based policy"
    refusing(403, "AccessDenied", words, demanded)
    result = send(dump(size))
    assert result.retry_reason is RetryReason.FORBIDDEN
    assert "explicit deny" in result.detail
    assert "set SSE" in result.detail
    changes = {} if sse == "AES256" else {"kms_key_id": "alias/dumps"}
    result = send(dump(size), sse=sse, **changes)
    assert "explicit deny" not in result.detail
    if sse != "aws:kms":  # this store would ask a real KMS
        assert result.outcome is Outcome.UPLOADED
        assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}


def test_kms_key_alone_asks_for_kms(refusing, dump):
    condition = "!{ req.hdr(x-amz-server-side-encryption) -m str aws:kms }"
    refusing(403, "AccessDenied", "explicit deny in a resource-based policy", [condition])
    assert "explicit deny" in send(dump(SMALL)).detail
    assert "explicit deny" not in send(dump(SMALL), kms_key_id="alias/dumps").detail


@SIZES
def test_storage_class_is_that_of_dumps_and_not_of_their_metadata(refusing, bucket, dump, size):
    found = "{ req.hdr(x-amz-storage-class) -m str GLACIER }"
    starts = [f"{condition} !{{ path_end .json }} !{found}" for condition in STARTS_AN_OBJECT]
    conditions = [*starts, "{ path_end .json } { req.hdr(x-amz-storage-class) -m found }"]
    refusing(400, "InvalidStorageClass", "no", conditions)
    assert "correct STORAGE_CLASS" in send(dump(size)).detail
    assert send(dump(size), storage_class="GLACIER").outcome is Outcome.UPLOADED
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "AccessDenied",
            "User is not authorized to perform: kms:GenerateDataKey on resource: arn:aws:kms:x",
        ),
        (400, "KMS.DisabledException", "arn:aws:kms:x is disabled."),
    ],
)
def test_refusal_of_the_kms_key_is_told_in_its_words_and_not_as_a_permission_of_the_bucket(
    refusing, dump, status, code, message
):
    refusing(status, code, message, STARTS_AN_OBJECT)
    detail = send(dump(SMALL)).detail
    with pytest.raises(ConfigError) as caught:
        storecheck.verify_store(options())
    for text in (detail, str(caught.value)):
        assert f"{code}: {message}" in text
        assert "kms:GenerateDataKey to upload" in text
        assert "s3:PutObject" not in text

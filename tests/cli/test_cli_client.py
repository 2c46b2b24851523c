"""The S3 client of `core-dumps`: trust, and what its errors say."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError
from tests.support import s3

from core_dumps.client import S3, explain


@pytest.fixture
def _by_requests_ca_bundle(seaweed, bucket, monkeypatch):
    bucket.put_object(Bucket=s3.BUCKET, Key="node/a.json", Body=b"{}")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    for name, value in seaweed.environ(tls=True).items():
        if name != "AWS_CA_BUNDLE":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(seaweed.ca_file))


@pytest.mark.usefixtures("_by_requests_ca_bundle")
def test_small_objects_are_read_with_the_certificates_that_the_client_trusts():
    connected = S3()
    try:
        assert connected.quick_reader(s3.BUCKET).object("node/a.json", 100) == b"{}"
    finally:
        connected.client.close()


def test_refusal_of_a_kms_key_is_told_in_the_stores_words_and_not_as_a_permission_of_the_bucket():
    message = "User is not authorized to perform: kms:Decrypt on resource: arn:aws:kms:x"
    error = ClientError({"Error": {"Code": "AccessDenied", "Message": message}}, "GetObject")
    text = str(explain(error, "reading a"))
    assert message in text
    assert "kms:Decrypt to read" in text
    assert "s3:" not in text


def test_refusal_without_words_names_the_permissions_that_are_needed():
    error = ClientError({"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}, "GetObject")
    assert "these credentials need s3:ListBucket and s3:GetObject" in str(explain(error, "reading a"))

"""The endpoint that the collector asks: partitions, FIPS, IPv6, VPC endpoints (docs/operations.md)."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pytest
from tests.support.uploads import options

from core_dump_collector.s3 import client


class SentError(Exception):
    """The address of a request that would be sent."""


def stop(request, **_):
    raise SentError(request.url)


VPC = "https://bucket.vpce-0a1b.s3.eu-central-1.vpce.amazonaws.com"


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({"AWS_REGION": "eu-central-1"}, "s3.eu-central-1.amazonaws.com"),
        ({"AWS_REGION": "us-gov-west-1"}, "s3.us-gov-west-1.amazonaws.com"),
        ({"AWS_REGION": "cn-north-1"}, "s3.cn-north-1.amazonaws.com.cn"),
        ({"AWS_REGION": "eusc-de-east-1"}, "s3.eusc-de-east-1.amazonaws.eu"),
        ({"AWS_REGION": "us-iso-east-1"}, "s3.us-iso-east-1.c2s.ic.gov"),
        ({"AWS_REGION": "us-east-1", "AWS_USE_FIPS_ENDPOINT": "true"}, "s3-fips.us-east-1.amazonaws.com"),
        (
            {"AWS_REGION": "us-gov-west-1", "AWS_USE_FIPS_ENDPOINT": "true"},
            "s3-fips.us-gov-west-1.amazonaws.com",
        ),
        (
            {"AWS_REGION": "eu-central-1", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "s3.dualstack.eu-central-1.amazonaws.com",
        ),
        ({"AWS_REGION": "eu-central-1", "AWS_ENDPOINT_URL_S3": VPC}, urlsplit(VPC).hostname),
    ],
)
def test_endpoint_follows_the_variables(monkeypatch, variables, host):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_CONFIG_FILE": "/dev/null"}
    for name, value in (given | variables).items():
        monkeypatch.setenv(name, value)
    made = client._make_client(client._make_session(), options(), sign_payload=None)
    made.meta.events.register("before-send.s3", stop)
    try:
        with pytest.raises(SentError) as sent:
            made.put_object(Bucket="my-bucket", Key="k", Body=b"")
    finally:
        made.close()
    assert urlsplit(str(sent.value)).hostname in {host, f"my-bucket.{host}"}

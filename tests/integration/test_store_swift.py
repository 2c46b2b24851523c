"""SWIFT=1, `make test-swift`: a real store that knows neither checksums nor conditional writes."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from tests.support import s3, swift
from tests.support.collector import running, wait_until
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, send

from core_dump_collector.jobs import Outcome

pytestmark = pytest.mark.skipif(not os.environ.get("SWIFT"), reason="another store: make test-swift")
SIZES = pytest.mark.parametrize("size", [100_000, 12 * MEBIBYTE], ids=["small", "multipart"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with swift.swift(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def bucket(store):
    with store.client(swift.KEYS) as client:
        for key in s3.keys_in(client):
            client.delete_object(Bucket=s3.BUCKET, Key=key)
        yield client


@pytest.fixture(params=["http", "https"])
def environ(request, store):
    """The environment in which the collector finds the store; TLS is where boto3 would send trailers."""
    return store.environ(swift.KEYS, tls=request.param == "https")


@SIZES
def test_dump_arrives_whole_and_leaves_the_disk(environ, bucket, watch_dir, size):
    content = gzip.compress(os.urandom(size), 1)
    (watch_dir / NAME).write_bytes(content)
    with connected(environ):
        result = send(watch_dir / NAME, checksum="when_required")
        assert result.outcome == Outcome.UPLOADED, result.detail
    assert not (watch_dir / NAME).exists()
    assert s3.body_of(bucket, KEY) == content
    assert json.loads(s3.body_of(bucket, f"{KEY}.json"))["state"] == "complete"
    assert s3.unfinished_multiparts(bucket) == []


@SIZES
def test_key_that_is_taken_is_not_overwritten(environ, bucket, watch_dir, size):
    first, second = (gzip.compress(os.urandom(size), 1) for _ in range(2))
    with connected(environ):
        for content in (first, second):
            (watch_dir / NAME).write_bytes(content)
            result = send(watch_dir / NAME, checksum="when_required")
            assert result.outcome == Outcome.UPLOADED, result.detail
    assert {s3.body_of(bucket, key) for key in s3.keys_in(bucket) if key.endswith(".gz")} == {first, second}


@pytest.mark.parametrize("environ", ["https"], indirect=True)
def test_daemon_collects_everything(environ, bucket, watch_dir, tmp_path):
    with running(watch_dir, environ | {"CHECKSUM": "when_required"}, tmp_path) as collector:
        for number in range(20):
            partial = watch_dir / f"core-app-1700000000-{number}-11.gz.partial"
            partial.write_bytes(gzip.compress(os.urandom(1000 * (1 + number)), 1))
            partial.rename(partial.with_suffix(""))
        wait_until(lambda: not list(watch_dir.glob("core*")), 60)
        assert collector.stop() == 0
    assert len([key for key in s3.keys_in(bucket) if key.endswith(".gz")]) == 20

"""Connections and rate of all workers together."""

from __future__ import annotations

import os
import time

from tests.support import s3
from tests.support.collector import running, wait_until
from tests.support.slow import thin_link

SIZE = 100_000


def publish(directory, count, size=SIZE):
    for number in range(count):
        partial = directory / f"core-app-{1_700_000_000 + number}-{number}-11.gz.partial"
        partial.write_bytes(b"\x1f\x8b" + os.urandom(size - 2))
        partial.rename(partial.with_suffix(""))


def test_rate_is_shared_by_all_workers(seaweed, bucket, watch_dir, tmp_path):
    rate, count = 250_000, 6
    variables = {"MAX_UPLOAD_BYTES_PER_SECOND": str(rate), "METADATA": "false"}
    with running(watch_dir, seaweed.environ() | variables, tmp_path) as collector:
        began = time.monotonic()
        publish(watch_dir, count)
        wait_until(lambda: len(s3.keys_in(bucket)) == count and not list(watch_dir.iterdir()), 60, "uploads")
        assert time.monotonic() - began > 0.9 * count * SIZE / rate
        assert not [event for event in collector.log() if event["event"] == "will try again"]


def test_thin_link_is_used_by_one_request_at_a_time(seaweed, bucket, watch_dir, tmp_path):
    variables = {"METADATA": "false", "FINGERPRINT": "false"}
    with thin_link(seaweed.endpoint, 40_000) as (through, link):
        environ = seaweed.environ() | variables | {"AWS_ENDPOINT_URL_S3": through}
        with running(watch_dir, environ, tmp_path) as collector:
            publish(watch_dir, 4)
            wait_until(lambda: collector.metric("core_dump_upload_connections") == 1, 30, "one connection")
            wait_until(lambda: len(s3.keys_in(bucket)) == 4 and not list(watch_dir.iterdir()), 60, "uploads")
            assert not [event for event in collector.log() if event["event"] == "will try again"]
        assert link.moved_bytes < 4 * SIZE + 40_000

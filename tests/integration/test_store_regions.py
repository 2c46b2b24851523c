"""A bucket is found, and requests are signed, in its own region, whatever region is configured."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import subprocess
import sys

import pytest
from tests.support import regions, s3
from tests.support.collector import running, wait_until
from tests.support.servers import answering
from tests.support.uploads import MEBIBYTE, NAME, connected, send

from core_dump_collector.jobs import Outcome

HOME, OTHER = "eu-central-1", "us-west-2"
needs_names = pytest.mark.skipif(
    os.geteuid() != 0, reason="gives names to addresses, needs root: sudo make test"
)


@pytest.fixture
def drop(watch_dir):
    """Publish two small dumps and one of several parts; return their names."""

    def publish():
        names = []
        for number, size in enumerate((1000, 2000, 11 * MEBIBYTE), start=1):
            name = f"core-app-170000000{number}-{number}-11.gz"
            partial = watch_dir / f"{name}.partial"
            partial.write_bytes(gzip.compress(os.urandom(size), 0))
            partial.rename(watch_dir / name)
            names.append(name)
        return names

    return publish


@contextlib.contextmanager
def collecting(server, watch_dir, tmp_path, **variables):
    one_client = {"WORKERS": "1", "PART_BYTES": str(5 * MEBIBYTE), "CONNECT_TIMEOUT_SECONDS": "5"}
    with running(
        watch_dir, server.environ() | one_client | variables, tmp_path, prefix=server.prefix()
    ) as collector:
        yield collector


def everything_arrives(collector, bucket, names):
    done = 'core_dump_uploads_total{result="uploaded"}'
    wait_until(lambda: collector.metric(done) == len(names), 30, "three uploads")
    assert set(s3.keys_in(bucket)) == {f"node-1/{name}{suffix}" for name in names for suffix in ("", ".json")}
    assert s3.unfinished_multiparts(bucket) == []
    assert not [event for event in collector.log() if event["event"] == "will try again"]


@needs_names
@pytest.mark.parametrize(
    "variables",
    [
        {"AWS_REGION": HOME},
        {"AWS_REGION": HOME, "AWS_DEFAULT_REGION": OTHER},
        {"AWS_DEFAULT_REGION": HOME},
        {"AWS_REGION": "", "AWS_DEFAULT_REGION": HOME},
        {"AWS_CONFIG_FILE": "profile"},
    ],
    ids=["AWS_REGION", "AWS_REGION first", "AWS_DEFAULT_REGION", "AWS_REGION empty", "profile"],
)
def test_configured_region_is_the_only_one_that_is_asked(
    seaweed, bucket, watch_dir, tmp_path, drop, variables
):
    if "AWS_CONFIG_FILE" in variables:
        (tmp_path / "profile").write_text(f"[default]\nregion = {HOME}\n")
        variables = {"AWS_CONFIG_FILE": str(tmp_path / "profile")}
    with regions.serve(tmp_path, seaweed, HOME) as server:  # no other host name exists
        names = drop()
        with collecting(server, watch_dir, tmp_path, **variables) as collector:
            everything_arrives(collector, bucket, names)
        assert server.seen
        assert server.refused == []


@needs_names
@pytest.mark.parametrize("header", [True, False], ids=["region in a header", "region of the bucket's HEAD"])
@pytest.mark.parametrize(
    ("home", "configured"),
    [(HOME, OTHER), (HOME, None), ("us-gov-west-1", "us-gov-east-1"), ("cn-north-1", "cn-northwest-1")],
)
def test_region_of_the_bucket_is_learned_from_one_answer_and_used_for_all_that_follows(
    seaweed, bucket, watch_dir, tmp_path, drop, home, configured, header
):
    variables = {"AWS_REGION": configured} if configured else {}
    with regions.serve(tmp_path, seaweed, home, configured, "us-east-1", header=header) as server:
        names = drop()
        with collecting(server, watch_dir, tmp_path, **variables) as collector:
            everything_arrives(collector, bucket, names)
        assert [seen.status for seen in server.refused] == ([301] if header else [301, 301])
        assert max(seen.body_bytes for seen in server.refused) < 5 * MEBIBYTE


@needs_names
def test_signature_for_the_wrong_region_is_corrected_by_the_region_in_the_error(
    seaweed, bucket, watch_dir, tmp_path, drop
):
    with regions.serve(tmp_path, seaweed, HOME, header=False) as server:
        names = drop()
        endpoint = {"AWS_ENDPOINT_URL_S3": "https://" + regions.host(HOME).removeprefix(s3.BUCKET + ".")}
        variables = endpoint | {"AWS_REGION": OTHER, "ADDRESSING_STYLE": "virtual"}
        with collecting(server, watch_dir, tmp_path, **variables) as collector:
            everything_arrives(collector, bucket, names)
        assert [seen.status for seen in server.refused] == [400]


@needs_names
@pytest.mark.parametrize("configured", [HOME, OTHER])
def test_developers_program_asks_the_right_region_and_learns_it_once(seaweed, bucket, tmp_path, configured):
    for number in range(5):
        name = f"core-app-170000000{number}-1-11.gz"
        bucket.put_object(Bucket=s3.BUCKET, Key=f"node-1/{name}", Body=gzip.compress(b"core"))
        bucket.put_object(Bucket=s3.BUCKET, Key=f"node-1/{name}.json", Body=b"{}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with regions.serve(tmp_path, seaweed, HOME, OTHER) as server:
        command = [*server.prefix(), sys.executable, "-m", "core_dumps.cli", "list", "--json=short"]
        variables = {"BUCKET_NAME": s3.BUCKET, "AWS_REGION": configured, "AWS_EC2_METADATA_DISABLED": "true"}
        environ = clean | server.environ() | variables
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.count("core-app-") >= 5
        # Both layouts of keys are listed at once, each by the small reader, then by botocore. What follows knows.
        assert len(server.refused) in ({0} if configured == HOME else {2, 3, 4})
        assert all("list-type=2" in seen.path for seen in server.refused)


def test_redirect_to_nowhere_is_followed_once(watch_dir):
    """A captive portal sends everything to its login page."""
    requests = []

    class Portal(http.server.BaseHTTPRequestHandler):
        def do(self):
            requests.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(302)
            self.send_header("Location", "http://login.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_HEAD = do_GET = do  # noqa: N815

        def log_message(self, *_):
            pass

    (watch_dir / NAME).write_bytes(b"\x1f\x8b" + os.urandom(100))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    with answering(server):
        keys = s3.ADMIN.environ()
        with connected(keys, AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{server.server_port}"):
            result = send(watch_dir / NAME, conditional="true")
    assert result.outcome is Outcome.RETRY
    assert "302" in result.detail
    assert requests == ["PUT", "HEAD"]
    assert (watch_dir / NAME).exists()

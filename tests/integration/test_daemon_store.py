"""What the collector knows of the store before the first crash, and says of it."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest
from tests.support import manners, s3
from tests.support.collector import running, wait_until

from core_dump_collector.jobs import RetryReason


def readiness(collector):
    """Return status and body of /readyz."""
    try:
        return 200, collector.get("/readyz")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(collector, name):
    return [line for line in collector.get("/metrics").splitlines() if line.startswith(name)]


WRONG = {
    "bucket": ({"BUCKET_NAME": "no-such-bucket-here"}, RetryReason.NO_SUCH_BUCKET),
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, RetryReason.CREDENTIALS),
    "endpoint": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, RetryReason.NETWORK),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_store_is_told_before_the_first_crash(seaweed, bucket, watch_dir, tmp_path, what):
    environ, reason = WRONG[what]
    with running(watch_dir, seaweed.environ() | environ, tmp_path) as collector:
        wait_until(lambda: samples(collector, "core_dump_store_reachable"), 30, "an answer")
        assert samples(collector, "core_dump_store_reachable") == [
            f'core_dump_store_reachable{{reason="{reason}"}} 0.0'
        ]
        assert readiness(collector) == (503, f"not ready: the store does not take dumps: {reason}\n")
        assert collector.get("/livez") == "ok\n", "a restart would not help"
        log = collector.log()
    (line,) = [e for e in log if e["event"] == "the store does not answer as it should"]
    assert line["reason"] == reason
    assert not any(e["event"] == "ready" for e in log)


@pytest.mark.parametrize("keys", [s3.ADMIN, s3.WRITER], ids=["admin", "write-only"])
def test_right_store_is_ready_and_nothing_is_left_in_it(seaweed, bucket, watch_dir, tmp_path, keys):
    with running(watch_dir, seaweed.environ(keys), tmp_path) as collector:
        wait_until(lambda: readiness(collector) == (200, "ok\n"), 30, "readiness")
        assert samples(collector, "core_dump_store_reachable") == ['core_dump_store_reachable{reason=""} 1.0']
    assert s3.keys_in(bucket) == {}


def test_store_that_comes_back_makes_the_collector_ready(seaweed, bucket, watch_dir, tmp_path):
    (tmp_path / "haproxy").mkdir()
    with s3.haproxy(tmp_path / "haproxy", seaweed) as proxy:
        proxy.stop()
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "RETRY_SECONDS": "1"}
        with running(watch_dir, environ, tmp_path) as collector:
            wait_until(lambda: "network" in readiness(collector)[1], 30)
            proxy.start()
            partial = watch_dir / "core-app-1700000000-1-11.gz.partial"
            partial.write_bytes(gzip.compress(b"dump"))
            partial.rename(partial.with_suffix(""))
            wait_until(lambda: readiness(collector) == (200, "ok\n"), 30)


def test_pod_that_is_deleted_while_the_store_is_down_stays_with_its_dump(
    seaweed, bucket, watch_dir, tmp_path
):
    uid, pods = "11111111-2222-3333-4444-555555555555", tmp_path / "pods"
    (pods / f"shop_cart-0_{uid}/app").mkdir(parents=True)
    (tmp_path / "haproxy").mkdir()
    with s3.haproxy(tmp_path / "haproxy", seaweed) as proxy:
        proxy.stop()
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "RETRY_SECONDS": "1"}
        environ |= {"POD_LOGS_DIRECTORY": str(pods), "KEY_TEMPLATE": "{namespace}/{pod}/{name}"}
        with running(watch_dir, environ, tmp_path):
            partial = watch_dir / "core-app-1700000000-1-11.gz.partial"
            partial.write_bytes(gzip.compress(b"dump"))
            os.setxattr(partial, "user.coredump.pod_uid", uid.encode())
            dump = partial.rename(partial.with_suffix(""))
            wait_until(lambda: "user.coredump.pod" in os.listxattr(dump), 30, "the pod's name")
            shutil.rmtree(pods / f"shop_cart-0_{uid}")
            proxy.start()
            wait_until(lambda: not dump.exists(), 30, "the upload")
    assert set(s3.keys_in(bucket)) == {f"shop/cart-0/{dump.name}", f"shop/cart-0/{dump.name}.json"}


def put_dump(directory, number):
    partial = directory / f"core-app-1700000000-{number}-11.gz.partial"
    partial.write_bytes(gzip.compress(b"dump"))
    partial.rename(partial.with_suffix(""))


def test_dump_that_could_not_be_uploaded_is_deleted_only_if_an_age_is_set(
    seaweed, bucket, watch_dir, tmp_path
):
    environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "RETRY_SECONDS": "1"}
    for number in range(1, 7):
        put_dump(watch_dir, number)
    with running(watch_dir, environ, tmp_path) as collector:
        wait_until(lambda: collector.metric('core_dump_retries_total{reason="network"}') >= 2, 30)
        assert collector.metric("core_dump_dumps_discarded_total") == 0
    assert len(list(watch_dir.glob("core*"))) == 6
    with running(watch_dir, environ, tmp_path, "--discard-after-seconds", "2", "--workers", "8") as collector:
        wait_until(lambda: not list(watch_dir.glob("core*")), 60, "every dump to be deleted")
        wait_until(lambda: collector.metric("core_dump_dumps_discarded_total") == 6, 10)
        assert any(e["level"] == "error" and "DISCARD_AFTER_SECONDS" in e["event"] for e in collector.log())


def test_age_limit_deletes_nothing_that_can_be_uploaded(seaweed, bucket, watch_dir, tmp_path):
    old = watch_dir / "core-app-1700000000-1-11.gz"
    put_dump(watch_dir, 1)
    os.utime(old, (0, 0))
    with running(watch_dir, seaweed.environ(), tmp_path, "--discard-after-seconds", "0.001") as collector:
        wait_until(lambda: not old.exists(), 30)
        wait_until(lambda: collector.metric('core_dump_uploads_total{result="uploaded"}') == 1, 10)
    assert f"node-1/{old.name}" in s3.keys_in(bucket)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a file immutable, needs root: sudo make test")
def test_dump_that_cannot_be_deleted_is_sent_once_and_deleted_later(watch_dir, tmp_path):
    path = watch_dir / "core-app-1700000000-1-11.gz"
    put_dump(watch_dir, 1)

    def fix(body, headers):
        if "ETag" in headers:
            subprocess.run(["chattr", "+i", path], check=True)
        return body, headers

    with manners.fake_s3(manners.Manners()) as store:
        store.mangle = fix
        variables = store.environ() | {"RETRY_SECONDS": "1", "SIDECAR": "false"}
        try:
            with running(watch_dir, variables, tmp_path) as collector:
                wait_until(lambda: collector.metric('core_dump_retries_total{reason="local_io"}') >= 3, 30)
                assert path.exists()
                subprocess.run(["chattr", "-i", path], check=True)
                wait_until(lambda: not path.exists(), 10)
                wait_until(
                    lambda: collector.metric('core_dump_uploads_total{result="already_stored"}') == 1, 10
                )
        finally:
            if path.exists():
                subprocess.run(["chattr", "-i", path], check=True)
        assert store.asked("PUT") == 1

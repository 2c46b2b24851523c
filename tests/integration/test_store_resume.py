"""An upload cut short goes on where it was, or is cleared away; memory stays flat meanwhile."""

import gzip
import json
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
from tests.support import s3
from tests.support.collector import wait_until
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, disconnect, send

from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.s3.store import Store

RAW = NAME.removesuffix(".gz")
SIZE = 22 * MEBIBYTE
"""Five parts."""
FROM_PART_4 = "{ method PUT } { url_param(partNumber) -m int ge 4 }"
UP_TO_PART_3 = "{ method PUT } { url_param(partNumber) -m int le 3 }"
ONE_FILE = """
import sys
from pathlib import Path
from tests.support.uploads import send
print(send(Path(sys.argv[1]), read_timeout_seconds=600).outcome)
"""


@pytest.fixture
def proxy(seaweed, tmp_path):
    with s3.haproxy(tmp_path, seaweed, timeout="600s") as running:
        yield running


@pytest.fixture
def path(watch_dir):
    return watch_dir / NAME


def environ(seaweed, proxy, keys=s3.ADMIN):
    return seaweed.environ(keys) | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}


def stored_parts(bucket):
    """Return the numbers of the parts that wait for the rest of their upload."""
    uploads = bucket.list_multipart_uploads(Bucket=s3.BUCKET).get("Uploads", [])
    listed = [bucket.list_parts(Bucket=s3.BUCKET, Key=u["Key"], UploadId=u["UploadId"]) for u in uploads]
    return sorted(part["PartNumber"] for page in listed for part in page.get("Parts", []))


def cut_short(seaweed, proxy, bucket, path, keys=s3.ADMIN):
    """Upload until three parts are in the store, and kill the process there."""
    proxy.start(f"http-request silent-drop if {FROM_PART_4}")
    child = subprocess.Popen(
        [sys.executable, "-c", ONE_FILE, path],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(["", *sys.path])) | environ(seaweed, proxy, keys),
    )
    try:
        wait_until(lambda: stored_parts(bucket) == [1, 2, 3], 60, "three parts")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.exists()


@pytest.mark.parametrize("name", [NAME, RAW], ids=["compressed", "raw"])
def test_an_upload_cut_short_by_sigkill_sends_only_what_is_missing(seaweed, proxy, bucket, watch_dir, name):
    content = os.urandom(SIZE)
    (watch_dir / name).write_bytes(content)
    cut_short(seaweed, proxy, bucket, watch_dir / name)
    proxy.start(
        f"http-request deny if {UP_TO_PART_3}", "http-request deny if { method POST } { url_sub uploads }"
    )
    with connected(environ(seaweed, proxy)):
        assert send(watch_dir / name).outcome == Outcome.UPLOADED
    stored = s3.body_of(bucket, KEY)
    assert (stored if name == NAME else gzip.decompress(stored)) == content
    assert s3.unfinished_multiparts(bucket) == []


def test_parts_that_differ_from_the_file_are_sent_again(seaweed, proxy, bucket, path):
    path.write_bytes(os.urandom(SIZE))
    cut_short(seaweed, proxy, bucket, path)
    upload = bucket.list_multipart_uploads(Bucket=s3.BUCKET)["Uploads"][0]
    bucket.upload_part(
        Bucket=s3.BUCKET, Key=KEY, UploadId=upload["UploadId"], PartNumber=2, Body=bytes(5 * MEBIBYTE)
    )
    proxy.start()
    content = path.read_bytes()
    with connected(environ(seaweed, proxy)):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content


def test_who_may_not_list_parts_begins_anew_and_leaves_no_orphan(seaweed, proxy, bucket, path):
    content = os.urandom(SIZE)
    path.write_bytes(content)
    cut_short(seaweed, proxy, bucket, path, s3.WRITER)
    proxy.start()
    with connected(environ(seaweed, proxy, s3.WRITER)):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content
    assert s3.unfinished_multiparts(bucket) == []


def test_parts_of_older_content_are_cleared_away(seaweed, proxy, bucket, path):
    path.write_bytes(os.urandom(SIZE))
    cut_short(seaweed, proxy, bucket, path)
    with path.open("ab") as writer:
        writer.write(b"more")
    content = path.read_bytes()
    proxy.start()
    with connected(environ(seaweed, proxy)):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content
    assert s3.unfinished_multiparts(bucket) == []


def test_parts_of_another_size_are_cleared_away(seaweed, proxy, bucket, path):
    content = os.urandom(SIZE)
    path.write_bytes(content)
    cut_short(seaweed, proxy, bucket, path)
    proxy.start()
    with connected(environ(seaweed, proxy)):
        assert send(path, part_bytes=6 * MEBIBYTE).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content
    assert s3.unfinished_multiparts(bucket) == []


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


@pytest.mark.parametrize("keys", [s3.ADMIN, s3.WRITER], ids=["may list", "may only write"])
def test_upload_created_just_before_a_kill_is_found_where_uploads_may_be_listed(seaweed, bucket, path, keys):
    content = os.urandom(SIZE)
    path.write_bytes(content)
    real = Store.create_multipart
    with connected(seaweed.environ(keys)):
        with mock.patch.object(Store, "create_multipart", lambda *a: killed(real(*a))), pytest.raises(Killed):
            send(path)
        assert s3.unfinished_multiparts(bucket) == [KEY]
        result = send(path)
    assert result.outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content
    may_list = keys is s3.ADMIN
    assert s3.unfinished_multiparts(bucket) == ([] if may_list else [KEY])
    assert ("AbortIncompleteMultipartUpload" in result.detail) != may_list


def test_an_upload_that_somebody_aborted_begins_anew(seaweed, proxy, bucket, path):
    content = os.urandom(SIZE)
    path.write_bytes(content)
    cut_short(seaweed, proxy, bucket, path)
    upload = bucket.list_multipart_uploads(Bucket=s3.BUCKET)["Uploads"][0]
    bucket.abort_multipart_upload(Bucket=s3.BUCKET, Key=KEY, UploadId=upload["UploadId"])
    proxy.start()
    with connected(environ(seaweed, proxy)):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content


def test_a_completed_upload_whose_answer_was_lost_is_not_sent_again(seaweed, proxy, bucket, path):
    path.write_bytes(os.urandom(SIZE))
    proxy.start(
        "http-request set-var(txn.done) bool(true) if { method POST } { url_sub uploadId= }",
        "http-response silent-drop if { var(txn.done) -m bool }",
        "http-request set-var(proc.completed) bool(true) if { method POST } { url_sub uploadId= }",
        # what follows the first completion is refused, so that the outcome stays unknown to this process
        "http-request deny deny_status 503 if { var(proc.twice) -m bool }",
        "http-request set-var(proc.twice) bool(true) if { var(proc.completed) -m bool }",
    )
    with connected(environ(seaweed, proxy)):
        assert send(path, read_timeout_seconds=1).outcome == Outcome.RETRY
        assert json.loads(os.getxattr(path, "user.coredump.upload"))["state"] == "sent"
        proxy.start("http-request deny if { method PUT } { url_sub partNumber= }")
        disconnect()
        assert send(path).outcome == Outcome.ALREADY_STORED
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}


def test_a_dump_stored_without_its_sidecar_gets_only_the_sidecar(seaweed, proxy, bucket, path):
    path.write_bytes(os.urandom(SIZE))
    proxy.start("http-request deny deny_status 503 if { path_end .json }")
    with connected(environ(seaweed, proxy, s3.WRITER)):
        result = send(path)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER)
        assert path.exists()
        proxy.start("http-request deny if { method PUT POST } !{ path_end .json }")
        disconnect()
        assert send(path).outcome == Outcome.ALREADY_STORED
    assert json.loads(s3.body_of(bucket, KEY + ".json"))["size_bytes"] == SIZE


DAMAGED = [
    b"", b"null", b"[]", b"{}", b"\xff", b"9" * 900, b"[" * 1000, b'{"state": "sent"}',
    json.dumps({"state": "stored", "key": KEY, "modified_ns": "0", "size": 1}).encode(),
    json.dumps({"state": "stored", "key": ["x"], "modified_ns": 0}).encode(),
    json.dumps({"state": "stored", "key": "elsewhere/x", "modified_ns": 0, "x": 1}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("record", DAMAGED)
def test_a_damaged_record_costs_nothing(seaweed, bucket, path, record):
    path.write_bytes(b"dump")
    os.setxattr(path, "user.coredump.upload", record)
    with connected(seaweed.environ()):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == b"dump"


@pytest.mark.parametrize("state", ["stored", "unproven", "sent"])
def test_a_record_about_older_content_deletes_nothing(seaweed, bucket, path, state):
    path.write_bytes(b"written to since")
    record = {"state": state, "key": KEY, "modified_ns": path.stat().st_mtime_ns - 1, "size": 4, "crc32": 1}
    os.setxattr(path, "user.coredump.upload", json.dumps(record).encode())
    with connected(seaweed.environ()):
        assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == b"written to since"


def test_a_record_for_another_key_does_not_choose_the_key(seaweed, bucket, path):
    path.write_bytes(b"dump")
    record = {
        "state": "stored",
        "key": "other/x.gz",
        "modified_ns": path.stat().st_mtime_ns,
        "size": 4,
        "crc32": 1,
    }
    os.setxattr(path, "user.coredump.upload", json.dumps(record).encode())
    with connected(seaweed.environ()):
        assert send(path).key == KEY
    assert s3.body_of(bucket, KEY) == b"dump"


PEAK = """
import resource, sys
from pathlib import Path
from tests.support.uploads import send
small, large = map(Path, sys.argv[1:])
assert send(small).outcome == "uploaded"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert send(large, part_bytes=16 * 1024 * 1024).outcome == "uploaded"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["compressed", "sparse raw"])
def test_memory_is_the_same_for_every_size(seaweed, bucket, watch_dir, kind):
    (watch_dir / "core-small-1700000000-1-6.gz").write_bytes(b"x")
    large = watch_dir / (NAME if kind == "compressed" else RAW)
    with large.open("wb") as file:
        if kind == "compressed":
            block = os.urandom(MEBIBYTE)
            for _ in range(256):
                file.write(block)
        else:
            file.truncate(8 * 1024 * MEBIBYTE)
            file.write(os.urandom(50 * MEBIBYTE))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, watch_dir / "core-small-1700000000-1-6.gz", large],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(["", *sys.path])) | seaweed.environ(),
        check=True,
        capture_output=True,
        timeout=100,
    )
    assert int(done.stdout) < 64 * 1024  # KiB

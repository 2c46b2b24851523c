"""What another user plants in a watch directory that everybody may write to is not believed and does no harm."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import pytest
from tests.support import manners, s3
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, send

from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.node import dumpfile, scan
from core_dump_collector.node.dumpfile import DumpFile
from core_dump_collector.s3.errors import RetryableError
from core_dump_collector.s3.store import Store
from core_dump_format.attributes import ATTRIBUTE_PREFIX, UPLOAD_RECORD, read_attributes

SOMEBODY = 12345
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, needs root")


@pytest.fixture(params=[s3.ADMIN, s3.WRITER], ids=["may read", "may only write"])
def _connected(seaweed, request):
    with connected(seaweed.environ(request.param)):
        yield


@pytest.fixture
def shared_dir(watch_dir):
    """A watch directory as some manuals have it: sticky, and open to everybody."""
    watch_dir.chmod(0o1777)
    return watch_dir


def plant(directory, content, name=NAME, owner=SOMEBODY, **attributes):
    path = directory / name
    path.write_bytes(content)
    for attribute, value in attributes.items():
        os.setxattr(path, ATTRIBUTE_PREFIX + attribute, value)
    os.chown(path, owner, owner)
    return path


def record(path, state, content, **changes):
    """Forge the record of an attempt."""
    fields = {"state": state, "key": KEY, "modified_ns": path.stat().st_mtime_ns, "size": len(content)}
    fields |= {"crc32": 0, "upload_id": "", "part_bytes": 5 * MEBIBYTE} | changes
    os.setxattr(path, UPLOAD_RECORD, json.dumps(fields).encode())


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("state", ["sending", "sent", "stored"])
def test_forged_record_of_an_upload_deletes_nothing_unsent(bucket, shared_dir, state):
    path = plant(shared_dir, b"never sent")
    record(path, state, b"never sent")
    assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == b"never sent"


@pytest.mark.usefixtures("_connected")
def test_forged_record_does_not_claim_the_object_of_another(bucket, shared_dir):
    bucket.put_object(Bucket=s3.BUCKET, Key=KEY, Body=b"of another")
    path = plant(shared_dir, b"mine")
    record(path, "sent", b"mine", crc32=zlib.crc32(b"mine"))
    assert send(path).outcome == Outcome.UPLOADED
    assert {s3.body_of(bucket, key) for key in s3.keys_in(bucket)} >= {b"of another", b"mine"}


def test_record_of_our_own_is_believed_where_only_root_writes_and_nobody_may_look(seaweed, bucket, watch_dir):
    path = plant(watch_dir, b"sent before", owner=0)
    record(path, "stored", b"sent before")
    with connected(seaweed.environ(s3.WRITER)):
        assert send(path, metadata=False).outcome == Outcome.ALREADY_STORED
    assert s3.keys_in(bucket) == {}


def test_record_of_our_own_is_compared_with_the_bucket_where_that_may_be_read(seaweed, bucket, watch_dir):
    path = plant(watch_dir, b"sent before", owner=0)
    record(path, "stored", b"sent before")
    with connected(seaweed.environ(s3.ADMIN)):
        assert send(path, metadata=False).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == b"sent before"


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("change", [{}, {"key": "node-1/another.gz"}, {"modified_ns": 1}])
def test_forged_record_aborts_and_resumes_no_upload(bucket, shared_dir, change):
    """The upload id in a planted record may be that of another dump, on another node."""
    content = os.urandom(12 * MEBIBYTE)
    path = plant(shared_dir, content)
    key = change.get("key", "node-2/of-another.gz")
    begun = bucket.create_multipart_upload(Bucket=s3.BUCKET, Key=key)["UploadId"]
    bucket.upload_part(Bucket=s3.BUCKET, Key=key, UploadId=begun, PartNumber=1, Body=content[: 5 * MEBIBYTE])
    record(path, "sending", b"", **({"key": key, "upload_id": begun} | change))
    assert send(path).outcome == Outcome.UPLOADED
    assert s3.body_of(bucket, KEY) == content
    assert s3.unfinished_multiparts(bucket) == [key]


@pytest.mark.usefixtures("_connected")
def test_failed_upload_of_an_ordinary_users_core_leaves_no_parts(bucket, shared_dir, monkeypatch):
    path = plant(shared_dir, os.urandom(12 * MEBIBYTE))
    gone = RetryableError(RetryReason.NETWORK, "gone")
    monkeypatch.setattr(Store, "complete", mock.Mock(side_effect=gone))
    assert send(path).outcome == Outcome.RETRY
    assert s3.unfinished_multiparts(bucket) == []


@pytest.mark.usefixtures("_connected")
def test_nobody_speaks_for_another_pod(bucket, shared_dir):
    uid = b"01234567-89ab-cdef-0123-456789abcdef"
    path = plant(shared_dir, b"x", pod_uid=uid, container_id=b"a" * 64, comm=b"victim", truncated=b"killed")
    result = send(path, key_template="{comm}/{name}")
    told = json.loads(s3.body_of(bucket, result.key + ".json"))
    assert result.key == f"app/{NAME}"
    assert not {"pod_uid", "container_id", "truncated"} & set(told)
    assert (told["state"], told["comm"]) == ("complete", "app")


def test_more_and_longer_attributes_than_ours_are_not_read(watch_dir):
    path = plant(watch_dir, b"x", owner=0, comm=b"app", nonsense=b"x" * 1000)
    with DumpFile(str(watch_dir), path.name) as dump:
        assert dump.attributes() == {"user.coredump.comm": b"app"}


@pytest.mark.parametrize("pod_uid", [b"../../../../etc", b"a/b", b"", b"x" * 36, b"..%2f", b"\xff" * 36])
def test_pod_uid_that_is_none_is_left_out(pod_uid):
    raw = {"user.coredump.pod_uid": pod_uid, "user.coredump.container_id": pod_uid}
    assert read_attributes(raw) == {}


def test_partial_of_another_user_is_left_alone(shared_dir):
    mine = plant(shared_dir, b"x", NAME + ".partial", owner=0)
    assert dumpfile.salvage(str(shared_dir), mine.name) == NAME
    theirs = plant(shared_dir, b"x", NAME + ".partial")
    assert dumpfile.salvage(str(shared_dir), theirs.name) is None
    assert theirs.exists()


@pytest.mark.parametrize("name", ["quarantine.partial", "movie.iso.partial", ".helper.partial"])
def test_partial_of_another_program_is_not_ours(shared_dir, name):
    plant(shared_dir, b"x", name, owner=0)
    assert scan.look(str(shared_dir), name, patterns=("core*",)) is None
    assert list(scan.scan(str(shared_dir), ("core*",))) == []


def test_quarantine_of_another_user_gets_no_dump(shared_dir):
    plant(shared_dir, b"evidence", owner=0)
    (shared_dir / "quarantine").mkdir()
    os.chown(shared_dir / "quarantine", SOMEBODY, SOMEBODY)
    with DumpFile(str(shared_dir), NAME) as dump, pytest.raises(OSError, match="belongs to others"):
        dump.quarantine()
    assert (shared_dir / NAME).read_bytes() == b"evidence"


def test_quarantine_planted_as_a_link_is_not_counted_through(shared_dir):
    (shared_dir / "quarantine").symlink_to("/etc")
    assert scan.measure_quarantined(str(shared_dir)) == (0, 0)


@pytest.mark.usefixtures("_connected")
def test_dump_does_not_take_the_key_of_a_sidecar(bucket, shared_dir):
    first = send(plant(shared_dir, b"forged", NAME + ".json"), compress_raw=False)
    second = send(plant(shared_dir, b"dump", owner=0), compress_raw=False)
    assert (first.key, second.key) == (f"{KEY}.json_", KEY)
    assert json.loads(s3.body_of(bucket, KEY + ".json"))["key"] == KEY


@pytest.mark.usefixtures("_connected")
def test_sparse_file_of_eight_exbibytes_keeps_no_worker_busy(bucket):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "core-sparse-1700000000-1-11"
        path.touch()
        os.truncate(path, (1 << 63) - 4096)
        result = send(path)
        assert result.outcome == Outcome.REFUSED
        assert path.exists()
    assert s3.keys_in(bucket) == {}


@pytest.mark.usefixtures("_connected")
def test_nothing_is_sent_from_where_it_could_not_be_deleted(bucket, watch_dir):
    plant(watch_dir, b"x", owner=0)
    subprocess.run(["mount", "--bind", watch_dir, watch_dir], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", watch_dir], check=True)
        result = send(watch_dir / NAME)
    finally:
        subprocess.run(["umount", watch_dir], check=True)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.LOCAL_IO)
    assert "read-only" in result.detail
    assert s3.keys_in(bucket) == {}


@contextlib.contextmanager
def fixed(path, flag):
    """Set a flag of an inode for a while."""
    subprocess.run(["chattr", f"+{flag}", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("what", ["dump", "directory"])
def test_nothing_is_sent_that_could_not_be_deleted(watch_dir, what, flag):
    path = plant(watch_dir, b"x", owner=0)
    with (
        manners.fake_s3(manners.Manners()) as store,
        connected(store.environ()),
        fixed(path if what == "dump" else watch_dir, flag),
    ):
        result = send(path)
        assert not store.requests
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.LOCAL_IO)
    assert f"{what} is immutable or append-only" in result.detail


REQUIRE = """
import sys
from core_dump_collector.node.dumpfile import DumpFile
with DumpFile(sys.argv[1], sys.argv[2]) as dump:
    dump.require_deletable()
"""


@pytest.mark.parametrize("directory_owner", [0, SOMEBODY])
def test_dump_of_another_user_in_a_sticky_directory_is_deletable_with_the_capability_alone(
    shared_dir, directory_owner
):
    plant(shared_dir, b"x")
    os.chown(shared_dir, directory_owner, -1)
    command = [sys.executable, "-c", REQUIRE, str(shared_dir), NAME]
    subprocess.run(command, check=True)
    without = subprocess.run(
        ["setpriv", "--bounding-set=-fowner", *command], check=False, capture_output=True, text=True
    )
    assert (without.returncode == 0) == (directory_owner == 0)
    assert ("sticky" in without.stderr) == (directory_owner != 0)

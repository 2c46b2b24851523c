"""What arrives in the bucket when everything works: the bytes, the metadata, the sidecar; and who may put it there."""

import gzip
import json
import os
import zlib

import pytest
from tests.support import s3
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, options, send

from core_dump_collector import metadata, storecheck
from core_dump_collector.errors import ConfigError
from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.s3 import parts
from core_dump_format.crc32 import encode_crc32

RAW = NAME.removesuffix(".gz")


def put(directory, content, name=NAME, **attributes):
    path = directory / name
    path.write_bytes(content)
    for attribute, value in attributes.items():
        os.setxattr(path, f"user.coredump.{attribute}", value)
    return path


def as_sidecar(bucket, key=KEY):
    return json.loads(s3.body_of(bucket, key + ".json"))


@pytest.fixture(params=["http", "tls"])
def tls(request):
    return request.param == "tls"


@pytest.fixture(params=[s3.ADMIN, s3.WRITER], ids=["may read", "may only write"])
def keys(request):
    return request.param


@pytest.fixture
def _admin(seaweed):
    with connected(seaweed.environ()):
        yield


@pytest.mark.parametrize("size", [0, 600_000, 5 * MEBIBYTE, 16 * MEBIBYTE])
def test_a_dump_arrives_whole_and_leaves_the_disk(seaweed, bucket, watch_dir, keys, tls, size):
    content = os.urandom(size)
    with connected(seaweed.environ(keys, tls=tls)):
        result = send(put(watch_dir, content))
    assert (result.outcome, result.key, result.detail) == (Outcome.UPLOADED, KEY, "")
    assert (result.read_bytes, result.stored_bytes, result.signal) == (size, size, 11)
    assert s3.body_of(bucket, KEY) == content
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}
    assert not list(watch_dir.iterdir())
    assert s3.unfinished_multiparts(bucket) == []


@pytest.mark.parametrize("size", [1 * MEBIBYTE, 12 * MEBIBYTE + 1])
def test_a_dump_is_read_once_for_its_checksums_and_once_to_be_sent(
    seaweed, bucket, watch_dir, tls, size, monkeypatch
):
    real, read = parts.FilePart.block, []

    def counted(part, offset, wanted):
        block = real(part, offset, wanted)
        read.append(len(block))
        return block

    monkeypatch.setattr(parts.FilePart, "block", counted)
    with connected(seaweed.environ(tls=tls)):
        assert send(put(watch_dir, os.urandom(size))).outcome == Outcome.UPLOADED
    assert sum(read) == 2 * size
    assert s3.keys_in(bucket)[KEY] == size


@pytest.mark.parametrize("size", [100_000, 24 * MEBIBYTE])
def test_a_raw_core_arrives_as_gzip(seaweed, bucket, watch_dir, keys, tls, size):
    content = os.urandom(size // 2) + bytes(size // 2)
    with connected(seaweed.environ(keys, tls=tls)):
        result = send(put(watch_dir, content, RAW))
    assert (result.outcome, result.key, result.read_bytes) == (Outcome.UPLOADED, KEY, size)
    assert gzip.decompress(s3.body_of(bucket, KEY)) == content
    assert result.stored_bytes == s3.keys_in(bucket)[KEY]


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize("size", [1000, 12 * MEBIBYTE])
def test_the_store_has_the_checksum_of_the_whole_object(bucket, watch_dir, size):
    content = os.urandom(size)
    send(put(watch_dir, content))
    head = bucket.head_object(Bucket=s3.BUCKET, Key=KEY, ChecksumMode="ENABLED")
    assert head["ChecksumCRC32"] == as_sidecar(bucket)["crc32"] == encode_crc32(zlib.crc32(content))


@pytest.mark.usefixtures("_admin")
def test_the_sidecar_says_what_is_known(bucket, watch_dir):
    path = put(watch_dir, b"dump", pid=b"4242", comm=b"a\xff\nb", exe="/opt/é".encode(), truncated=b"killed")
    os.setxattr(path, "user.coredump.sensitive", b"dumpable=2")
    result = send(path)
    document = as_sidecar(bucket)
    assert document.pop("uploaded_at").endswith("Z")
    assert document.pop("collector_version")
    assert document == {
        "schema": 1, "key": KEY, "bucket": "dumps", "size_bytes": 4,
        "crc32": encode_crc32(zlib.crc32(b"dump")),
        "node": "node-1", "state": "truncated", "truncated": "killed", "sensitive": True,
        "sensitive_reason": "dumpable=2", "pid": 4242, "comm": "a\\xff\nb", "exe": "/opt/é", "signal": 11,
        "timestamp": 1_700_000_000,
    }  # fmt: skip
    assert (result.truncated, result.sensitive) == ("killed", True)


@pytest.mark.usefixtures("_admin")
def test_the_object_says_the_most_important_in_ascii(bucket, watch_dir):
    send(put(watch_dir, b"dump", comm="é\n\tx".encode()))
    head = bucket.head_object(Bucket=s3.BUCKET, Key=KEY)
    assert head["ContentType"] == "application/gzip"
    assert head["Metadata"] == {
        "comm": "___x", "pid": "42", "signal": "11", "state": "complete", "sensitive": "false"
    }  # fmt: skip


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize("size", [10, 6 * MEBIBYTE])
def test_tags_and_storage_class_are_set(bucket, watch_dir, size):
    tags = {"team": "a b", "k": "v=/+"}
    send(put(watch_dir, bytes(size)), object_tags=tags, storage_class="STANDARD_IA")
    tagged = bucket.get_object_tagging(Bucket=s3.BUCKET, Key=KEY)["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tagged} == tags
    assert bucket.head_object(Bucket=s3.BUCKET, Key=KEY)["StorageClass"] == "STANDARD_IA"


@pytest.mark.usefixtures("_admin")
def test_no_sidecar_when_switched_off(bucket, watch_dir):
    send(put(watch_dir, b"dump"), metadata=False)
    assert set(s3.keys_in(bucket)) == {KEY}


@pytest.mark.usefixtures("_admin")
def test_prefix_and_template_make_the_key(bucket, watch_dir):
    changes = {"bucket_name": "s3://dumps/team/x", "key_template": "{date}/{comm}/{signal}/{name}"}
    result = send(put(watch_dir, b"dump", comm=b"../../etc"), **changes)
    assert result.key == f"team/x/2023-11-14/.._.._etc/11/{NAME}"
    assert result.key in s3.keys_in(bucket)


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize(
    "name", ["core\n\x1b[31mx", "core\udcff", "core" + "a" * 251, "core -rf $(x)", "core-..%2f"]
)
def test_hostile_names_become_safe_keys(bucket, watch_dir, name):
    result = send(put(watch_dir, b"dump", name))
    assert result.outcome == Outcome.UPLOADED
    assert gzip.decompress(s3.body_of(bucket, result.key)) == b"dump"
    assert result.key.isascii()
    assert result.key.isprintable()
    assert not list(watch_dir.iterdir())


# Keys that are taken


@pytest.mark.parametrize("size", [1000, 6 * MEBIBYTE])
def test_dumps_of_one_name_and_different_content_all_survive(seaweed, bucket, watch_dir, keys, size):
    contents = [os.urandom(size) for _ in range(3)]
    with connected(seaweed.environ(keys)):
        stored = [send(put(watch_dir, content)).key for content in contents]
    assert stored == [KEY, KEY.replace(".gz", "-1.gz"), KEY.replace(".gz", "-2.gz")]
    assert [s3.body_of(bucket, key) for key in stored] == contents
    assert [as_sidecar(bucket, key)["key"] for key in stored] == stored
    assert s3.unfinished_multiparts(bucket) == []


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize("size", [1000, 6 * MEBIBYTE])
def test_the_very_same_dump_is_recognised(bucket, watch_dir, size):
    content = os.urandom(size)
    assert send(put(watch_dir, content)).outcome == Outcome.UPLOADED
    assert send(put(watch_dir, content)).outcome == Outcome.ALREADY_STORED
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}


@pytest.mark.usefixtures("_admin")
def test_a_dump_is_never_overwritten_by_a_sidecar_nor_a_sidecar_by_a_dump(bucket, watch_dir):
    send(put(watch_dir, b"a dump with a strange name", NAME + ".json"), compress_raw=False)
    send(put(watch_dir, b"dump"), compress_raw=False)
    send(put(watch_dir, b"a second one", NAME + ".json"), compress_raw=False)
    stored = {s3.body_of(bucket, key) for key in s3.keys_in(bucket)}
    assert {b"a dump with a strange name", b"dump", b"a second one"} <= stored


# What is left on disk


@pytest.mark.usefixtures("_admin")
def test_sensitive_dumps_stay_when_configured(bucket, watch_dir):
    path = put(watch_dir, b"dump", sensitive=b"dumpable=2")
    assert send(path, upload_sensitive=False).outcome == Outcome.REFUSED
    assert path.exists()
    assert s3.keys_in(bucket) == {}


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])
def test_what_is_no_regular_file_stays_and_nothing_is_sent(bucket, watch_dir, make):
    make(watch_dir / NAME)
    result = send(watch_dir / NAME)
    assert result.outcome == Outcome.REFUSED
    assert result.detail
    assert os.path.lexists(watch_dir / NAME)
    assert s3.keys_in(bucket) == {}


def test_busy_and_vanished_files_ask_nothing_of_the_store(watch_dir):
    with connected({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}):
        assert send(watch_dir / NAME).outcome == Outcome.VANISHED
        with (watch_dir / NAME).open("wb"):
            assert send(watch_dir / NAME).outcome == Outcome.BUSY


@pytest.mark.usefixtures("_admin")
@pytest.mark.parametrize("size", [1000, 11 * MEBIBYTE])
@pytest.mark.parametrize("moment", ["while it is read", "after it was stored"])
def test_a_file_that_grows_meanwhile_stays_and_goes_up_whole_the_next_time(
    bucket, watch_dir, monkeypatch, size, moment
):
    path = put(watch_dir, os.urandom(size))

    def grow_before(owner, name):
        real = getattr(owner, name)

        def grown(*arguments, **options):
            monkeypatch.setattr(owner, name, real)
            with path.open("ab") as writer:
                writer.write(b"more")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, grown)

    grow_before(*((parts.FilePart, "crc32") if moment == "while it is read" else (metadata, "render")))
    result = send(path)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.LOCAL_IO)
    whole = path.read_bytes()
    assert whole.endswith(b"more")
    if moment == "while it is read":
        assert s3.keys_in(bucket) == {}, "a mixture of old and new bytes is not stored"
    assert s3.unfinished_multiparts(bucket) == []
    assert send(path).outcome == Outcome.UPLOADED
    assert whole in [s3.body_of(bucket, key) for key in s3.keys_in(bucket)]
    assert not path.exists()


@pytest.mark.usefixtures("_admin")
def test_a_file_swapped_while_it_is_uploaded_is_not_deleted(bucket, watch_dir, monkeypatch):
    path = put(watch_dir, b"old")
    real = metadata.render

    def swap(*arguments):
        put(watch_dir, b"new", "new").rename(path)
        return real(*arguments)

    monkeypatch.setattr(metadata, "render", swap)
    assert send(path).outcome == Outcome.UPLOADED
    assert path.read_bytes() == b"new"
    assert s3.body_of(bucket, KEY) == b"old"


@pytest.mark.usefixtures("_admin")
def test_a_directory_without_attributes_loses_metadata_and_not_the_dump(bucket, watch_dir, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    for name in ("setxattr", "getxattr", "listxattr", "removexattr"):
        monkeypatch.setattr(os, name, unsupported)
    (watch_dir / NAME).write_bytes(bytes(11 * MEBIBYTE))
    assert send(watch_dir / NAME).outcome == Outcome.UPLOADED
    assert as_sidecar(bucket)["signal"] == 11


# The check


@pytest.mark.usefixtures("_admin")
def test_the_check_leaves_nothing_behind(bucket):
    assert "refused" in storecheck.verify_store(options())
    assert s3.keys_in(bucket) == {}


def test_the_check_works_for_an_identity_that_may_only_write(seaweed, bucket):
    with connected(seaweed.environ(s3.WRITER)):
        for _ in range(2):  # what it cannot delete is in its way
            said = storecheck.verify_store(options())
            assert "refused" in said
            assert "WARNING" not in said


@pytest.mark.parametrize(
    ("keys", "changes", "said"),
    [
        (s3.STRANGER, {}, "s3:PutObject"),
        (s3.Keys("AKADMIN", "wrong"), {}, "credentials"),
        (s3.ADMIN, {"bucket_name": "no-such-bucket"}, "BUCKET_NAME"),
    ],
)
def test_the_check_says_what_to_do(seaweed, keys, changes, said):
    with connected(seaweed.environ(keys)), pytest.raises(ConfigError, match=said) as raised:
        storecheck.verify_store(options(**changes))
    assert "\n" not in str(raised.value)


def test_the_check_tells_an_unreachable_store_from_a_wrong_setting():
    keys = s3.ADMIN.environ()
    with (
        connected(keys | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}),
        pytest.raises(ConfigError, match="nothing answers at the endpoint"),
    ):
        storecheck.verify_store(options())

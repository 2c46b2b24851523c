"""A store that misbehaves, on the wire: nothing is lost, nothing lies under two keys, nothing is left half-done."""

import gzip
import os
import time

import pytest
from tests.support import s3
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, disconnect, send

from core_dump_collector.jobs import Outcome, RetryReason

SMALL, LARGE = 1000, 11 * MEBIBYTE
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["one request", "multipart"])
PUT, COMPLETE, CREATE = (
    "{ method PUT }",
    "{ method POST } { url_sub uploadId= }",
    "{ method POST } { url_sub uploads }",
)
MAKES_VISIBLE = [f"{PUT} !{{ url_sub partNumber= }} !{{ path_end .json .condition }}", COMPLETE]


def error_body(code, message="told by a proxy"):
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


@pytest.fixture(params=[s3.ADMIN, s3.WRITER], ids=["may read", "may only write"])
def keys(request):
    return request.param


@pytest.fixture
def proxy(seaweed, tmp_path):
    with s3.haproxy(tmp_path, seaweed) as running:
        yield running


@pytest.fixture
def _connected(seaweed, proxy, keys):
    with connected(seaweed.environ(keys), AWS_ENDPOINT_URL_S3=proxy.endpoint):
        yield


@pytest.fixture
def dump(watch_dir):
    """Make a dump of some size; call it to get its path, and `content` for what it holds."""

    class Dump:
        path = watch_dir / NAME
        content = b""

        def __call__(self, size):
            self.content = os.urandom(size)
            self.path.write_bytes(self.content)
            return self.path

    return Dump()


def answering(proxy, status, code, condition, message="told by a proxy"):
    body = proxy.body(f"{code.split()[0]}.xml", error_body(code, message))
    return f"http-request return status {status} content-type application/xml file {body} if {condition}"


def settle(proxy, dump):
    """Send without faults and check that all is as if there had been none."""
    proxy.start()
    disconnect()
    result = send(dump.path)
    assert result.outcome in {Outcome.UPLOADED, Outcome.ALREADY_STORED}
    assert not dump.path.exists()
    return result


def only_this_is_stored(bucket, dump):
    assert set(s3.keys_in(bucket)) == {KEY, KEY + ".json"}
    assert s3.body_of(bucket, KEY) == dump.content
    assert s3.unfinished_multiparts(bucket) == []


ANSWERS = [
    (500, "InternalError", RetryReason.SERVER),
    (503, "SlowDown", RetryReason.THROTTLED),
    (503, "ServiceUnavailable", RetryReason.SERVER),
    (429, "TooManyRequests", RetryReason.THROTTLED),
    (400, "RequestTimeout", RetryReason.NETWORK),
    (400, "BadDigest", RetryReason.CHECKSUM),
    (400, "ExpiredToken", RetryReason.CREDENTIALS),
    (403, "InvalidAccessKeyId", RetryReason.CREDENTIALS),
    (403, "SignatureDoesNotMatch", RetryReason.CREDENTIALS),
    (403, "RequestTimeTooSkewed", RetryReason.CREDENTIALS),
    (403, "AccessDenied", RetryReason.FORBIDDEN),
    (400, "InvalidStorageClass", RetryReason.FORBIDDEN),
    (404, "NoSuchBucket", RetryReason.NO_SUCH_BUCKET),
    (409, "ConditionalRequestConflict", RetryReason.SERVER),
]


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@pytest.mark.parametrize(("status", "code", "reason"), ANSWERS, ids=[code for _, code, _ in ANSWERS])
def test_an_error_keeps_the_file_and_is_called_by_its_name(proxy, bucket, dump, status, code, reason):
    proxy.start(answering(proxy, status, code, PUT))
    result = send(dump(SMALL))
    assert (result.outcome, result.retry_reason, result.key) == (Outcome.RETRY, reason, None)
    assert code in result.detail
    assert dump.path.read_bytes() == dump.content
    assert s3.keys_in(bucket) == {}
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize(
    "where", [CREATE, f"{PUT} {{ url_param(partNumber) -m int eq 2 }}", COMPLETE, "{ path_end .json }"]
)
@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (403, "AccessDenied")])
def test_a_multipart_that_fails_anywhere_is_finished_later(proxy, bucket, dump, where, status, code):
    proxy.start(answering(proxy, status, code, where))
    assert send(dump(LARGE)).outcome == Outcome.RETRY
    assert dump.path.read_bytes() == dump.content
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
def test_parts_that_fail_now_and_then_do_not_fail_the_upload(proxy, bucket, dump):
    counted = "http-request set-var(proc.n) var(proc.n),add(1) if { method PUT }"
    slow = answering(
        proxy, 503, "SlowDown", f"{PUT} {{ url_sub partNumber= }} {{ var(proc.n),mod(3) -m int eq 1 }}"
    )
    proxy.start("http-request set-var(proc.n) int(0) if !{ var(proc.n) -m found }", counted, slow)
    assert send(dump(LARGE)).outcome == Outcome.UPLOADED
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@SIZES
def test_a_connection_reset_in_mid_body_loses_nothing(proxy, bucket, dump, size):
    read_some = f"http-request wait-for-body time 5s at-least 500 if {PUT}"
    proxy.start(read_some, f"http-request reject if {PUT}")
    result = send(dump(size))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert dump.path.exists()
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
def test_a_store_that_hangs_is_given_up_by_the_timeout(proxy, bucket, dump):
    proxy.start(f"http-request silent-drop if {PUT}")
    started = time.monotonic()
    result = send(dump(SMALL), read_timeout_seconds=1)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert 1 <= time.monotonic() - started < 5
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@SIZES
def test_an_endpoint_that_is_down_is_said_to_be(proxy, bucket, dump, size):
    proxy.stop()
    dump(size)
    for _ in range(3):
        result = send(dump.path)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


LOST = {
    "answered by another error": "http-response return status 502 if { var(txn.visible) -m bool }",
    "cut off": "http-response silent-drop if { var(txn.visible) -m bool }",
}


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@SIZES
def test_a_success_whose_answer_is_lost_is_recognised_and_stored_once(proxy, bucket, dump, size, lost):
    marks = [f"http-request set-var(txn.visible) bool(true) if {condition}" for condition in MAKES_VISIBLE]
    proxy.start(*marks, lost)
    result = send(dump(size), read_timeout_seconds=1)
    assert KEY in s3.keys_in(bucket)
    if result.outcome != Outcome.ALREADY_STORED:  # asked again at once, the store says that the key is taken
        assert result.outcome == Outcome.RETRY
        assert dump.path.exists()
        assert settle(proxy, dump).outcome == Outcome.ALREADY_STORED
    only_this_is_stored(bucket, dump)


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST.keys())
@SIZES
def test_a_lost_answer_deletes_nothing_where_nobody_may_look(seaweed, proxy, bucket, dump, size, lost):
    with connected(seaweed.environ(s3.WRITER), AWS_ENDPOINT_URL_S3=proxy.endpoint):
        marks = [
            f"http-request set-var(txn.visible) bool(true) if {condition}" for condition in MAKES_VISIBLE
        ]
        proxy.start(*marks, lost)
        assert send(dump(size), read_timeout_seconds=1).outcome == Outcome.RETRY
        proxy.start()
        disconnect()
        assert_unproven(send(dump.path), dump)
        proxy.start("http-request deny if { method PUT POST }")
        disconnect()
        assert_unproven(send(dump.path), dump)  # it looks, and does not send again
    assert set(s3.keys_in(bucket)) == {KEY}
    with connected(seaweed.environ()):
        assert send(dump.path).outcome == Outcome.ALREADY_STORED
    only_this_is_stored(bucket, dump)


def assert_unproven(result, dump):
    """Check that the file stays, and that the message names the permission that would help."""
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.UNPROVEN)
    assert "s3:GetObject" in result.detail
    assert dump.path.read_bytes() == dump.content


@pytest.mark.usefixtures("_connected")
@SIZES
def test_a_lost_answer_does_not_hide_a_collision(proxy, bucket, dump, size):
    """Somebody else's object took the key; our request never arrived, and we do not know that."""
    bucket.put_object(Bucket=s3.BUCKET, Key=KEY, Body=b"somebody else's")
    proxy.start(*[answering(proxy, 503, "SlowDown", condition) for condition in MAKES_VISIBLE])
    assert send(dump(size)).outcome == Outcome.RETRY
    result = settle(proxy, dump)
    assert result.key == KEY.replace(".gz", "-1.gz")
    assert s3.body_of(bucket, KEY) == b"somebody else's"
    assert s3.body_of(bucket, result.key) == dump.content
    assert s3.unfinished_multiparts(bucket) == []


WRONG_CRC32 = (
    "http-response set-header x-amz-checksum-crc32 AAAAAA== if { res.hdr(x-amz-checksum-crc32) -m found }"
)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@SIZES
def test_another_checksum_in_every_answer_keeps_the_file(proxy, bucket, dump, size):
    proxy.start(WRONG_CRC32)
    result = send(dump(size))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.CHECKSUM)
    assert dump.path.read_bytes() == dump.content
    result = settle(proxy, dump)
    assert s3.body_of(bucket, result.key) == dump.content
    assert s3.unfinished_multiparts(bucket) == []


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.WRITER], ids=[""])
def test_another_checksum_where_nobody_may_look_keeps_the_file_and_lays_no_copy(seaweed, proxy, bucket, dump):
    proxy.start(WRONG_CRC32)
    dump(SMALL)
    for _ in range(3):
        assert_unproven(send(dump.path), dump)
    assert set(s3.keys_in(bucket)) == {KEY}
    with connected(seaweed.environ()):
        assert send(dump.path).outcome == Outcome.ALREADY_STORED
    only_this_is_stored(bucket, dump)


FOREIGN_ETAG = (
    "http-response del-header x-amz-checksum-crc32",
    f'http-response set-header ETag "{"0" * 32}" if {{ method PUT HEAD }}',
)


@pytest.mark.usefixtures("_connected")
def test_an_etag_that_only_looks_like_an_md5_proves_nothing_and_lays_no_copy(seaweed, proxy, bucket, dump):
    proxy.start(*FOREIGN_ETAG)
    dump(SMALL)
    for _ in range(3):
        result = send(dump.path)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.UNPROVEN)
    assert dump.path.read_bytes() == dump.content
    assert set(s3.keys_in(bucket)) == {KEY}
    with connected(seaweed.environ()):
        assert send(dump.path).outcome == Outcome.ALREADY_STORED
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
def test_success_with_an_error_inside_is_no_success(proxy, bucket, dump):
    proxy.start(answering(proxy, 200, "InternalError", COMPLETE))
    result = send(dump(LARGE))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER)
    assert dump.path.exists()
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


GARBAGE = {"no XML": b"\x00\xff<<<", "empty": b"", "another document": b"<html><body>Sign in</body></html>"}


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@pytest.mark.parametrize("where", [PUT, CREATE, COMPLETE])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_portal_that_answers_everything_with_200_gets_no_dump_deleted(proxy, bucket, dump, where, garbage):
    page = proxy.body("page", garbage)
    proxy.start(f"http-request return status 200 content-type text/html file {page} if {where}")
    result = send(dump(SMALL if where == PUT else LARGE))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER)
    assert dump.path.exists()
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
def test_what_a_store_says_cannot_forge_a_log_line(proxy, bucket, dump):
    message = "x\n2026 INFO uploaded \u009b31m\u202e" + "A" * 10_000
    proxy.start(answering(proxy, 403, "Access\nDenied", PUT, message))
    result = send(dump(SMALL))
    assert result.retry_reason == RetryReason.FORBIDDEN
    assert result.detail.isprintable()
    assert len(result.detail) <= 300
    settle(proxy, dump)


@pytest.mark.usefixtures("_connected")
@SIZES
def test_a_conflict_begins_anew_and_leaves_no_orphan(proxy, bucket, dump, size):
    proxy.start(
        *[answering(proxy, 409, "ConditionalRequestConflict", condition) for condition in MAKES_VISIBLE]
    )
    assert send(dump(size)).outcome == Outcome.RETRY
    assert s3.unfinished_multiparts(bucket) == []
    settle(proxy, dump)
    only_this_is_stored(bucket, dump)


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
@pytest.mark.parametrize("code", ["EntityTooLarge", "MetadataTooLarge"])
def test_what_is_refused_for_good_goes_to_quarantine(proxy, bucket, dump, code):
    proxy.start(answering(proxy, 400, code, PUT))
    result = send(dump(SMALL))
    assert result.outcome == Outcome.QUARANTINED
    assert code in result.detail
    assert (dump.path.parent / "quarantine" / NAME).read_bytes() == dump.content
    assert not dump.path.exists()


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
def test_one_broken_dump_does_not_stop_the_next(proxy, bucket, dump, watch_dir):
    proxy.start(answering(proxy, 403, "AccessDenied", "{ path_sub core-app }"))
    assert send(dump(SMALL)).outcome == Outcome.RETRY
    (watch_dir / "core-other-1700000000-1-6.gz").write_bytes(gzip.compress(b"other"))
    assert send(watch_dir / "core-other-1700000000-1-6.gz").outcome == Outcome.UPLOADED


# Stores that know less

NO_CONDITIONS = "if { req.hdr(if-none-match) -m found }"


@pytest.mark.usefixtures("_connected")
@SIZES
def test_a_store_without_if_none_match_still_loses_nothing(proxy, bucket, dump, size):
    body = proxy.body("501.xml", error_body("NotImplemented"))
    proxy.start(f"http-request return status 501 content-type application/xml file {body} {NO_CONDITIONS}")
    contents, stored = [], []
    for _ in range(2):
        result = send(dump(size))
        assert result.outcome == Outcome.UPLOADED
        contents.append(dump.content)
        stored.append(result.key)
    assert len(set(stored)) == 2
    assert [s3.body_of(bucket, key) for key in stored] == contents
    assert s3.unfinished_multiparts(bucket) == []


@pytest.mark.usefixtures("_connected")
@pytest.mark.parametrize("keys", [s3.ADMIN], ids=[""])
def test_a_store_that_refuses_the_condition_of_complete_alone_still_works(proxy, bucket, dump):
    body = proxy.body("412.xml", error_body("InvalidRequest"))
    condition = f"{COMPLETE} {{ req.hdr(if-none-match) -m found }}"
    proxy.start(f"http-request return status 412 content-type application/xml file {body} if {condition}")
    assert send(dump(LARGE)).outcome == Outcome.UPLOADED
    only_this_is_stored(bucket, dump)


@SIZES
@pytest.mark.parametrize("checksum", ["when_required", "when_supported"])
def test_no_store_needs_checksum_trailers(seaweed, bucket, dump, tmp_path, size, checksum):
    """Over TLS, where boto3's defaults send trailers; a store that knows no checksums at all needs when_required."""
    refused = ["x-amz-trailer", "transfer-encoding", "x-amz-decoded-content-length"]
    if checksum == "when_required":
        refused += ["x-amz-checksum-crc32", "x-amz-checksum-algorithm", "x-amz-sdk-checksum-algorithm"]
    rules = [f"http-request deny deny_status 400 if {{ req.hdr({header}) -m found }}" for header in refused]
    with s3.haproxy(tmp_path, seaweed, *rules, tls=True) as proxy:
        environ = {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "AWS_CA_BUNDLE": str(tmp_path / "cert.pem")}
        with connected(seaweed.environ(s3.WRITER), **environ):
            assert send(dump(size), checksum=checksum).outcome == Outcome.UPLOADED
    only_this_is_stored(bucket, dump)


@pytest.mark.parametrize("checksum", ["when_required", "when_supported"])
def test_the_body_is_always_protected(seaweed, bucket, dump, tmp_path, checksum):
    """By the signature or by a checksum: one of them has to be there over TLS, both over plain HTTP."""
    signed = "!{ req.hdr(x-amz-content-sha256) -m str UNSIGNED-PAYLOAD }"
    unprotected = f"{signed[1:]} !{{ req.hdr(x-amz-checksum-crc32) -m found }}"
    over_tls = [f"http-request deny if {PUT} {unprotected}"]
    if checksum == "when_supported":
        over_tls += [
            f"http-request deny if {PUT} {{ path_end .gz }} {signed}"
        ]  # twice would be CPU for nothing
    with s3.haproxy(tmp_path, seaweed, *over_tls, tls=True) as proxy:
        environ = {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "AWS_CA_BUNDLE": str(tmp_path / "cert.pem")}
        with connected(seaweed.environ(), **environ):
            assert send(dump(SMALL), checksum=checksum).outcome == Outcome.UPLOADED
    with (
        s3.haproxy(tmp_path, seaweed, f"http-request deny if {PUT} {signed[1:]}") as proxy,
        connected(seaweed.environ(), AWS_ENDPOINT_URL_S3=proxy.endpoint),
    ):
        assert send(dump(SMALL), checksum=checksum).outcome == Outcome.UPLOADED


def test_a_server_with_another_certificate_gets_nothing(seaweed, bucket, dump, tmp_path):
    with (
        s3.haproxy(tmp_path, seaweed, tls=True) as proxy,
        connected(seaweed.environ(), AWS_ENDPOINT_URL_S3=proxy.endpoint),
    ):
        result = send(dump(SMALL))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert dump.path.exists()


def test_without_credentials_the_reason_is_credentials(bucket, dump, seaweed):
    with connected({"AWS_ENDPOINT_URL_S3": seaweed.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}):
        result = send(dump(SMALL))
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.CREDENTIALS)
    with connected(seaweed.environ()):
        assert send(dump.path).outcome == Outcome.UPLOADED


def test_profile_that_does_not_exist_is_told_and_retried(seaweed, bucket, dump):
    with connected(seaweed.environ(), AWS_PROFILE="nowhere"):
        result = send(dump(SMALL))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.CREDENTIALS)
    assert "nowhere" in result.detail


def test_credentials_renewed_in_the_environment_are_taken_up(seaweed, bucket, dump, monkeypatch):
    with connected(seaweed.environ(s3.Keys("AKADMIN", "expired"))):
        assert send(dump(SMALL)).retry_reason == RetryReason.CREDENTIALS
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.ADMIN.secret)
        assert send(dump.path).outcome == Outcome.UPLOADED


def test_a_fault_of_ours_is_a_result_and_not_an_exception(seaweed, bucket, dump, monkeypatch):
    monkeypatch.setattr("core_dump_collector.metadata.gather", lambda *_: 1 / 0)
    with connected(seaweed.environ()):
        result = send(dump(SMALL))
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.INTERNAL)
    assert dump.path.exists()

"""A request ends when it makes no progress, and only then."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import http.server
import os
import socket
import threading
import time
from unittest import mock

import pytest
from tests.support import manners, s3
from tests.support.collector import running, wait_until
from tests.support.servers import QuietServer, answering
from tests.support.slow import thin_link
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, options, send

from core_dump_collector.jobs import Job, Outcome, RetryReason
from core_dump_collector.s3 import progress, tries
from core_dump_collector.s3.flow import Flow
from core_dump_collector.upload import Worker

WINDOW = 1.0
SMALL, LARGE = 500, 3 * MEBIBYTE
"""One request from memory; one that asks first, with `Expect: 100-continue`."""


def trickle(connection, first=b""):
    """Send a byte twenty times a second."""
    connection.sendall(first)
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def read_some(connection):
    connection.recv(200_000)


def headers_by_the_byte(connection):
    read_some(connection)
    trickle(connection, b"HTTP/1.1 200 OK\r\nX-Pad: ")


def body_by_the_byte(connection):
    read_some(connection)
    trickle(connection, b'HTTP/1.1 200 OK\r\nETag: "0"\r\nConnection: close\r\n\r\n')


def interim_headers_by_the_byte(connection):
    read_some(connection)
    trickle(connection, b"HTTP/1.1 100 Continue\r\nX-Pad: ")


def handshake_by_the_byte(connection):
    read_some(connection)
    trickle(connection, b"\x16\x03\x03\x3f\xff\x02")  # a record of TLS that is 16 KiB long


def no_answer(connection):
    while connection.recv(1 << 20):
        pass


def nothing_read(connection):
    threading.Event().wait(30)


def nothing_read_after_the_go_ahead(connection):
    read_some(connection)
    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    threading.Event().wait(30)


@contextlib.contextmanager
def store(behave):
    """Run a server that treats each connection in one way; yield its port and the connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve(connection):
        with contextlib.suppress(OSError):
            behave(connection)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield listener.getsockname()[1], connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def send_to(port, path, scheme="http", complete_windows=1, **changes):
    """Send a dump; return the result and the seconds that it took."""
    with (
        connected(s3.ADMIN.environ(), AWS_ENDPOINT_URL_S3=f"{scheme}://127.0.0.1:{port}"),
        mock.patch.object(progress, "COMPLETE_WINDOWS", complete_windows),
    ):
        began = time.monotonic()
        timeouts = {"read_timeout_seconds": WINDOW, "connect_timeout_seconds": 5}
        result = send(path, conditional="true", **timeouts, **changes)
        return result, time.monotonic() - began


@pytest.mark.parametrize(
    ("behave", "size"),
    [
        (headers_by_the_byte, SMALL),
        (headers_by_the_byte, LARGE),
        (body_by_the_byte, SMALL),
        (interim_headers_by_the_byte, LARGE),
        (no_answer, SMALL),
        (nothing_read, 2 * SMALL),
        (nothing_read_after_the_go_ahead, 8 * LARGE),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_request_that_makes_no_progress_is_ended_and_says_so(watch_dir, behave, size):
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(size))
    with store(behave) as (port, connections):
        result, seconds = send_to(port, path, part_bytes=64 * MEBIBYTE)
        assert len(connections) == 1
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert "moved less than 1250 bytes in 1 s" in result.detail
    assert WINDOW <= seconds < 4 * WINDOW + 1
    assert path.exists()


def test_handshake_that_makes_no_progress_is_ended(watch_dir):
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(SMALL))
    with store(handshake_by_the_byte) as (port, _):
        result, seconds = send_to(port, path, scheme="https")
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert "moved less than" in result.detail
    assert seconds < 4 * WINDOW + 1


def test_connection_that_ends_within_the_go_ahead_is_an_error_of_the_network(watch_dir):
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(LARGE))

    def end(connection):
        read_some(connection)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n")
        connection.shutdown(socket.SHUT_RDWR)

    with store(end) as (port, _):
        result, seconds = send_to(port, path)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert seconds < WINDOW


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_uploads_over_a_thin_link_take_their_time_and_send_nothing_twice(
    seaweed, bucket, watch_dir, tmp_path, tls
):
    size, rate = 130_000, 80_000
    for number in range(2):
        content = gzip.compress(os.urandom(size))
        (watch_dir / f"core-app-170000000{number}-{number}-11.gz").write_bytes(content)
    endpoint = seaweed.tls_endpoint if tls else seaweed.endpoint
    with thin_link(endpoint, rate) as (through, link):
        variables = {"AWS_ENDPOINT_URL_S3": through.replace("http:", "https:") if tls else through}
        variables |= {"READ_TIMEOUT_SECONDS": "2", "CONNECT_TIMEOUT_SECONDS": "2", "WORKERS": "2"}
        variables |= {"SIDECAR": "false", "FINGERPRINT": "false"}
        environ = seaweed.environ(tls=tls) | variables
        began = time.monotonic()
        with running(watch_dir, environ, tmp_path) as collector:
            wait_until(lambda: len(s3.keys_in(bucket)) == 2 and not list(watch_dir.iterdir()), 40, "uploads")
            assert time.monotonic() - began > 2 * size / rate > 2
            assert not [event for event in collector.log() if event["event"] == "will try again"]
        assert link.moved_bytes < 2 * size + 40_000


def test_parts_share_the_slowest_link_that_is_allowed(watch_dir):
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(112_000))
    with manners.fake_s3(manners.Manners()) as fake, thin_link(fake.endpoint, 16_000) as (through, _):
        small = options(read_timeout_seconds=3 * WINDOW, metadata=False)
        with (
            connected(fake.environ(), AWS_ENDPOINT_URL_S3=through),
            contextlib.closing(Worker(dataclasses.replace(small, part_bytes=57_344))) as worker,
        ):
            result = worker.process(Job(str(watch_dir), NAME))
        assert result.outcome is Outcome.UPLOADED, result
        assert fake.asked("PUT", "partNumber") == 2, fake.requests
    assert (result.outcome, result.detail) == (Outcome.UPLOADED, "")


def test_store_that_does_not_know_expect_gets_the_body_at_once(seaweed, bucket, watch_dir, tmp_path):
    with s3.haproxy(tmp_path, seaweed) as proxy:
        refuse = proxy.body("417.xml", b"<Error><Code>ExpectationFailed</Code></Error>")
        rule = "http-request return status 417 content-type application/xml file {} if {{ req.hdr(expect) -m found }}"
        proxy.start(rule.format(refuse))
        with connected(seaweed.environ(), AWS_ENDPOINT_URL_S3=proxy.endpoint):
            for size in (LARGE, 11 * MEBIBYTE):
                path = watch_dir / NAME
                path.write_bytes(b"\x1f\x8b" + os.urandom(size))
                result = send(path, metadata=False)
                assert result.outcome is Outcome.UPLOADED
                assert s3.keys_in(bucket)[result.key] == size + 2
                bucket.delete_object(Bucket=s3.BUCKET, Key=KEY)


def test_request_that_hangs_is_ended_by_a_plain_timeout_where_the_kernel_counts_no_bytes(
    watch_dir, monkeypatch
):
    monkeypatch.setattr(progress, "_bytes_moved", lambda _: -1)
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(SMALL))
    with store(no_answer) as (port, _):
        result, seconds = send_to(port, path)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    assert WINDOW <= seconds < 2 * WINDOW + 1


MEGABYTES = 100


def long_body(connection):
    for _ in range(MEGABYTES):
        connection.sendall(bytes(1_000_000))


def long_chunks(connection):
    for _ in range(MEGABYTES):
        connection.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")


def many_chunks(connection):
    for _ in range(MEGABYTES):
        connection.sendall(b"1\r\n \r\n" * 160_000)


def trailers(connection):
    connection.sendall(b"1\r\n \r\n0\r\n")
    for _ in range(MEGABYTES):
        connection.sendall(b"X-Pad: 0\r\n" * 100_000)


@pytest.mark.parametrize(
    ("go_on", "size", "status"),
    [
        (long_body, SMALL, 200),
        (long_chunks, SMALL, 500),
        (long_chunks, 2 * LARGE, 200),
        (many_chunks, SMALL, 500),
        (trailers, SMALL, 500),
    ],
)
def test_response_that_does_not_end_is_not_read_to_its_end(watch_dir, go_on, size, status):
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(size))
    ended = []

    def answer(connection):
        read_some(connection)
        framing = b"Connection: close" if go_on is long_body else b"Transfer-Encoding: chunked"
        connection.sendall(b'HTTP/1.1 %d X\r\nETag: "0"\r\n%s\r\n\r\n' % (status, framing))
        go_on(connection)
        ended.append(True)

    with store(answer) as (port, _):
        result, _ = send_to(port, path)
    assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.NETWORK)
    slow_to_read = go_on is many_chunks and "moved less than" in result.detail  # on a busy machine
    assert slow_to_read or "longer than 4194304 bytes" in result.detail
    assert not ended
    assert path.exists()


class Slow(http.server.BaseHTTPRequestHandler):
    """A store that takes its time to complete multipart uploads."""

    protocol_version = "HTTP/1.1"
    completed = 0
    seconds = 0.0
    meanwhile = b" "

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"", {"ETag": '"0"', "x-amz-checksum-crc32": self.headers["x-amz-checksum-crc32"]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "uploads" in self.path:
            self.answer(
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            )
            return
        type(self).completed += 1
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b'<?xml version="1.0"?>')
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.wfile.write(self.meanwhile)
            time.sleep(0.05)
        crc32 = self.headers["x-amz-checksum-crc32"]
        result = f"<CompleteMultipartUploadResult><ETag>0</ETag><ChecksumCRC32>{crc32}</ChecksumCRC32>"
        self.wfile.write(f"{result}</CompleteMultipartUploadResult>".encode())
        assert b"<Part>" in body

    def answer(self, content, headers=()):
        self.send_response(200)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("meanwhile", "seconds", "outcome"),
    [
        (b" ", 3 * WINDOW, Outcome.UPLOADED),
        (b" ", 60, Outcome.RETRY),
        (b"", 1.5 * WINDOW, Outcome.UPLOADED),
        (b"", 60, Outcome.RETRY),
    ],
)
def test_multipart_upload_is_completed_in_the_time_that_it_takes_but_not_for_ever(
    watch_dir, monkeypatch, meanwhile, seconds, outcome
):
    monkeypatch.setattr(progress, "MOST_COMPLETE_WINDOWS", 5)
    monkeypatch.setattr(tries, "TRIES", 1)
    path = watch_dir / NAME
    path.write_bytes(b"\x1f\x8b" + os.urandom(6 * MEBIBYTE))
    handler = type("Handler", (Slow,), {"seconds": seconds, "meanwhile": meanwhile})
    server = QuietServer(("127.0.0.1", 0), handler)
    with answering(server):
        result, took = send_to(server.server_port, path, metadata=False, complete_windows=3)
    assert result.outcome is outcome
    assert took < 8 * WINDOW
    assert handler.completed == 1


def test_connection_whose_bytes_the_kernel_does_not_count_is_left_alone():
    ours, theirs = socket.socketpair()
    patience = progress.Patience(WINDOW, 1, 2 * WINDOW)
    with ours, theirs, contextlib.closing(progress._Watch(patience, Flow())) as watch:
        watch.follow(ours)
        watch.look(time.monotonic() + 1000)
        assert not watch.stalled
        theirs.sendall(b"still open")
        assert ours.recv(100) == b"still open"

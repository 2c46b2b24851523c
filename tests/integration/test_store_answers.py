"""Answers that are cut, empty or lies: a clear reason to try again, never a fault of ours and never a loop."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from tests.support import s3
from tests.support.uploads import connected, options

from core_dump_collector.s3.errors import StoreError
from core_dump_collector.s3.parts import BufferPart
from core_dump_collector.s3.verdict import Content
from core_dump_collector.upload import Worker

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
XML = OK + b"\r\n<?xml version='1.0'?>"
ANSWERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "status alone": b"HTTP/1.1 200 OK\r\n",
    "status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "status out of range": b"HTTP/1.1 99999 OK\r\n\r\n",
    "cut in a header": OK + b"Content-Le",
    "no header": b"HTTP/1.1 200\r\n\r\n",
    "length that is no number": OK + b"Content-Length: abc\r\nETag: 1\r\n\r\n",
    "length below zero": OK + b"Content-Length: -1\r\n\r\n",
    "length beyond the end": OK + b"Content-Length: 100\r\nETag: 1\r\n\r\n<Err",
    "chunks that are none": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "date that is none": OK + b"Last-Modified: never\r\nContent-Length: 1\r\n\r\n",
    "flag that is none": OK
    + b"Content-Length: 1\r\nx-amz-missing-meta: many\r\nx-amz-delete-marker: maybe\r\n\r\n",
    "no text": OK + b"\r\n\xff\xfe\x00",
    "page": OK + b"Content-Type: text/html\r\n\r\n<html><body>Log in</body></html>",
    "empty element": XML + b"<R/>",
    "other element": XML + b"<R><Parts>1</Parts><UploadId/></R>",
    "part without fields": XML + b"<R><Part/><Upload/></R>",
    "part with wrong fields": XML + b"<R><Part><PartNumber>a</PartNumber><Size>b</Size><ETag/></Part></R>",
    "part without size": XML + b"<R><Part><PartNumber>1</PartNumber><ETag>1</ETag></Part></R>",
    "list without end": XML
    + b"<R><IsTruncated>true</IsTruncated><NextPartNumberMarker>1</NextPartNumberMarker></R>",
    "marker that is none": XML
    + b"<R><IsTruncated>true</IsTruncated><NextPartNumberMarker>x</NextPartNumberMarker></R>",
    "upload with a wrong date": XML
    + b"<R><Upload><Key>k</Key><Initiated>x</Initiated><UploadId>1</UploadId></Upload></R>",
    "error that is empty": b"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n<Error/>",
    "error in a page": b"HTTP/1.1 503 Bad\r\nConnection: close\r\n\r\n<html>",
    "error in bytes": b"HTTP/1.1 403 Bad\r\nConnection: close\r\n\r\n\x00\xff",
    "redirect to nowhere": b"HTTP/1.1 301 Moved\r\nConnection: close\r\nx-amz-bucket-region: ..\r\n\r\n",
}


def part():
    return BufferPart(1, memoryview(b"x"), last=True, give_back=lambda: None)


REQUESTS = {
    "look": lambda store: store.look("k"),
    "list_parts": lambda store: store.list_parts("k", "1"),
    "find_uploads": lambda store: store.find_uploads("k"),
    "create_multipart": lambda store: store.create_multipart("k", {}),
    "put_part": lambda store: store.put_part("k", "1", part(), 0),
    "put": lambda store: store.put("k", part(), 0, {}, conditional=True),
    "put_document": lambda store: store.put_document("k", b"{}", conditional=False),
    "complete": lambda store: store.complete("k", "1", [], Content(1, 0, lambda: ""), conditional=True),
}


@pytest.fixture(scope="module")
def saying():
    """A server that gives the answer that was set last, and counts."""
    state = {"answer": b"", "requests": 0}

    def serve(connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(100_000)
            state["requests"] += 1
            connection.sendall(state["answer"])
            connection.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        with connected(
            s3.ADMIN.environ(), AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{listener.getsockname()[1]}"
        ):
            yield state
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(5)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_answer_that_is_no_answer_is_a_reason_to_try_again(saying, request_name):
    wrong = {}
    with contextlib.closing(Worker(options(read_timeout_seconds=2))) as worker:
        store = worker.open_store()
        for name, answer in ANSWERS.items():
            saying.update(answer=answer, requests=0)
            try:
                REQUESTS[request_name](store)
            except StoreError:
                pass
            except Exception as error:  # noqa: BLE001  what the worker would call internal
                wrong[name] = repr(error)
            if saying["requests"] > 20:
                wrong[name] = f"{saying['requests']} requests"
    assert wrong == {}

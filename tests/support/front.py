"""A plain HTTP proxy in front of a store, which lets a test refuse, change, cut or slow down single answers."""

from __future__ import annotations

import contextlib
import http.client
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.support.servers import QuietServer, answering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OF_THE_CONNECTION = {"connection", "content-length", "transfer-encoding", "date", "server"}
_CHUNK = 16 * 1024


@dataclass(frozen=True)
class Request:
    """A request of the client."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def first_byte(self) -> int | None:
        """The start of the requested range; None if there is none."""
        value = self.headers.get("range", "")
        return int(value.removeprefix("bytes=").split("-")[0]) if value else None


@dataclass(frozen=True)
class Reply:
    """An answer, and the way in which it is sent."""

    status: int
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)
    announced_bytes: int | None = None
    """Content-Length, if it differs from the length of the body, after which the connection is closed."""
    bytes_per_second: float | None = None


def error(status: int, code: str, message: str) -> Reply:
    """Return an error in S3's form."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, text.encode(), [("Content-Type", "application/xml")])


def cut(reply: Reply, size: int) -> Reply:
    """Return an answer that ends after some bytes of its body."""
    return replace(reply, body=reply.body[:size], announced_bytes=len(reply.body))


def _pass(_: Request) -> Reply | None:
    return None


def _keep(_: Request, reply: Reply) -> Reply:
    return reply


@dataclass(frozen=True)
class _Faults:
    endpoint: str
    before: Callable[[Request], Reply | None]
    after: Callable[[Request, Reply], Reply]

    def answer(self, request: Request) -> Reply:
        reply = self.before(request)
        return self.after(request, self._ask(request)) if reply is None else reply

    def _ask(self, request: Request) -> Reply:
        target = urlsplit(self.endpoint)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in {"connection", "transfer-encoding", "expect"}:
                    connection.putheader(name, value)
            connection.endheaders(request.body)
            answer = connection.getresponse()
            body = answer.read()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in _OF_THE_CONNECTION]
            length = answer.getheader("Content-Length")
        announced = int(length) if request.method == "HEAD" and length else None
        return Reply(answer.status, body, headers, announced)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: _Faults

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Answer every method in the same way."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.faults.answer(Request(self.command, self.path, headers, body))
        self.send_response(reply.status)
        for name, value in reply.headers:
            self.send_header(name, value)
        length = len(reply.body) if reply.announced_bytes is None else reply.announced_bytes
        self.send_header("Content-Length", str(length))
        self.end_headers()
        for at in range(0, len(reply.body), _CHUNK):
            self.wfile.write(reply.body[at : at + _CHUNK])
            if reply.bytes_per_second is not None:
                time.sleep(_CHUNK / reply.bytes_per_second)
        self.close_connection = self.command != "HEAD" and length != len(reply.body)

    def log_message(self, *_: object) -> None:
        """Keep the output of tests clean."""


@contextlib.contextmanager
def front(
    endpoint: str,
    before: Callable[[Request], Reply | None] = _pass,
    after: Callable[[Request, Reply], Reply] = _keep,
) -> Iterator[str]:
    """Yield an endpoint. `before` may answer instead of the store; `after` may change the store's answer."""
    handler = type("Handler", (_Handler,), {"faults": _Faults(endpoint, before, after)})
    server = QuietServer(("127.0.0.1", 0), handler)
    with answering(server):
        yield f"http://127.0.0.1:{server.server_port}"

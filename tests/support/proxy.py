"""An HTTP proxy (CONNECT) that alone knows where a host is, and may ask for a password."""

from __future__ import annotations

import contextlib
import selectors
import socket
from base64 import b64encode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from tests.support.servers import QuietServer, answering

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass
class Proxy:
    """A running proxy."""

    hosts: Mapping[str, int]
    """The port on loopback of each host that it knows."""
    password: str = ""
    """`USER:PASSWORD` that it asks for."""
    port: int = 0
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.proxy.asked.append(self.path)
        wanted = f"Basic {b64encode(self.proxy.password.encode()).decode()}"
        if self.proxy.password and self.headers.get("Proxy-Authorization") != wanted:
            self.send_error(407)
            return
        port = self.proxy.hosts.get(self.path)
        if port is None:
            self.send_error(502)
            return
        with socket.create_connection(("127.0.0.1", port)) as there:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            self.pump(there)
        self.close_connection = True

    def pump(self, there: socket.socket) -> None:
        """Pass bytes on, both ways, until one side ends."""
        with selectors.DefaultSelector() as selector:  # select(2) takes no descriptor above 1,023
            for ends in ((self.connection, there), (there, self.connection)):
                selector.register(ends[0], selectors.EVENT_READ, ends)
            while True:
                for ready, _ in selector.select():
                    one, other = ready.data
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    other.sendall(data)


@contextlib.contextmanager
def proxy(hosts: Mapping[str, int], password: str = "") -> Iterator[Proxy]:
    """Run a proxy that knows these hosts (`name:port`)."""
    found = Proxy(hosts, password)
    server = QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": found}))
    found.port = server.server_address[1]
    with answering(server):
        yield found

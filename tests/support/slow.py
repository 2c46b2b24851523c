"""A throttled TCP proxy on loopback, so that an upload can be caught half-way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 64 * 1024


def _pump(source: socket.socket, target: socket.socket, bytes_per_second: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
            time.sleep(len(data) / bytes_per_second)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slow_proxy(endpoint: str, bytes_per_second: float = 8e6) -> Iterator[str]:
    """Yield an endpoint whose every connection is passed on at no more than this rate."""
    target = urlsplit(endpoint)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((target.hostname, target.port), timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            sockets.extend((client, server))
            for ends in ((client, server), (server, client)):
                thread = threading.Thread(target=_pump, args=(*ends, bytes_per_second), daemon=True)
                thread.start()
                threads.append(thread)

    acceptor = threading.Thread(target=serve, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in [acceptor, *threads]:
            thread.join(5)
        for end in sockets:
            end.close()

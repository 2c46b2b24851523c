"""Slow things on loopback: a proxy to catch an upload half-way, a thin uplink, a server that trickles."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pump = Callable[[socket.socket, socket.socket], None]

CHUNK = 64 * 1024


def _pump(source: socket.socket, target: socket.socket, bytes_per_second: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
            time.sleep(len(data) / bytes_per_second)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class ThinLink:
    """An uplink that all connections share, behind which the kernel's buffers are small."""

    RECEIVE_BYTES = 8192

    def __init__(self, bytes_per_second: float) -> None:
        self.moved_bytes = 0
        self._bytes_per_second = bytes_per_second
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what a client sends."""
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                with self._lock:
                    self.moved_bytes += len(data)
                    self._free_at = max(self._free_at, time.monotonic()) + len(data) / self._bytes_per_second
                    pause = self._free_at - time.monotonic()
                time.sleep(max(0.0, pause))
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def thin_link(endpoint: str, bytes_per_second: float) -> Iterator[tuple[str, ThinLink]]:
    """Yield an endpoint behind a thin uplink, and the link; answers come back at full speed."""
    link = ThinLink(bytes_per_second)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ThinLink.RECEIVE_BYTES)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    with _proxy(listener, endpoint, link.pump, partial(_pump, bytes_per_second=1e9)) as found:
        yield found, link


@contextlib.contextmanager
def slow_proxy(endpoint: str, bytes_per_second: float = 8e6) -> Iterator[str]:
    """Yield an endpoint whose every connection is passed on at no more than this rate."""
    pump = partial(_pump, bytes_per_second=bytes_per_second)
    with _proxy(socket.create_server(("127.0.0.1", 0), backlog=64), endpoint, pump, pump) as found:
        yield found


@contextlib.contextmanager
def trickling_server() -> Iterator[int]:
    """Yield the port of a server whose responses never end: a byte of a header, ten times a second."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def trickle(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(5)
            client.recv(CHUNK)
            client.sendall(b"HTTP/1.1 200 OK\r\nX-Pad: ")
            while not ended.wait(0.1):
                client.sendall(b"a")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threads.append(threading.Thread(target=trickle, args=(client,), daemon=True))
                threads[-1].start()

    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    acceptor = threading.Thread(target=serve, daemon=True)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [acceptor, *threads]:
            thread.join(5)


@contextlib.contextmanager
def _proxy(listener: socket.socket, endpoint: str, there: Pump, back: Pump) -> Iterator[str]:
    target = urlsplit(endpoint)
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
            for pump, ends in ((there, (client, server)), (back, (server, client))):
                thread = threading.Thread(target=pump, args=ends, daemon=True)
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

"""HTTP servers of tests, each in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from socketserver import BaseServer


class QuietServer(ThreadingHTTPServer):
    """Ignores clients that go away: some tests are about them."""

    def handle_error(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def answering(server: BaseServer) -> Iterator[None]:
    """Let a server answer requests until the block ends; then close it."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()

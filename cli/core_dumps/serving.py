"""Owns serving files by build ID on loopback, as debuginfod(8) does, and running a debugger that needs this."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from core_dumps import backtrace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dumps.debugger import Session

    Find = Callable[[str, str], str | None]
    """Returns the path of a file, by build ID and kind."""

EXECUTABLE = "executable"
MOST_CLIENTS = 16
"""Connections that are served at a time; others wait."""
IDLE_SECONDS = 30
_PATH = re.compile(r"/buildid/([0-9a-f]{8,128})/(executable|debuginfo)")


class _Handler(BaseHTTPRequestHandler):
    """Answers /TOKEN/buildid/ID/KIND, and nothing else."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    token: str
    find: Find

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        """Send the length of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Send a file."""
        with contextlib.ExitStack() as stack:
            place = self._place()
            try:
                file = stack.enter_context(open(place, "rb")) if place else None
            except OSError:
                file = None
            size = str(os.fstat(file.fileno()).st_size if file else 0)
            self.send_response(200 if file else 404)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", size)
            self.send_header("X-DEBUGINFOD-SIZE", size)
            self.end_headers()
            if file and self.command == "GET":
                shutil.copyfileobj(file, self.wfile)

    def _place(self) -> str | None:
        if not self.path.startswith(f"/{self.token}/"):
            return None
        asked = _PATH.fullmatch(self.path, len(self.token) + 1)
        return type(self).find(*asked.groups()) if asked else None


class _Server(ThreadingHTTPServer):
    """A server with a bounded number of threads; they do not delay the end of the program."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[_Handler]) -> None:
        self._free = threading.BoundedSemaphore(MOST_CLIENTS)
        self.is_ending = False
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  socketserver's types
        while not self._free.acquire(timeout=0.1):
            if self.is_ending:
                self.shutdown_request(request)
                return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  likewise
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  likewise
        """Ignore a client that went away."""


@contextlib.contextmanager
def served(find: Find) -> Iterator[str]:
    """Serve files to the programs of this machine that know the address, and yield it."""
    token = secrets.token_hex(16)  # other users of this machine, and pages in a browser, cannot guess it
    handler = type("Handler", (_Handler,), {"find": staticmethod(find), "token": token})
    with _Server(handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{token}"
        finally:
            server.is_ending = True
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _environ(session: Session) -> Iterator[dict[str, str] | None]:
    """Yield the environment of a debugger; None for this program's own."""
    if "eu-stack" not in os.path.basename(session.program):
        yield None
        return
    files = {m.build_id: m.found for m in session.modules.every if m.build_id is not None}
    with served(lambda build_id, kind: files.get(build_id) if kind == EXECUTABLE else None) as address:
        cache = os.path.join(session.tree.path, "cache")
        yield {**os.environ, "DEBUGINFOD_URLS": address, "DEBUGINFOD_CACHE_PATH": cache}


def run(session: Session, arguments: str) -> int:
    """Run a debugger on this terminal and return its exit status."""
    with _environ(session) as environ:
        return backtrace.run(session.command(arguments, batch=False), environ)


def trace(session: Session, arguments: str, output: backtrace.Backtrace) -> int:
    """Let a debugger print backtraces and return its exit status."""
    with _environ(session) as environ:
        return output.run(session.command(arguments, batch=True), environ)

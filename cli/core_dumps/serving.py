"""Owns running a debugger on a session, with a debuginfod server on loopback for those that need one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from core_dumps import debugger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from core_dumps.debugger import Backtrace, Session


class _Handler(BaseHTTPRequestHandler):
    """Answers /buildid/ID/executable as debuginfod(8) does, and nothing else."""

    protocol_version = "HTTP/1.1"
    files: Mapping[str, str]

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Send a file."""
        place = self.files.get(self.path)
        try:
            file = open(place, "rb") if place else None  # noqa: SIM115  closed below
        except OSError:
            file = None
        self.send_response(200 if file else 404)
        self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size if file else 0))
        self.end_headers()
        if file:
            with file:
                shutil.copyfileobj(file, self.wfile)


@contextlib.contextmanager
def served(session: Session) -> Iterator[str]:
    """Serve the files of a session by build ID, to this machine alone, and yield the address."""
    token = secrets.token_hex(16)  # other users of this machine cannot guess it
    files = {
        f"/{token}/buildid/{module.build_id}/executable": module.found
        for module in session.modules.every
        if module.found is not None and module.build_id is not None
    }
    handler = type("Handler", (_Handler,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{token}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _environ(session: Session) -> Iterator[dict[str, str] | None]:
    """Yield the environment of a debugger; None for this program's own."""
    if "eu-stack" not in os.path.basename(session.program):
        yield None
        return
    with served(session) as address:
        cache = os.path.join(session.tree.path, "cache")
        yield {**os.environ, "DEBUGINFOD_URLS": address, "DEBUGINFOD_CACHE_PATH": cache}


def run(session: Session, arguments: str) -> int:
    """Run a debugger on this terminal and return its exit status."""
    with _environ(session) as environ:
        return debugger.run(session.command(arguments, batch=False), environ)


def trace(session: Session, arguments: str, backtrace: Backtrace) -> int:
    """Let a debugger print backtraces and return its exit status."""
    with _environ(session) as environ:
        return backtrace.run(session.command(arguments, batch=True), environ)

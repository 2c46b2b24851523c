"""Owns the HTTP server for /livez, /readyz, /metrics and the page at `/`, and the state that they show.

Many idle or slow connections do not keep a scrape out: each wait for one has a deadline, and when too many are open
the oldest is closed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client.exposition import choose_encoder

from core_dump_collector import landing
from core_dump_collector.errors import ConfigError
from core_dump_collector.startupfile import StartupFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import CollectorRegistry

    from core_dump_collector.config import Settings
    from core_dump_collector.observation import Observer

HEARTBEAT_SECONDS = 5.0
STALLED_SECONDS = 60.0
"""Without a heartbeat for this long /livez fails."""
DEAD = "dead: the loop or its jobs stand still"
_REQUEST_SECONDS = 5
_MOST_CONNECTIONS = 256
_EVERY_ADDRESS, _EVERY_IPV4_ADDRESS = "::", "0.0.0.0"  # noqa: S104  Prometheus scrapes from another host


class Health:
    """The daemon's state as others see it; written by its loop, read by other threads."""

    def __init__(self, startup_file: str | None, observer: Observer) -> None:
        """Write the start-up file, if there is one.

        Raises:
            ConfigError: it cannot be written.
        """
        self._beat = time.monotonic()
        self.is_collecting = False
        self.obstacle = "starting"
        """Why the daemon is not ready; empty if it is."""
        self._stuck = False
        self.overview = landing.Overview()
        """For the page at `/`."""
        self._startup_file: StartupFile | None = None
        if startup_file is not None:
            self._startup_file = StartupFile(startup_file, HEARTBEAT_SECONDS, self._turns, observer)

    def beat(self, *, stuck: bool = False) -> None:
        """Note that the loop turns, and whether its jobs stay out long after their deadlines."""
        self._beat = time.monotonic()
        self._stuck = stuck

    def _turns(self) -> bool:
        return time.monotonic() - self._beat < 2 * HEARTBEAT_SECONDS

    def set_state(self, *, collecting: bool, obstacle: str = "") -> None:
        """Say whether the directory is being collected, and what keeps dumps from the bucket, if anything does."""
        self.is_collecting = collecting
        self.obstacle = obstacle
        if collecting and self._startup_file is not None:
            self._startup_file.set("ready")

    def end(self) -> None:
        """Write the word `dead`."""
        self.is_collecting = False
        self.obstacle = "stopped"
        if self._startup_file is not None:
            self._startup_file.end()

    @property
    def is_live(self) -> bool:
        """Tell whether the loop turns and its jobs return; a store that cannot be reached is a result as well."""
        return time.monotonic() - self._beat < STALLED_SECONDS and not self._stuck

    @property
    def why_not_ready(self) -> str:
        """Return what keeps dumps from the bucket, as far as known; empty if nothing does."""
        if not self.is_live:
            return DEAD
        return f"not ready: {self.obstacle}" if self.obstacle else ""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _REQUEST_SECONDS
    server_version = "core-dump-collector"
    sys_version = ""

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer the four paths."""
        match self.path.partition("?")[0]:
            case "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(self.server.registry), content_type)
            case "/livez":
                self._answer_health("" if self.server.health.is_live else DEAD)
            case "/readyz":
                self._answer_health(self.server.health.why_not_ready)
            case "/":
                health = self.server.health
                page = landing.render(health.overview, health.why_not_ready)
                self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8", landing.HEADERS)
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"/metrics /livez /readyz\n", "text/plain")

    def _answer_health(self, trouble: str) -> None:
        if trouble:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, trouble.encode() + b"\n", "text/plain")
        else:
            self._answer(HTTPStatus.OK, b"ok\n", "text/plain")

    def _answer(
        self, status: HTTPStatus, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Log nothing: requests of strangers do not belong in the log."""


class Server(ThreadingHTTPServer):
    """Serves /metrics, /livez, /readyz and `/` until it is stopped."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, settings: Settings, health: Health, registry: CollectorRegistry) -> None:
        """Bind and serve in a thread.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self.health = health
        self.registry = registry
        self._open: OrderedDict[socket.socket, float] = OrderedDict()
        self._lock = threading.Lock()
        address = settings.metrics_address
        if address == _EVERY_ADDRESS and not socket.has_dualstack_ipv6():
            address = _EVERY_IPV4_ADDRESS
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            super().__init__((address, settings.metrics_port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"METRICS_PORT={settings.metrics_port} on METRICS_ADDRESS={address}: {error}; "
                "takes a free port (0 takes any) and an address of this host"
            ) from None
        self._thread = threading.Thread(target=self.serve_forever, args=(0.5,), daemon=True, name="http")
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port that is bound."""
        return int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind; `::` accepts IPv4 as well, whatever net.ipv6.bindv6only says (ipv6(7))."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != _EVERY_ADDRESS
            )
        super().server_bind()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        """Serve in a thread; close the oldest connection if too many are open."""
        request.settimeout(_REQUEST_SECONDS)
        with self._lock:
            self._open[request] = time.monotonic()
            while len(self._open) > _MOST_CONNECTIONS:
                oldest, _ = self._open.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Forget a connection and close it."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing: a broken request is the client's problem."""

    def stop(self) -> None:
        """Stop serving and free the port."""
        self.shutdown()
        self._thread.join()
        self.server_close()

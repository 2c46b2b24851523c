"""Owns the end of a request that makes no progress; one that does lives as long as it needs.

A timeout for each read and write cannot tell a thin uplink from a store that hangs. The kernel takes megabytes into its
send buffer and needs minutes to send them, during which no answer can come. And no such timeout ends a store that sends
a byte a second. So a connected socket has no timeout here. Instead a thread reads the kernel's counters of every
connection in use, and shuts down one that moved too few bytes over the window: sent and acknowledged, or received.

CompleteMultipartUpload is the exception: S3 may work on it for minutes, silent or sending white space (Amazon S3 API
Reference, "CompleteMultipartUpload"). It has a longer window, in which one byte suffices, and an end of its own.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.exceptions import BotoCoreError, ConnectTimeoutError, ReadTimeoutError

from core_dump_collector.s3.response import bound_body

if TYPE_CHECKING:
    from collections.abc import Iterator

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse
    from botocore.httpsession import URLLib3Session
    from mypy_boto3_s3 import S3Client

    from core_dump_collector.s3.flow import Flow

COMPLETE_WINDOWS = 10
"""Longest silence of a store that completes a multipart upload, in windows."""
MOST_COMPLETE_WINDOWS = 60
"""Longest time for that, even if the store sends a byte now and then."""
_SAMPLES = 12
"""How often the counters are compared in a window; a request is ended at most one such interval late."""
_LOOK_SECONDS = 0.2
"""How often the counters are read while requests are under way."""
_COUNTERS = struct.Struct("=QQ")
_COUNTERS_OFFSET = 120
"""tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h, since Linux 4.1)."""
_EXPECTATION_FAILED = 417
_THROTTLED = frozenset({429, 503})
_LONGEST_HEADER_BYTES = 65_536
_MOST_INTERIM_HEADERS = 100


class StalledError(ReadTimeoutError):
    """A request moved too few bytes."""

    fmt = "moved less than {least_bytes} bytes in {seconds:g} s: {endpoint_url}"


@dataclass(frozen=True, slots=True)
class Patience:
    """When a request is given up."""

    window_seconds: float
    least_bytes: int
    """It has to move this many bytes in each window."""
    most_seconds: float = math.inf

    def error(self, request: AWSPreparedRequest) -> StalledError:
        """Return the error of a request that was given up."""
        return StalledError(
            least_bytes=self.least_bytes, seconds=self.window_seconds, endpoint_url=request.url
        )


class _Watch:
    """A request under way. The monitor's lock guards it."""

    def __init__(self, patience: Patience, flow: Flow) -> None:
        self.patience = patience
        self.stalled = False
        self.place = flow.place
        self._flow = flow
        self._socket: socket.socket | None = None
        self._began = time.monotonic()
        self._counted = 0
        self._samples: deque[tuple[float, int]] = deque()

    def follow(self, sock: socket.socket) -> None:
        """Watch a connection. The descriptor is the watch's own: another that gets the number is never shut down."""
        if self._socket is None:
            self._socket = socket.fromfd(sock.fileno(), sock.family, sock.type, sock.proto)
            self._counted = _bytes_moved(self._socket)
            self._samples.append((time.monotonic(), self._counted))

    def look(self, now: float) -> None:
        """Count what was moved; shut the connection down if that was too little over the window."""
        self._flow.beat(self.place)  # a request that waits has an end of its own
        if self._socket is None or self.stalled:
            return
        moved, start = self._count(self._socket), now - self.patience.window_seconds
        if now - self._samples[-1][0] < self.patience.window_seconds / _SAMPLES:
            return
        self._samples.append((now, moved))
        while len(self._samples) > 1 and self._samples[1][0] <= start:
            self._samples.popleft()
        began, before = self._samples[0]
        too_few = began <= start and moved - before < self.patience.least_bytes * self._flow.share
        if moved >= 0 and (too_few or now - self._began > self.patience.most_seconds):
            self.stalled = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _count(self, sock: socket.socket) -> int:
        moved = _bytes_moved(sock)
        self._flow.note_moved(max(0, moved - self._counted))
        self._counted = max(moved, self._counted)
        return moved

    def close(self) -> None:
        """Count the rest, and close the watch's descriptor."""
        if self._socket is not None:
            self._count(self._socket)
            self._socket.close()


def _bytes_moved(sock: socket.socket) -> int:
    """Return the bytes that the peer has acknowledged or sent; -1 where the kernel does not count them."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTERS_OFFSET + _COUNTERS.size)
        return sum(_COUNTERS.unpack_from(info, _COUNTERS_OFFSET))
    except (OSError, struct.error):
        return -1


_CURRENT: ContextVar[tuple[ProgressMonitor, _Watch] | None] = ContextVar("request", default=None)


class ProgressMonitor:
    """Watches the requests of one client."""

    def __init__(self, window_seconds: float, flow: Flow) -> None:
        """Start the thread."""
        self.window_seconds = window_seconds
        self.flow = flow
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._closed = False
        self._wanted = threading.Event()
        """A request is under way, or the thread is to end."""
        threading.Thread(target=self._run, daemon=True, name="progress").start()

    @contextlib.contextmanager
    def watch(self, patience: Patience) -> Iterator[_Watch]:
        """Watch the connection that this thread uses next."""
        watch = _Watch(patience, self.flow)
        with self._lock:
            self._watches.add(watch)
        self._wanted.set()
        token = _CURRENT.set((self, watch))
        try:
            yield watch
        finally:
            _CURRENT.reset(token)
            with self._lock:
                self._watches.discard(watch)
                watch.close()

    def follow(self, watch: _Watch, sock: socket.socket) -> None:
        """Let a watch follow a connection."""
        with self._lock:
            watch.follow(sock)

    def close(self) -> None:
        """End the thread."""
        with self._lock:  # or the thread could forget that it is wanted
            self._closed = True
            self._wanted.set()

    def _run(self) -> None:
        pause = min(_LOOK_SECONDS, self.window_seconds / _SAMPLES)
        while self._wanted.wait() and not self._closed:
            time.sleep(pause)
            now = time.monotonic()
            with self._lock:
                for watch in self._watches:
                    watch.look(now)
                if not self._watches and not self._closed:
                    self._wanted.clear()


class _WatchedConnection:
    """A mix-in: a connection that is watched from its first packet on, and has no timeout once it is made.

    Where the kernel does not count bytes it has one, as long as the window: that is all that can be done there.
    """

    sock: Any
    timeout: Any
    _quiet_seconds: float | None = None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        _follow(sock)
        return sock

    def connect(self) -> None:
        """Connect, within the timeout for that."""
        super().connect()  # type: ignore[misc]
        current = _CURRENT.get()
        if current is not None and _bytes_moved(self.sock) < 0:
            self._quiet_seconds = current[0].window_seconds
        self.sock.settimeout(self._quiet_seconds)

    def request(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as the base class's
        """Send a request."""
        if self.sock is not None:
            _follow(self.sock)
            self.timeout = self._quiet_seconds  # urllib3 gives it to the socket
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def send(self, data: Any) -> None:  # noqa: ANN401  as the base class's
        """Send bytes at the pace that is allowed."""
        current = _CURRENT.get()
        is_bytes = isinstance(data, bytes | bytearray | memoryview)
        pieces = current[0].flow.slices(data) if current is not None and is_bytes else [data]
        for piece in pieces:
            super().send(piece)  # type: ignore[misc]

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as the base class's
        """Read the status and the headers; bound what follows."""
        self.timeout = self._quiet_seconds
        response = super().getresponse(*args, **kwargs)  # type: ignore[misc]
        bound_body(response)
        return response

    def _consume_headers(self, file: Any) -> None:  # noqa: ANN401  a raw file
        """Skip the headers of a `100 Continue`; botocore would never stop reading from a connection that has ended."""
        for _ in range(_MOST_INTERIM_HEADERS):
            if file.readline(_LONGEST_HEADER_BYTES) in {b"\r\n", b"\n", b""}:
                return
        raise ConnectionError("the store sends headers without end")


def _follow(sock: socket.socket) -> None:
    current = _CURRENT.get()
    if current is not None:
        monitor, watch = current
        monitor.follow(watch, sock)


class _Connection(_WatchedConnection, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _TLSConnection(_WatchedConnection, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class ProgressSession:
    """Sends requests as botocore's session does, and ends those that make no progress."""

    def __init__(
        self, session: URLLib3Session, window_seconds: float, bytes_per_second: float, flow: Flow
    ) -> None:
        """Take over a session that has made no connection yet; its read timeout has to be None."""
        pools = session._pool_classes_by_scheme  # type: ignore[attr-defined]  # noqa: SLF001  shared with its proxies' pools
        pools.update(http=_Pool, https=_TLSPool)
        self._session = session
        self._flow = flow
        self._monitor = ProgressMonitor(window_seconds, flow)
        self._patience = Patience(window_seconds, math.ceil(window_seconds * bytes_per_second))
        self._asks_first = True

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        """Send a request; once more, with its body at once, if the store does not know `Expect: 100-continue`.

        Raises:
            StalledError: it made no progress.
            BotoCoreError: as from botocore's session.
        """
        if not self._asks_first:
            _forget_expect(request)
        answer = self._send(request)
        if answer.status_code == _EXPECTATION_FAILED and _forget_expect(request):
            self._asks_first = False
            request.reset_stream()
            answer = self._send(request)
        return answer

    def _send(self, request: AWSPreparedRequest) -> AWSResponse:
        setback = False
        with self._flow.permit(), self._monitor.watch(self._patience_with(request)) as watch:
            try:
                answer = self._session.send(request)
                if watch.stalled:  # the answer may have been cut off
                    raise watch.patience.error(request)
                setback = answer.status_code in _THROTTLED
            except BotoCoreError as error:
                setback = watch.stalled or isinstance(error, ConnectTimeoutError)
                if watch.stalled and not isinstance(error, StalledError):
                    raise watch.patience.error(request) from error
                raise
            finally:
                self._flow.note_request(setback=setback)
            return answer

    def _patience_with(self, request: AWSPreparedRequest) -> Patience:
        if request.method == "POST" and "uploadId=" in str(request.url):
            seconds = self._monitor.window_seconds
            return Patience(COMPLETE_WINDOWS * seconds, 1, MOST_COMPLETE_WINDOWS * seconds)
        return self._patience

    def close(self) -> None:
        """Close the connections."""
        self._monitor.close()
        self._session.close()


def _forget_expect(request: AWSPreparedRequest) -> bool:
    """Remove the header, which no signature covers; tell whether it was there."""
    found = "Expect" in request.headers
    if found:
        del request.headers["Expect"]
    return found


def end_stalled_requests(
    client: S3Client, window_seconds: float, bytes_per_second: float, flow: Flow
) -> None:
    """Make a client end each request that moves less than this over the window, and send as the flow allows."""
    endpoint = client._endpoint  # type: ignore[attr-defined]  # noqa: SLF001  botocore has no way in
    endpoint.http_session = ProgressSession(endpoint.http_session, window_seconds, bytes_per_second, flow)

"""A wide-area link in user space: `python -m bench.link LISTEN TARGET RTT_SECONDS BYTES_PER_SECOND [shared]`.

Each connection waits half a round trip in each direction, a whole one when it is made, and moves at most so many bytes
a second upstream; with `shared`, all connections together do. Receive buffers are small, so that the client's kernel
counts bytes as acknowledged when the link has taken them, as on a real link. `tc netem` needs a kernel module that is
missing on many machines. At its end it prints the bytes that clients have sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys

BLOCK_BYTES = 64 * 1024
RECEIVE_BYTES = 64 * 1024
BURST_SECONDS = 0.01
"""A sender may be ahead of its rate by so much: timers are no finer."""

Piece = tuple[float, bytes]


class Link:
    """The link's properties, and a count of the bytes that have passed."""

    def __init__(self, target: int, rtt_seconds: float, bytes_per_second: float, *, shared: bool) -> None:
        """Describe the link."""
        self._target = target
        self._delay = rtt_seconds / 2
        self._rate = bytes_per_second
        self._shared_pace = Pace(bytes_per_second) if shared else None
        self.moved_bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        await asyncio.sleep(2 * self._delay)
        with contextlib.suppress(OSError), contextlib.closing(writer):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with contextlib.closing(there_writer):
                pace = self._shared_pace or Pace(self._rate)
                up = self._carry(reader, there_writer, pace)
                await asyncio.gather(up, self._carry(there_reader, writer, None), return_exceptions=True)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pace: Pace | None
    ) -> None:
        clock = asyncio.get_running_loop().time
        under_way: asyncio.Queue[Piece] = asyncio.Queue()
        delivery = asyncio.create_task(_deliver(under_way, writer))
        data = b"first"
        while data and not delivery.done():
            data = b""
            with contextlib.suppress(OSError):
                data = await reader.read(BLOCK_BYTES)
            if pace is not None:
                self.moved_bytes += len(data)
                await asyncio.sleep(pace.take(len(data), clock()))
            under_way.put_nowait((clock() + self._delay, data))
        await delivery


class Pace:
    """A rate, and when it is free again."""

    def __init__(self, bytes_per_second: float) -> None:
        """Start free."""
        self._rate = bytes_per_second
        self._free_at = 0.0

    def take(self, size: int, now: float) -> float:
        """Return how long to wait before so many bytes have passed."""
        self._free_at = max(self._free_at, now - BURST_SECONDS) + size / self._rate
        return max(0.0, self._free_at - now)


async def _deliver(under_way: asyncio.Queue[Piece], writer: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    with contextlib.suppress(OSError):
        while True:
            at, data = await under_way.get()
            if (pause := at - clock()) > 0:
                await asyncio.sleep(pause)
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


async def _main(listen: int, link: Link) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    listener.bind(("127.0.0.1", listen))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await asyncio.start_server(link.serve, sock=listener, backlog=1024, limit=BLOCK_BYTES)
    await stopped.wait()
    print(link.moved_bytes, flush=True)


if __name__ == "__main__":
    _listen, _target, _rtt, _rate, *_shared = sys.argv[1:]
    asyncio.run(_main(int(_listen), Link(int(_target), float(_rtt), float(_rate), shared=bool(_shared))))

"""An S3 server of keys that are computed and not stored: a bucket of 100,000 dumps is there at once.

It answers ListObjectsV2 as S3 does (1,000 rows a page, prefix, delimiter, start-after, continuation tokens),
HeadObject and GetObject, over real HTTP/1.1 connections that are kept open. It checks no signature.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.servers import answering

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 1000
DUMP = b"x" * 64
APPS = 7


def fleet(
    count: int, nodes: int, template: str, days: float = 30, end: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what the sidecars of so many crashes say, oldest first, spread evenly over nodes and days."""
    start = (time.time() if end is None else end) - days * 86400
    for number in range(count):
        at = int(start + number * days * 86400 / count)
        node, app = f"node-{number % nodes:03d}", f"app{number % APPS}"
        date = time.strftime("%Y-%m-%d", time.gmtime(at))
        key = template.format(node=node, date=date, name=f"core-{app}-{at}-{1000 + number}-11.gz")
        told = {"schema": 1, "key": key, "node": node, "pid": 1000 + number, "uid": 1000, "signal": 11}
        told |= {
            "timestamp": at,
            "comm": app,
            "exe": f"/usr/bin/{app}",
            "state": "complete",
            "sensitive": False,
        }
        told |= {"namespace": f"space{number % 5}", "pod": f"{app}-{number % 50}", "size_bytes": len(DUMP)}
        yield told | {"fingerprint": f"{number % 40:016x}", "frames": f"{app}+0x{number % 40:x}"}


@dataclass
class KeySpace:
    """The objects of a bucket, in the order of their keys."""

    bodies: dict[str, bytes]
    latency_seconds: float = 0.0
    """Waited before each answer, as a store far away would."""
    requests: Counter[str] = field(default_factory=Counter)
    held: str | None = None
    """Listings of this prefix are not answered before `release`."""
    release: threading.Event = field(default_factory=threading.Event)
    oddity: str = ""
    """Put into each page, such as a comment."""

    def __post_init__(self) -> None:
        """Sort the keys and render each row once."""
        self.keys = sorted(self.bodies)
        self._rows = [self._row(key, len(self.bodies[key])) for key in self.keys]

    @staticmethod
    def _row(key: str, size: int) -> str:
        return (
            f"<Contents><Key>{escape(quote(key))}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>{size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )

    def page(self, query: dict[str, str]) -> bytes:
        """Return the XML of one page of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        token = query.get("continuation-token", "")
        after = base64.urlsafe_b64decode(token).decode() if token else query.get("start-after", "")
        at = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, after))
        rows: list[str] = []
        last = after
        while at < len(self.keys) and self.keys[at].startswith(prefix) and len(rows) < most:
            key = self.keys[at]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                rows.append(self._rows[at])
                last, at = key, at + 1
                continue
            common = key[: cut + 1]
            if not (token and after.startswith(common)):
                rows.append(f"<CommonPrefixes><Prefix>{escape(quote(common))}</Prefix></CommonPrefixes>")
            last = common + "\U0010ffff"
            at = bisect.bisect_left(self.keys, last)
        more = at < len(self.keys) and self.keys[at].startswith(prefix)
        following = (
            f"<NextContinuationToken>{base64.urlsafe_b64encode(last.encode()).decode()}</NextContinuationToken>"
            if more
            else ""
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>dumps</Name>'
            f"<Prefix>{escape(quote(prefix))}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(more).lower()}</IsTruncated>{following}"
            f"{''.join(rows)}{self.oddity}</ListBucketResult>"
        ).encode()


def key_space(count: int, nodes: int, template: str, **options: float) -> KeySpace:
    """Return a bucket with a pair of dump and sidecar for each crash."""
    bodies: dict[str, bytes] = {}
    for told in fleet(count, nodes, template, **options):
        bodies[told["key"]] = DUMP
        bodies[told["key"] + ".json"] = json.dumps(told).encode()
    return KeySpace(bodies)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one segment for head and body
    space: KeySpace
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List or get."""
        address = urlsplit(self.path)
        _, _, key = unquote(address.path)[1:].partition("/")
        name = "GetObject" if key else "ListObjectsV2"
        if self.command == "HEAD":
            name = "HeadObject"
        with self.lock:
            self.space.requests[name] += 1
        if self.space.latency_seconds:
            time.sleep(self.space.latency_seconds)
        if not key:
            query = {k: v[0] for k, v in parse_qs(address.query, keep_blank_values=True).items()}
            if self.space.held is not None and query.get("prefix", "").startswith(self.space.held):
                self.space.release.wait()
            return self._answer(200, self.space.page(query))
        body = self.space.bodies.get(key)
        if body is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
        return self._answer(200, body)

    do_HEAD = do_GET  # noqa: N815  the name that http.server looks for

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"d41d8cd98f00b204e9800998ecf8427e"')
        self.send_header("Last-Modified", f"{datetime(2026, 1, 2, tzinfo=UTC):%a, %d %b %Y %H:%M:%S} GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


@contextlib.contextmanager
def serving(space: KeySpace) -> Iterator[str]:
    """Serve a key space on loopback and yield its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"space": space}))
    with answering(server):
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            space.release.set()


def main() -> None:
    """Serve until standard input ends; print the endpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--template", default="{node}/{name}")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    asked = parser.parse_args()
    space = key_space(asked.count, asked.nodes, asked.template)
    space.latency_seconds = asked.latency
    with serving(space) as endpoint:
        print(endpoint, flush=True)  # noqa: T201  for who started it
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input()


if __name__ == "__main__":
    main()

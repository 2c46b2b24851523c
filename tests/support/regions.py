"""Amazon S3 as clients see it across regions: TLS, one host name for each region, a bucket that is in one of them.

Requests for the bucket that reach another region are answered with 301, requests signed for another region with 400, as
S3 does. All others are signed again and passed on to a real store. Nothing of the product is imported.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import random
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.httpsession import URLLib3Session
from tests.support.s3 import ADMIN, BUCKET, make_certificate
from tests.support.servers import QuietServer, answering

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.s3 import S3Server

_HOST = re.compile(rf"{BUCKET}\.s3(?:\.([a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?")
_SCOPE = re.compile(r"Credential=[^/]+/\d{8}/([a-z0-9-]+)/s3/aws4_request")
_OF_ONE_CONNECTION = {"host", "authorization", "connection", "expect", "x-amz-date", "x-amz-content-sha256"}


def host(region: str | None) -> str:
    """Return the bucket's host name in a region; None is the one without a region."""
    if region is None:
        return f"{BUCKET}.s3.amazonaws.com"
    return f"{BUCKET}.s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")


@dataclass(frozen=True)
class Seen:
    """A request: the region whose host got it, the region that signed it, and the status of the answer."""

    method: str
    path: str
    host_region: str
    signed_region: str
    status: int
    body_bytes: int


@dataclass
class Regions:
    """The running server."""

    home: str
    """The bucket's region."""
    backend: S3Server
    directory: Path
    header: bool
    """Whether a redirect names the region in a header; if not, a HEAD of the bucket alone does."""
    seen: list[Seen] = field(default_factory=list)

    @property
    def refused(self) -> list[Seen]:
        """Return the requests that went to a wrong region or were signed for one."""
        return [
            seen for seen in self.seen if (seen.host_region, seen.signed_region) != (self.home, self.home)
        ]

    def environ(self) -> dict[str, str]:
        """Return credentials and the certificate, but no region."""
        return {
            "AWS_ACCESS_KEY_ID": ADMIN.access,
            "AWS_SECRET_ACCESS_KEY": ADMIN.secret,
            "AWS_CA_BUNDLE": str(self.directory / "cert.pem"),
            "AWS_CONFIG_FILE": os.devnull,
        }

    def prefix(self) -> list[str]:
        """Return the words before a command for which the host names lead here; takes root."""
        mount = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", mount, str(self.directory / "hosts")]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    regions: Regions

    def handle_expect_100(self) -> bool:
        """Refuse before the body is sent, as S3 does."""
        if self._refusal() is None:
            return super().handle_expect_100()
        self._do(with_body=False)
        return False

    def _where(self) -> tuple[str, str]:
        found = _HOST.fullmatch(self.headers["Host"])
        scope = _SCOPE.search(self.headers.get("Authorization", ""))
        return (found[1] or "us-east-1") if found else "?", scope[1] if scope else "?"

    def _refusal(self) -> tuple[int, bytes] | None:
        """Return status and body of a refusal; None if the request is in the right place and signed for it."""
        home = self.regions.home
        host_region, signed_region = self._where()
        if host_region != home:
            error = f"<Code>PermanentRedirect</Code><Endpoint>{host(home)}</Endpoint>"
            return 301, f"<Error>{error}</Error>".encode()
        if signed_region != home:
            error = f"<Code>AuthorizationHeaderMalformed</Code><Message>wrong region</Message><Region>{home}</Region>"
            return 400, f"<Error>{error}</Error>".encode()
        return None

    def do(self) -> None:
        """Answer any request."""
        self._do(with_body=True)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # noqa: N815

    def _do(self, *, with_body: bool) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if with_body else b""
        refusal = self._refusal()
        if refusal is None:
            status, headers, content = self._pass_on(body)
        else:
            status, content = refusal
            of_bucket = self.path.partition("?")[0] == "/"
            headers = {"x-amz-bucket-region": self.regions.home} if self.regions.header or of_bucket else {}
        self.regions.seen.append(Seen(self.command, self.path, *self._where(), status, len(body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if refusal is not None:
            self.send_header("Connection", "close")
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = f"{self.regions.backend.endpoint}/{BUCKET}{self.path}"
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_CONNECTION}
        request = AWSRequest(self.command, url, headers=kept, data=body)
        S3SigV4Auth(Credentials(ADMIN.access, ADMIN.secret), "s3", "us-east-1").add_auth(request)
        with contextlib.closing(URLLib3Session()) as session:
            answer = session.send(request.prepare())
        dropped = {"transfer-encoding", "connection", "date", "server"}
        if self.command != "HEAD":
            dropped.add("content-length")
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in dropped}
        return answer.status_code, headers, answer.content

    def log_message(self, *_: object) -> None:
        """Write nothing to the terminal."""


@contextlib.contextmanager
def serve(
    directory: Path, backend: S3Server, home: str, *others: str | None, header: bool = True
) -> Iterator[Regions]:
    """Run the server; `others` are the regions whose host names exist beside that of the bucket's own."""
    address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    names = [host(region) for region in (home, *others)]
    certificate, key = make_certificate(directory, *names)
    (directory / "hosts").write_text(f"127.0.0.1 localhost\n{address} {' '.join(names)}\n")
    regions = Regions(home, backend, directory, header)
    handler = type("Handler", (_Handler,), {"regions": regions})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = QuietServer((address, 443), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with answering(server):
        yield regions

"""A small scripted S3 over real HTTP: it keeps objects in memory and has the manners that a test gives it.

It checks no signatures. What a real server does is tested against a real server (`s3.py`); this one does what no
server at hand does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import urllib.parse
import zlib
from base64 import b64encode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from tests.support.servers import QuietServer, answering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUCKET = "dumps"
_REFUSALS = {
    400: "InvalidArgument",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    501: "NotImplemented",
}


@dataclass(frozen=True)
class Manners:
    """How a store behaves."""

    conditions: bool | int = True
    """True: honours If-None-Match; False: ignores it; a status: refuses requests that have it."""
    conditions_of_parts: bool = True
    """False: ignores If-None-Match when it completes a multipart upload, as Ceph 16 does."""
    checksums: str = "all"
    """Where a CRC-32 is shown: `all`, `parts`, `head` or `none`."""
    etags: str = "md5"
    """`md5`, or `foreign`: as long as an MD5 and random."""
    head: int = 200
    """Any other status is the answer to each HEAD."""
    expect: int = 100
    """417 refuses Expect."""
    cut: str = ""
    """The first time that an object would become visible, the connection ends: within its `body`, or instead of the
    `response`."""
    stores: str = "whole"
    """`nothing` or `half`: the store lies when it reports success."""
    forbidden: str = ""
    """PUT requests of keys that begin so are answered with 403."""
    lists: bool = True
    """Whether ListMultipartUploads is allowed."""


@dataclass
class Upload:
    """An unfinished multipart upload."""

    key: str
    parts: dict[int, bytes] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)


@dataclass
class FakeS3:
    """The store's memory, and what was asked of it."""

    manners: Manners
    objects: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    requests: list[tuple[str, str, bool]] = field(default_factory=list)
    """Method, what it asks for, and whether it had If-None-Match."""
    endpoint: str = ""
    was_cut: bool = False
    mangle: Callable[[str, dict[str, str]], tuple[str, dict[str, str]]] | None = None
    """Changes the body and the headers of each response."""
    no_length: bool = False
    """Responses to HEAD have no Content-Length."""
    damaged_parts: int = 0
    """So many parts are damaged on their way, and the responses say so."""
    refuse_metadata_with: int = 0
    """The status with which each metadata object is refused; 0 for none."""
    no_such_upload: str = ""
    """What is asked with these letters in it is answered with NoSuchUpload, which fits only to an upload's id."""
    refuse_with: int = 501
    refusals: int = 0
    """So many PUT requests are refused with this status, whatever they ask for."""

    def asked(self, method: str, what: str = "") -> int:
        """Count the requests of a method for something."""
        return sum(m == method and what in w for m, w, _ in self.requests)

    def etag_of(self, body: bytes) -> str:
        """Return the ETag that this store gives to some bytes."""
        return secrets.token_hex(16) if self.manners.etags == "foreign" else md5(body).hex()

    def environ(self) -> dict[str, str]:
        """Return the environment in which boto3's default client reaches this store."""
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL_S3": self.endpoint}


def md5(body: bytes) -> bytes:
    """Return an MD5."""
    return hashlib.md5(body, usedforsecurity=False).digest()


def crc32(body: bytes) -> str:
    """Return a CRC-32 as S3 writes it."""
    return b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    store: FakeS3

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        if self.store.manners.expect != 100:
            self.answer(self.store.manners.expect)
            return False
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def answer(self, status: int, body: str = "", **headers: str) -> None:
        if self.store.mangle is not None:
            body, headers = self.store.mangle(body, headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers and not (self.store.no_length and self.command == "HEAD"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
        self.wfile.flush()

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>as scripted</Message></Error>")

    def hang_up(self) -> None:
        self.store.was_cut = True
        self.close_connection = True
        self.connection.shutdown(2)

    @property
    def asks(self) -> dict[str, str]:
        query = urllib.parse.urlsplit(self.path).query
        return dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    @property
    def key(self) -> str:
        return (
            urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        )

    def begin(self) -> None:
        what = "&".join(self.asks) or self.key
        self.store.requests.append((self.command, what, "If-None-Match" in self.headers))

    def is_stopped(self, *, visible: bool, condition: bool) -> bool:
        """Answer by the store's manners; tell whether that was all."""
        manners, store = self.store.manners, self.store
        if visible and manners.cut == "body" and not store.was_cut:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hang_up()
            return True
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        gone = store.no_such_upload and store.no_such_upload in store.requests[-1][1]
        refused = self.key.endswith(".json") and store.refuse_metadata_with
        if self.command == "PUT" and manners.forbidden and self.key.startswith(manners.forbidden):
            refused = 403
        if gone or refused:
            self.refuse(*((404, "NoSuchUpload") if gone else (refused, "AccessDenied")))
            return True
        if self.command == "PUT" and store.refusals:
            store.refusals -= 1
            self.refuse(store.refuse_with, "InvalidRequest")
            return True
        if condition and manners.conditions not in {True, False}:
            self.refuse(int(manners.conditions), _REFUSALS[int(manners.conditions)])
            return True
        if condition and manners.conditions and self.key in store.objects:
            self.refuse(412, "PreconditionFailed")
            return True
        return False

    def keep(self, body: bytes, etag: str) -> bytes:
        """Keep an object, as far as this store does; return what it takes the object to be."""
        kept = body[: len(body) // 2] if self.store.manners.stores == "half" else body
        if self.store.manners.stores != "nothing":
            self.store.objects[self.key] = kept
            self.store.etags[self.key] = etag
        return kept

    def proof(self, body: bytes) -> dict[str, str]:
        """Return the checksum header of a response: for a request that has one, as S3 does it."""
        kinds = {"all", "parts"} if "partNumber" in self.asks else {"all"}
        shown = self.store.manners.checksums in kinds and "x-amz-checksum-crc32" in self.headers
        return {"x_amz_checksum_crc32": crc32(body)} if shown else {}

    def is_lost(self, *, visible: bool) -> bool:
        lost = visible and self.store.manners.cut == "response" and not self.store.was_cut
        if lost:
            self.hang_up()
        return lost

    def do_PUT(self) -> None:
        self.begin()
        part = self.asks.get("partNumber")
        visible = part is None and not self.key.endswith((".json", "/.condition"))
        if self.is_stopped(visible=visible, condition="If-None-Match" in self.headers):
            return
        etag = self.store.etag_of(self.body)
        if part is None:
            self.keep(self.body, etag)
        else:
            upload = self.store.uploads.get(self.asks["uploadId"])
            if upload is None:
                self.refuse(404, "NoSuchUpload")
                return
            if self.store.damaged_parts:
                self.store.damaged_parts -= 1
                self.body = bytes(len(self.body))
            upload.parts[int(part)], upload.etags[int(part)] = self.body, etag
        if not self.is_lost(visible=visible):
            self.answer(200, ETag=f'"{etag}"', **self.proof(self.body))

    def do_POST(self) -> None:
        self.begin()
        upload_id = self.asks.get("uploadId")
        condition = "If-None-Match" in self.headers and self.store.manners.conditions_of_parts
        if self.is_stopped(visible=upload_id is not None, condition=condition):
            return
        if upload_id is None:
            new = secrets.token_hex(8)
            self.store.uploads[new] = Upload(self.key)
            self.answer(
                200,
                f"<InitiateMultipartUploadResult><UploadId>{new}</UploadId></InitiateMultipartUploadResult>",
            )
        elif upload_id not in self.store.uploads:
            self.refuse(404, "NoSuchUpload")
        else:
            self.complete(self.store.uploads.pop(upload_id))

    def complete(self, upload: Upload) -> None:
        parts = [upload.parts[number] for number in sorted(upload.parts)]
        body, etag = b"".join(parts), f"{md5(b''.join(map(md5, parts))).hex()}-{len(parts)}"
        if self.store.manners.etags == "foreign":
            etag = f"{secrets.token_hex(16)}-{len(parts)}"
        body = self.keep(body, etag)
        if self.is_lost(visible=True):
            return
        checksum = "".join(f"<ChecksumCRC32>{crc}</ChecksumCRC32>" for crc in self.proof(body).values())
        name = "CompleteMultipartUploadResult"
        self.answer(200, f"<{name}><ETag>{etag}</ETag>{checksum}</{name}>")

    def do_HEAD(self) -> None:
        self.begin()
        manners, body = self.store.manners, self.store.objects.get(self.key)
        if manners.head != 200:
            self.answer(manners.head)
        elif body is None:
            self.answer(404)
        else:
            shown = manners.checksums != "none" and self.headers.get("x-amz-checksum-mode") == "ENABLED"
            checksum = {"x_amz_checksum_crc32": crc32(body)} if shown else {}
            etag = f'"{self.store.etags.get(self.key, "none")}"'
            self.answer(200, ETag=etag, Content_Length=str(len(body)), **checksum)

    def do_GET(self) -> None:
        self.begin()
        if "uploads" in self.asks:
            self.list_uploads()
        elif (upload := self.store.uploads.get(self.asks.get("uploadId", ""))) is None:
            self.refuse(404, "NoSuchUpload")
        else:
            items = "".join(self.describe(upload, number) for number in sorted(upload.parts))
            self.answer(200, f"<ListPartsResult>{items}</ListPartsResult>")

    def describe(self, upload: Upload, number: int) -> str:
        body = upload.parts[number]
        shown = self.store.manners.checksums == "all"
        checksum = f"<ChecksumCRC32>{crc32(body)}</ChecksumCRC32>" if shown else ""
        return (
            f"<Part><PartNumber>{number}</PartNumber><ETag>{upload.etags[number]}</ETag>"
            f"<Size>{len(body)}</Size>{checksum}</Part>"
        )

    def list_uploads(self) -> None:
        if not self.store.manners.lists:
            self.refuse(403, "AccessDenied")
            return
        items = "".join(
            f"<Upload><Key>{escape(upload.key)}</Key><UploadId>{upload_id}</UploadId>"
            f"<Initiated>2026-01-01T00:00:{number:02}Z</Initiated></Upload>"
            for number, (upload_id, upload) in enumerate(self.store.uploads.items())
        )
        self.answer(200, f"<ListMultipartUploadsResult>{items}</ListMultipartUploadsResult>")

    def do_DELETE(self) -> None:
        self.begin()
        if "uploadId" in self.asks:
            self.store.uploads.pop(self.asks["uploadId"], None)
        else:
            self.store.objects.pop(self.key, None)
        self.answer(204)


@contextlib.contextmanager
def fake_s3(manners: Manners) -> Iterator[FakeS3]:
    """Run a store with these manners; they may be changed meanwhile."""
    store = FakeS3(manners)
    handler = type("Handler", (_Handler,), {"store": store})
    server = QuietServer(("127.0.0.1", 0), handler)
    store.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    with answering(server):
        yield store


def metadata_of(store: FakeS3, key: str) -> dict[str, object]:
    """Return a dump's metadata object."""
    loaded: dict[str, object] = json.loads(store.objects[f"{key}.json"])
    return loaded

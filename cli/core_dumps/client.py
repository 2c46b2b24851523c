"""Owns the S3 client: its settings, the wording of its errors, and a quick path for small answers.

botocore spends 40 ms on a page of a listing and 3 ms on a small object (measured on 2 cores). Pages and metadata
objects are read by the thousand, so they bypass most of it; they use its credentials, signature and connections.
Every answer other than a plain success is requested again through botocore.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, unquote_plus

import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from urllib3.exceptions import HTTPError

from core_dump_format.advice import ADVICE, advise
from core_dump_format.text import printable
from core_dumps import version
from core_dumps.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from botocore.awsrequest import AWSPreparedRequest
    from mypy_boto3_s3 import S3Client

MOST_CONNECTIONS = 36
MOST_PAGE_BYTES = 16 * 1024 * 1024
_OK = 200
_KEY, _SIZE = re.compile("<Key>([^<]+)</Key>"), re.compile("<Size>([0-9]{1,19})</Size>")
_MODIFIED = re.compile("<LastModified>([^<]*)</LastModified>")
_FOLDER = re.compile("<CommonPrefixes><Prefix>([^<]+)</Prefix></CommonPrefixes>")
_KEY_COUNT = re.compile("<KeyCount>([0-9]{1,9})</KeyCount>")
_TOKEN = re.compile("<NextContinuationToken>([^<]+)</NextContinuationToken>")
_PASSING = frozenset({404, 429, 500, 502, 503, 504})
_ELSEWHERE = frozenset({301, 302, 307, 400})
"""Statuses by which S3 says that a bucket is in another region (400: the signature is for the wrong one)."""
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=\S+/\d{8}/([^/]+)/s3/aws4_request,")


BODY_ERRORS = (
    ConnectionClosedError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
    HTTPError,
)
"""Errors of a connection that ended, or fell silent, within an answer."""


def error_code(error: Exception) -> str:
    """Return the store's code for an error; the name of its class if it is not the store's."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "error"))
    return type(error).__name__


def explain(error: Exception, what: str, needed: str = "s3:ListBucket and s3:GetObject") -> CliError:
    """Turn an error of botocore into one line.

    Args:
        error: of botocore.
        what: the action that failed; may be empty.
        needed: the permissions that the action requires.
    """
    code = error_code(error)
    start = f"{what}: " if what else ""
    if isinstance(error, EndpointConnectionError):
        place = printable(str(error.kwargs["endpoint_url"]).partition("?")[0])
        return CliError(f"{start}{place}: {ADVICE[code]}")
    if code in ADVICE:
        return CliError(start + ADVICE[code])
    if isinstance(error, ClientError):
        message = str(error.response.get("Error", {}).get("Message", "")).rstrip(". ")
        said = f"{code}: {message}" if message and message != code else code
        advice = advise(code, message)
        if advice is None and code == "AccessDenied":
            advice = f"these credentials need {needed}"
        return CliError(f"{start}the store says {printable(said)}" + (f"; {advice}" if advice else ""))
    return CliError(f"{start}{printable(str(error))}")


class S3:
    """A client, and a reader of small objects that bypasses it."""

    def __init__(self) -> None:
        """Prepare a client; nothing is sent. The region is AWS_REGION, else botocore's; botocore finds the rest.

        Raises:
            UsageError: botocore refuses its settings.
        """
        config = Config(
            max_pool_connections=MOST_CONNECTIONS,
            retries={"mode": "standard", "total_max_attempts": 5},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            signature_version="s3v4",  # presigned URLs default to an older one, which newer regions refuse
            user_agent_extra=f"core-dumps/{version()}",
        )
        session = botocore.session.Session()
        if region := os.environ.get("AWS_REGION"):  # which botocore does not read
            session.set_config_variable("region", region)
        self._session = session
        try:
            self.client = cast("S3Client", session.create_client("s3", config=config))
        except (BotoCoreError, ValueError) as error:
            raise UsageError(f"S3: {printable(str(error))}") from None
        events = self.client.meta.events
        events.register("before-call.s3.HeadBucket", _ask_for_the_region_once)
        events.register("before-send.s3.PutObject", _stop)  # only _locate asks for one: nothing here writes

    def quick_reader(self, bucket: str) -> QuickReader | None:
        """Return a reader of small objects; None if requests to the bucket are not signed as it signs them."""
        try:
            credentials = self._session.get_credentials()
        except BotoCoreError:
            return None
        place = _locate(self.client, bucket)
        if credentials is None or place is None:
            return None
        return QuickReader(self.client, bucket, place, credentials)


def _ask_for_the_region_once(context: dict[str, Any], **_: object) -> None:
    """Mark a HeadBucket as redirected: botocore would follow a proxy that redirects everything without end."""
    context["s3_redirect"]["redirected"] = True


class _Place(NamedTuple):
    """Where the objects of a bucket are, and how requests for them are signed."""

    base: str
    """The URL that keys are appended to."""
    region: str


class _PreparedError(Exception):
    """A request that was signed and is not to be sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        super().__init__()
        self.request = request


def _stop(request: AWSPreparedRequest, **_: object) -> None:
    raise _PreparedError(request)


def _locate(client: S3Client, bucket: str) -> _Place | None:
    """Return where the client would send a request now; it knows the region after its first redirect.

    The client prepares a request, which `S3` stops before it is sent. A presigned URL may name a host without region.
    """
    try:
        client.put_object(Bucket=bucket, Key="x", Body=b"")
    except _PreparedError as prepared:
        base = str(prepared.request.url).removesuffix("x")
        scope = _SCOPE.match(_text(prepared.request.headers.get("Authorization", "")))
        return _Place(base, scope[1]) if scope and base.endswith("/") else None
    except (BotoCoreError, ClientError):
        return None
    raise AssertionError("a request was sent")


def _text(header: str | bytes) -> str:
    return header.decode() if isinstance(header, bytes) else header


def _length(headers: Mapping[str, str]) -> int:
    """Return the announced length of an answer; 0 if there is none."""
    value = headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdecimal() else 0


class QuickReader:
    """Gets small answers with botocore's signature and the client's connections, without the rest of botocore.

    Each method returns None for any answer but success; the caller then asks the client, which can explain it.
    """

    def __init__(self, client: S3Client, bucket: str, place: _Place, credentials: Any) -> None:  # noqa: ANN401  no stubs
        """Start with the place that the client would use now."""
        self._client, self._bucket, self._credentials = client, bucket, credentials
        self._session = client._endpoint.http_session  # type: ignore[attr-defined]  # noqa: SLF001  proxies, CA bundle, pool
        self._place: _Place | None = place
        self._accepted = self._moved = False

    def get(self, path: str, most_bytes: int) -> bytes | None:
        """Return the first bytes of the answer for a path, with its query, below the bucket."""
        place = self._current_place()
        if place is None:
            return None
        request = AWSRequest("GET", place.base + path, stream_output=True)
        try:
            S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", place.region).add_auth(request)
            answer = self._session.send(request.prepare())
            body: bytes = answer.raw.read(most_bytes)
            answer.raw.drain_conn() if len(body) < most_bytes else answer.raw.close()
        except (BotoCoreError, ClientError, HTTPError, OSError):
            return None
        if answer.status_code == _OK:
            self._accepted = True
            return None if len(body) < min(most_bytes, _length(answer.headers)) else body
        if self._accepted:
            return None  # the place is right, so the answer is about this object
        if answer.status_code in _ELSEWHERE:
            self._moved = True
        elif answer.status_code not in _PASSING:
            self._place = None
        return None

    def _current_place(self) -> _Place | None:
        """Return where to ask; None after an answer that the bucket is elsewhere, until the client was sent there."""
        if self._moved:
            place = _locate(self._client, self._bucket)
            if place == self._place:
                return None
            self._place, self._moved = place, False
        return self._place

    def object(self, key: str, most_bytes: int) -> bytes | None:
        """Return the first bytes of an object."""
        return self.get(quote(key, safe="/~"), most_bytes)

    def page(self, arguments: Mapping[str, str]) -> Page | None:
        """Return a page of ListObjectsV2 with these query parameters."""
        query = {"encoding-type": "url", "list-type": "2", **arguments}
        text = "&".join(f"{name}={quote(value, safe='~')}" for name, value in sorted(query.items()))
        body = self.get(f"?{text}", MOST_PAGE_BYTES)
        return None if body is None else read_page(body)


class Row(NamedTuple):
    """An object in a listing; a tuple, since there may be 200,000."""

    key: str
    size_bytes: int
    modified: str
    """As in the listing; parsed on demand, since most are never needed."""

    @property
    def modified_seconds(self) -> int:
        """Return Unix seconds; 0 if the text is not a time."""
        try:
            return int(datetime.fromisoformat(self.modified).timestamp())
        except (ValueError, OverflowError):
            return 0


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing."""

    rows: list[Row]
    folders: list[str]
    next_token: str | None


def read_page(body: bytes) -> Page | None:
    """Return a page of ListObjectsV2; None if it differs from S3's own form and needs an XML parser.

    A parser takes 10 ms for a page. No row can be missed here: their number must equal KeyCount.
    """
    text = body.decode("utf-8", "replace")
    keys, sizes, times = _KEY.findall(text), _SIZE.findall(text), _MODIFIED.findall(text)
    folders = _FOLDER.findall(text)
    token = _TOKEN.search(text)
    more = "<IsTruncated>true</IsTruncated>" in text
    names = [*keys, *folders, token[1] if token else ""]
    is_whole = len(keys) == len(sizes) == len(times) == text.count("<Contents>") and (token or not more)
    if not is_whole or not _is_plain(text, names) or _key_count(text) != len(keys) + len(folders):
        return None
    if "<EncodingType>url</EncodingType>" in text:
        keys = [unquote_plus(key) if "%" in key or "+" in key else key for key in keys]
        folders = [unquote_plus(folder) for folder in folders]
    rows = [Row(key, int(size), time) for key, size, time in zip(keys, sizes, times, strict=True)]
    return Page(rows, folders, token[1] if token and more else None)


def _is_plain(text: str, names: Sequence[str]) -> bool:
    """Tell whether names stand in a page as they are: no entities, no declarations, no damaged bytes."""
    return "<!" not in text and not any(sign in name for name in names for sign in "&\ufffd")


def _key_count(text: str) -> int | None:
    found = _KEY_COUNT.search(text)
    return int(found[1]) if found else None

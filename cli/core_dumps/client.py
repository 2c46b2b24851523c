"""Owns the S3 client: where its settings come from, how its errors read, and the two answers it reads by the thousand.

botocore spends 40 ms on a page of a listing and 3 ms on a small object (measured on 2 cores), so pages and sidecars are
read past most of it: with its credentials, its signature and its connections. What is no plain success goes its way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, unquote_plus

import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from core_dump_format.text import printable
from core_dumps import __version__
from core_dumps.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
_ADVICE = {
    "NoSuchBucket": "there is no such bucket: correct BUCKET_NAME or --bucket",
    "InvalidAccessKeyId": "the store does not know these credentials",
    "SignatureDoesNotMatch": "the store refuses these credentials: check AWS_SECRET_ACCESS_KEY and the clock",
    "ExpiredToken": "the credentials have expired: log in again",
    "PreconditionFailed": "the object was replaced meanwhile: start again",
    "NoCredentialsError": "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in",
}


def explain(error: Exception, what: str, needed: str = "s3:ListBucket and s3:GetObject") -> CliError:
    """Turn an error of botocore into one line; `needed` are the permissions that it takes."""
    code = type(error).__name__
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", "error"))
    if code == "AccessDenied":
        return CliError(f"{what}: access denied: these credentials need {needed}")
    if isinstance(error, EndpointConnectionError):
        place = printable(str(error.kwargs["endpoint_url"]).partition("?")[0])
        return CliError(f"{what}: nobody answers at {place}: check the network and AWS_ENDPOINT_URL_S3")
    return CliError(f"{what}: {_ADVICE.get(code) or printable(str(error))}")


class S3:
    """A client, and the means to read small objects without it."""

    def __init__(self) -> None:
        """Connect to nothing yet; endpoint, region and credentials come from where botocore looks for them.

        Raises:
            UsageError: what is set there cannot be.
        """
        config = Config(
            max_pool_connections=MOST_CONNECTIONS,
            retries={"mode": "standard", "total_max_attempts": 5},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            signature_version="s3v4",  # for URLs that are shared as well; the default there is refused by new regions
            user_agent_extra=f"core-dumps/{__version__}",
        )
        self._session = botocore.session.Session()
        try:
            self.client = cast("S3Client", self._session.create_client("s3", config=config))
        except (BotoCoreError, ValueError) as error:
            raise UsageError(f"S3: {printable(str(error))}") from None

    def quick_reader(self, bucket: str) -> QuickReader | None:
        """Return a reader of small objects; None where requests are signed in another way than it knows."""
        try:
            credentials = self._session.get_credentials()
            url = self.client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "x"})
        except (BotoCoreError, ClientError):
            return None
        base = url.partition("?")[0].removesuffix("x")
        if credentials is None or "X-Amz-Algorithm=AWS4-HMAC-SHA256" not in url or not base.endswith("/"):
            return None
        verify = self._session.get_config_variable("ca_bundle") or True
        session = URLLib3Session(
            verify=verify, proxies=get_environ_proxies(base), max_pool_connections=MOST_CONNECTIONS
        )
        return QuickReader(session, base, credentials, self.client.meta.region_name)


class QuickReader:
    """Gets small answers with botocore's signature and connections, but nothing else of it.

    Each method returns None for all but a plain success, which is then for botocore to ask again, or to explain.
    """

    def __init__(self, session: URLLib3Session, base: str, credentials: Any, region: str) -> None:  # noqa: ANN401  no stubs
        """Keep what a request needs; `base` is the URL that keys are appended to."""
        self._session, self._base, self._credentials, self._region = session, base, credentials, region
        self._refused = False

    def get(self, path: str, most_bytes: int) -> bytes | None:
        """Return the first bytes of what lies at a path, with its query, below the bucket."""
        if self._refused:
            return None
        request = AWSRequest("GET", self._base + path, stream_output=True)
        try:
            S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
            answer = self._session.send(request.prepare())
            try:
                body: bytes = answer.raw.read(most_bytes)
            finally:
                answer.raw.drain_conn() if len(body) < most_bytes else answer.raw.close()
        except (BotoCoreError, ClientError, HTTPError, OSError):
            return None
        self._refused = answer.status_code != _OK and answer.status_code not in _PASSING
        return body if answer.status_code == _OK else None

    def object(self, key: str, most_bytes: int) -> bytes | None:
        """Return the first bytes of an object."""
        return self.get(quote(key, safe="/~"), most_bytes)

    def page(self, arguments: Mapping[str, str]) -> Page | None:
        """Return a page of ListObjectsV2; the arguments are the query's."""
        query = {"encoding-type": "url", "list-type": "2", **arguments}
        text = "&".join(f"{name}={quote(value, safe='~')}" for name, value in sorted(query.items()))
        body = self.get(f"?{text}", MOST_PAGE_BYTES)
        return None if body is None else read_page(body)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


class Row(NamedTuple):
    """An object in a listing; a tuple, since there may be 200,000."""

    key: str
    size_bytes: int
    modified: str
    """As the listing has it: most are never looked at."""

    @property
    def modified_seconds(self) -> int:
        """Unix seconds; 0 where the text is no time."""
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
    """Return a page of ListObjectsV2; None if it is not as S3 writes it, which an XML parser has to look at then.

    A parser takes 10 ms for a page. Here no row can be missed: their number has to be that of KeyCount.
    """
    text = body.decode("utf-8", "replace")
    keys, sizes, times = _KEY.findall(text), _SIZE.findall(text), _MODIFIED.findall(text)
    folders = _FOLDER.findall(text)
    count, token = _KEY_COUNT.search(text), _TOKEN.search(text)
    more = "<IsTruncated>true</IsTruncated>" in text
    plain = not any(
        sign in part for part in (*keys, *folders, token[1] if token else "") for sign in "&\ufffd"
    )
    if "<!" in text or not plain or count is None or int(count[1]) != len(keys) + len(folders):
        return None
    if not len(keys) == len(sizes) == len(times) == text.count("<Contents>") or (more and token is None):
        return None
    if "<EncodingType>url</EncodingType>" in text:
        keys = [unquote_plus(key) if "%" in key or "+" in key else key for key in keys]
        folders = [unquote_plus(folder) for folder in folders]
    rows = [Row(key, int(size), time) for key, size, time in zip(keys, sizes, times, strict=True)]
    return Page(rows, folders, token[1] if token and more else None)

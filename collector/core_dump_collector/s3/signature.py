"""Owns the signature of small requests (AWS Signature Version 4) over headers that are plain text.

botocore's signer spends most of its time on headers that any caller could have changed in the meantime: half a
millisecond a request. Its own credentials, its decision about the body's hash and its keys are used here
(Amazon S3 API Reference, "Signature Calculations for the Authorization Header").
"""

from __future__ import annotations

import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.auth import S3SigV4Auth

if TYPE_CHECKING:
    from botocore.auth import BaseSigner


@dataclass(slots=True)
class Request:
    """A request that is about to be signed, with the attributes that botocore's signer reads."""

    url: str
    """Without a query."""
    headers: dict[str, str]
    body: bytes
    context: dict[str, Any]


def can_sign(auth: BaseSigner) -> bool:
    """Tell whether requests of this signer can be signed here: other kinds add more to a request."""
    return type(auth) is S3SigV4Auth and auth.credentials is not None


def sign(auth: S3SigV4Auth, request: Request) -> None:
    """Add the headers of the signature, which covers all headers that are there, to a PUT request."""
    headers, context = request.headers, request.context
    fields: Any = request  # botocore's signer reads nothing else of it
    context["timestamp"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    headers["X-Amz-Date"] = context["timestamp"]
    if auth.credentials.token:
        headers["X-Amz-Security-Token"] = auth.credentials.token
    headers["X-Amz-Content-SHA256"] = digest = auth.payload(fields)
    parts = urllib.parse.urlsplit(request.url)
    signed = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    signed["host"] = _host(parts)
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    text = auth.string_to_sign(fields, f"PUT\n{parts.path}\n\n{lines}\n{names}\n{digest}")
    signature = auth.signature(text, fields)
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={auth.scope(fields)}, SignedHeaders={names}, Signature={signature}"
    )


def _host(parts: urllib.parse.SplitResult) -> str:
    """Return the header that the HTTP client adds: the port only if it is not the usual one."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return host if parts.port in {None, usual} else f"{host}:{parts.port}"

"""Owns the signature of requests (AWS Signature Version 4), where botocore's own costs more than it has to.

Of a small request, botocore's signer spends most of its time on headers that any caller could have changed in the
meantime: half a millisecond. `sign` takes headers that are plain text. Of a large one, it reads the body once more for
the SHA-256. `PartSigner` takes the one that was computed together with the checksum. Credentials, keys and the decision
about the body's hash are botocore's (Amazon S3 API Reference, "Signature Calculations for the Authorization Header").
"""

from __future__ import annotations

import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth

if TYPE_CHECKING:
    from botocore.auth import BaseSigner
    from botocore.awsrequest import AWSRequest

VERSION = "s3v4"
"""botocore's name of this kind of signature."""


class PartSigner(S3SigV4Auth):
    """botocore's signer, for bodies that may know their SHA-256."""

    def payload(self, request: AWSRequest) -> str:
        """Return the content of X-Amz-Content-SHA256: the SHA-256 of the body, or UNSIGNED-PAYLOAD."""
        known = getattr(request.body, "sha256", None)
        if known is not None and self._should_sha256_sign_payload(request):  # type: ignore[attr-defined]  # its stubs
            return str(known)
        return super().payload(request)


def use_part_signer() -> None:
    """Let botocore's clients use it, as botocore sets signers of its own (botocore.auth), unless another is set."""
    if AUTH_TYPE_MAPS[VERSION] is S3SigV4Auth:
        AUTH_TYPE_MAPS[VERSION] = PartSigner


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
    is_known = type(auth) is S3SigV4Auth or type(auth) is PartSigner
    return is_known and getattr(auth, "credentials", None) is not None


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

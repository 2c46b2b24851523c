"""Owns the making of the S3 client: what boto3 is told, and what of it is loaded once for all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import botocore
import botocore.session
from botocore.config import Config

from core_dump_collector import __version__

if TYPE_CHECKING:
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

    from core_dump_collector.config import Settings

SENDERS = 2
"""Parts of one object that are sent at the same time. A part is read for its checksum and again to be sent, so
as many parts want to stay in the page cache: with two, a limit of 128 MiB of memory is not even touched."""


def _warm() -> Loader:
    """Load what every S3 client needs, once, before the workers are forked from this process."""
    session = botocore.session.Session()
    unsigned = Config(signature_version=botocore.UNSIGNED)
    session.create_client("s3", region_name="us-east-1", config=unsigned).close()
    loader: Loader = session.get_component("data_loader")
    return loader


_LOADER = _warm()


def make_client(settings: Settings) -> S3Client:
    """Return a client. Endpoint, region and credentials come from where boto3 looks for them."""
    client = _make_client(settings, sign_payload=None)
    if settings.checksum == "when_required" or not client.meta.endpoint_url.startswith("https:"):
        return client
    client.close()
    # TLS and a checksum header protect the body: hashing it once more for the signature would double the CPU.
    return _make_client(settings, sign_payload=False)


def _make_client(settings: Settings, *, sign_payload: bool | None) -> S3Client:
    session = botocore.session.Session()
    session.register_component("data_loader", _LOADER)
    s3: dict[str, Any] = {"addressing_style": settings.addressing_style}
    if sign_payload is not None:
        s3["payload_signing_enabled"] = sign_payload
    config = Config(
        s3=s3,  # type: ignore[arg-type]  # a typed dict of botocore's stubs
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        request_checksum_calculation=settings.checksum,
        response_checksum_validation=settings.checksum,
        max_pool_connections=SENDERS,
        tcp_keepalive=True,
        user_agent_extra=f"core-dump-handler/{__version__}",
    )
    return boto3.Session(botocore_session=session).client("s3", config=config)

"""Owns the S3 client: the options that boto3 gets, the region, and the data that is loaded once for all workers.

The region is AWS_REGION, else what boto3 finds (AWS_DEFAULT_REGION, the profile). It may be wrong: when S3 answers that
the bucket is elsewhere, botocore repeats the request there and keeps the region for every later one of this client.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  the first connection would import it
import os
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from core_dump_collector import __version__
from core_dump_collector.s3.progress import end_stalled_requests
from core_dump_collector.s3.signature import use_part_signer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.flow import Flow

MOST_CONNECTIONS = 32
"""Connections that a client keeps for the next request."""


class _WarmError(Exception):
    """Stops a request that was prepared only for what that loads."""


def _stop(**_: object) -> None:
    raise _WarmError


def _warm() -> list[boto3.Session]:
    """Prepare a request up to its sending: workers forked from this process share everything that it loads."""
    try:
        session = _make_session()
        client = session.client(
            "s3",
            region_name="us-east-1",
            aws_access_key_id="none",  # so that boto3 does not look for credentials
            aws_secret_access_key="none",  # noqa: S106
        )
        client.meta.events.register("before-send.s3.PutObject", _stop)
        client.put_object(Bucket="bucket", Key="key", Body=b"")
    except _WarmError:
        return [session]
    except (BotoCoreError, ValueError):  # e.g. a profile that does not exist: the first job reports it
        return []
    raise AssertionError("a request was sent")


def _make_session() -> boto3.Session:
    """Return a session in the configured region; boto3 itself does not read AWS_REGION."""
    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)


_WARM = _warm()
"""A session for the first client; later clients read credentials and profiles again."""


def make_client(options: UploadOptions, flow: Flow) -> S3Client:
    """Return a client. boto3 finds the endpoint and the credentials; `flow` says how much it sends at once."""
    session = _WARM.pop() if _WARM else _make_session()
    use_part_signer()
    client = _make_client(session, options, sign_payload=None)
    if sends_checksums(client) and client.meta.endpoint_url.startswith("https:"):
        client.close()
        # TLS and a checksum header protect the body: hashing it once more for the signature would double the CPU.
        client = _make_client(session, options, sign_payload=False)
    end_stalled_requests(client, options.read_timeout_seconds, options.connection_bytes_per_second, flow)
    return client


def sends_checksums(client: S3Client) -> bool:
    """Tell whether requests carry checksums, as the setting says, or the sources that boto3 reads."""
    return bool(client.meta.config.request_checksum_calculation == "when_supported")  # type: ignore[attr-defined]  # dynamic


def signs_bodies(client: S3Client) -> bool:
    """Tell whether signatures cover bodies, which needs their SHA-256: always, unless a setting says otherwise."""
    s3: dict[str, Any] = client.meta.config.s3 or {}  # type: ignore[attr-defined]  # dynamic
    return s3.get("payload_signing_enabled") is not False


def _make_client(session: boto3.Session, options: UploadOptions, *, sign_payload: bool | None) -> S3Client:
    s3: dict[str, Any] = {"addressing_style": options.addressing_style}
    if sign_payload is not None:
        s3["payload_signing_enabled"] = sign_payload
    checksums: dict[str, Any] = {}
    if options.checksum is not None:  # or boto3's own sources decide
        checksums = dict.fromkeys(
            ("request_checksum_calculation", "response_checksum_validation"), options.checksum
        )
    config = Config(
        s3=s3,  # type: ignore[arg-type]  # a typed dict of botocore's stubs
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=options.connect_timeout_seconds,
        read_timeout=None,  # `progress` ends what hangs
        **checksums,
        max_pool_connections=MOST_CONNECTIONS,
        tcp_keepalive=True,
        user_agent_extra=f"core-dump-handler/{__version__}",
    )
    client = session.client("s3", config=config)
    client.meta.events.register("before-call.s3.HeadBucket", _ask_for_the_region_once)
    return client


def _ask_for_the_region_once(context: dict[str, Any], **_: object) -> None:
    """Mark a HeadBucket as redirected, so that botocore does not follow its answer.

    botocore sends it when a redirect names no region. A proxy that redirects everything would redirect this request
    as well, and botocore would send another to learn where to, until the interpreter's stack is full.
    """
    context["s3_redirect"]["redirected"] = True

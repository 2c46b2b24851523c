"""Owns the part of the settings that workers need: small, frozen, standard library only.

Settings are checked by pydantic, which would cost each worker 15 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """How dumps are uploaded. Each field has the name and the meaning of the setting (docs/configuration.md)."""

    bucket: str
    prefix: str
    """Empty, or ending in a slash."""
    node_name: str
    key_template: str
    compress_raw: bool
    upload_sensitive: bool
    metadata: bool
    fingerprint: bool
    checksum: Literal["when_supported", "when_required"] | None
    conditional: Literal["auto", "true", "false"]
    addressing_style: str
    storage_class: str | None
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None
    kms_key_id: str | None
    expected_bucket_owner: str | None
    part_bytes: int
    connect_timeout_seconds: float
    read_timeout_seconds: float
    pod_logs_directory: str | None
    object_tags: dict[str, str] = field(default_factory=dict)

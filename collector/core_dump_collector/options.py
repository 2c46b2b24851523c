"""Owns the part of the settings that workers need: small, frozen, standard library only.

Settings are checked by pydantic, which would cost each worker 15 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from core_dump_format.keys import literal_folder

MIN_BYTES_PER_SECOND = 10_000
"""Least rate of the link that all workers share."""
UNPROVEN_CONNECTIONS = 8
"""Most connections on a link until it has shown that it carries more (`governor`)."""


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
    modules: bool
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
    workers: int
    max_upload_bytes_per_second: int
    pod_logs_directory: str | None
    object_tags: dict[str, str] = field(default_factory=dict)

    @property
    def node_folder(self) -> str:
        """Return the folder of the objects by which this node tests the store."""
        return f"{self.prefix}{literal_folder(self.key_template)}{self.node_name}/"

    @property
    def shared_bytes_per_second(self) -> int:
        """Return the rate of dumps, and that of modules, while both are sent; 0 for no limit."""
        return -(-self.max_upload_bytes_per_second // 2)

    @property
    def request_seconds(self) -> float:
        """Return how long a request may hang."""
        return self.connect_timeout_seconds + self.read_timeout_seconds

    @property
    def connection_bytes_per_second(self) -> float:
        """Return the least rate at which a request lives: its share of the slowest link."""
        return MIN_BYTES_PER_SECOND / UNPROVEN_CONNECTIONS

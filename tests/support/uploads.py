"""Runs the worker's entry in this process, against whatever server the environment names."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from unittest import mock

from core_dump_collector import upload
from core_dump_collector.config import Settings
from core_dump_collector.jobs import Job, UploadResult
from core_dump_collector.s3 import multipart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MEBIBYTE = 1024 * 1024
NAME = "core-app-1700000000-42-11.gz"
KEY = f"node-1/{NAME}"


def settings(**changes: Any) -> Settings:
    """Return settings for tests: parts as small as S3 allows, short timeouts."""
    values = {
        "bucket_name": "dumps",
        "node_name": "node-1",
        "part_bytes": 5 * MEBIBYTE,
        "connect_timeout_seconds": 2,
        "read_timeout_seconds": 10,
    }
    return Settings(**(values | changes))


def send(path: Path, **changes: Any) -> UploadResult:
    """Process one file."""
    return upload.process(Job(str(path.parent), path.name), settings(**changes))


@contextlib.contextmanager
def connected(variables: Mapping[str, str], **more: str) -> Iterator[None]:
    """Let uploads go where these variables say; nothing of the machine's own AWS settings is seen."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    isolation = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    with (
        mock.patch.dict(os.environ, kept | isolation | dict(variables) | more, clear=True),
        mock.patch.object(multipart, "FIRST_PAUSE_SECONDS", 0.02),
    ):
        disconnect()
        try:
            yield
        finally:
            disconnect()


def disconnect() -> None:
    """Forget the client, as a new worker process would."""
    upload._CONNECTION.close()

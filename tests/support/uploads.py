"""Runs the worker's entry in this process, against whatever server the environment names."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from unittest import mock

from core_dump_collector.config import Settings
from core_dump_collector.jobs import Document, Job, RecordResult, Sighting, UploadResult
from core_dump_collector.s3 import progress, tries
from core_dump_collector.upload import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from core_dump_collector.options import UploadOptions

MEBIBYTE = 1024 * 1024
NAME = "core-app-1700000000-42-11.gz"
KEY = f"node-1/{NAME}"


def options(**changes: Any) -> UploadOptions:
    """Return options for tests: parts as small as S3 allows, short timeouts."""
    values: dict[str, Any] = {
        "bucket_name": "dumps",
        "node_name": "node-1",
        "key_template": "{node}/{name}",
        "part_bytes": 5 * MEBIBYTE,
        "connect_timeout_seconds": 2,
        "read_timeout_seconds": 10,
    }
    return Settings(**(values | changes)).upload_options()


_workers: dict[str, Worker] = {}
"""By what is asked of them; a worker process keeps its client from one job to the next, and so do these."""


def worker(**changes: Any) -> Worker:
    """Return the worker with these settings."""
    return _workers.setdefault(repr(changes), Worker(options(**changes)))


def send(path: Path, sighting: Sighting | None = None, **changes: Any) -> UploadResult:
    """Process one file."""
    result = worker(**changes).process(Job(str(path.parent), path.name, sighting))
    assert isinstance(result, UploadResult)
    return result


def send_record(document: Document, **changes: Any) -> RecordResult:
    """Process one record without a dump."""
    result = worker(**changes).process(document)
    assert isinstance(result, RecordResult)
    return result


@contextlib.contextmanager
def connected(variables: Mapping[str, str], **more: str) -> Iterator[None]:
    """Let uploads go where these variables say; nothing of the machine's own AWS settings is seen.

    Pauses are short, and the completion of a multipart upload has no more time than other requests.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    isolation = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    with (
        mock.patch.dict(os.environ, kept | isolation | dict(variables) | more, clear=True),
        mock.patch.object(tries, "FIRST_PAUSE_SECONDS", 0.02),
        mock.patch.object(progress, "COMPLETE_WINDOWS", 1),
    ):
        disconnect()
        try:
            yield
        finally:
            disconnect()


def disconnect() -> None:
    """Forget the clients, as new worker processes would."""
    while _workers:
        _workers.popitem()[1].close()

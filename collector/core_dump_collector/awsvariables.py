"""Owns the check of the AWS_* variables, which boto3 reads itself and would refuse at the first dump."""

from __future__ import annotations

import os
import re

from core_dump_collector.errors import ConfigError
from core_dump_format.advice import check_endpoint

_REGION = re.compile(r"(?![0-9]+$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def check_environment() -> None:
    """Check the variables that boto3 would refuse in every worker, at every attempt.

    Raises:
        ConfigError: one line with the variable and its possible values.
    """
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        region = os.environ.get(name)
        if region and not _REGION.fullmatch(region):
            raise ConfigError(f"{name}={region[:80]!r}: takes the name of a region, e.g. eu-central-1")
    checksum = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") or "when_supported"
    if checksum.lower() not in {"when_supported", "when_required"}:
        name = "AWS_REQUEST_CHECKSUM_CALCULATION"
        raise ConfigError(f"{name}={checksum[:80]!r}: takes when_supported or when_required")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        try:
            check_endpoint(os.environ.get(name) or "https://s3")
        except ValueError as error:
            raise ConfigError(f"{name}={os.environ[name][:80]!r}: {error}") from None

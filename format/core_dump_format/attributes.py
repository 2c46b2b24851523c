"""Owns the facts about a dump: extended attributes on the node, fields of the metadata object in the bucket.

One list for writer and readers (docs/contracts.md). Values may have been written by anybody: they are checked here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ATTRIBUTE_PREFIX = "user.coredump."
MOST_ATTRIBUTE_BYTES = 1024

NUMBERS = frozenset(
    {"pid", "tid", "ns_pid", "uid", "gid", "signal", "timestamp", "rlimit", "dumpable", "threads"}
    | {"bytes", "expected_bytes", "duration_ms", "vital_bytes", "vital_crc32", "dropped_bytes"}
)
TEXTS = frozenset(
    {"hostname", "comm", "exe", "cmdline", "thread", "cgroup", "container_id", "pod_uid", "origin"}
    | {
        "truncated",
        "sensitive",
        "compressor",
        "helper_version",
        "vital",
        "trimmed",
        "frames",
        "build_id",
        "machine",
    }
    | {"namespace", "pod", "container", "image", "image_digest", "identity_source"}
)
UPLOAD_RECORD = ATTRIBUTE_PREFIX + "upload"
"""The upload in progress; the collector's own (s3/record)."""
SALVAGED = ATTRIBUTE_PREFIX + "salvaged"
"""Marks an abandoned partial whose compressed stream has no end; it is repaired during its upload."""
ATTRIBUTE_NAMES = frozenset(ATTRIBUTE_PREFIX + name for name in NUMBERS | TEXTS) | {UPLOAD_RECORD, SALVAGED}
TRUNCATED_REASONS = frozenset(
    {"killed", "max_dump_bytes", "keep_free", "max_total_bytes", "deadline", "disk_full"}
    | {"compressor_failed", "read_error", "not_elf", "salvaged"}
)
TRIMMED_REASONS = frozenset(
    {"trim_above_bytes", "max_dump_bytes", "rule", "metadata"}
    | {"rate_limit", "keep_free", "max_total_bytes", "no_slot"}
)
TRIMMED = "trimmed"
"""The attribute, and the state of a dump without memory that was left out on purpose; `truncated` is
`max_dump_bytes` then."""

METADATA_FLAGS = frozenset({"sensitive"})
METADATA_NUMBERS = NUMBERS | {"schema", "size_bytes", "fingerprint_version"}
METADATA_TEXTS = (TEXTS - METADATA_FLAGS) | {
    *("key", "bucket", "crc32", "node", "uploaded_at", "collector_version", "state", "sensitive_reason"),
    "fingerprint",
}
METADATA_FIELDS = METADATA_NUMBERS | METADATA_TEXTS | METADATA_FLAGS
"""Every field of a metadata object, and so everything that `core-dumps` can be asked for."""

_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_FORMS = {
    "container_id": re.compile(rb"[0-9a-f]{64}"),
    "pod_uid": re.compile(rb"[0-9a-f-]{36}|[0-9a-f]{32}"),
    "build_id": re.compile(rb"([0-9a-f]{2}){4,64}"),
    "namespace": _NAME,
    "pod": _NAME,
    "container": _NAME,
    "image": re.compile(rb"[!-~]{1,300}"),
    "image_digest": re.compile(rb"sha256:[0-9a-f]{64}"),
    "identity_source": re.compile(rb"runtime|label|logs"),
}
"""Attributes that become parts of paths and keys, or have few values; a value of another form is ignored."""


def read_attributes(raw: Mapping[str, bytes]) -> dict[str, str | int]:
    """Return the known attributes, checked and typed; others are ignored.

    Args:
        raw: extended attributes by full name.
    """
    attributes: dict[str, str | int] = {}
    for full_name, value in raw.items():
        name = full_name[len(ATTRIBUTE_PREFIX) :] if full_name.startswith(ATTRIBUTE_PREFIX) else full_name
        if len(value) > MOST_ATTRIBUTE_BYTES:
            continue
        if name in NUMBERS and re.fullmatch(rb"[0-9]{1,20}", value):
            attributes[name] = int(value)
        elif name in TEXTS and (name not in _FORMS or _FORMS[name].fullmatch(value)):
            attributes[name] = value.decode("utf-8", "backslashreplace")
    if attributes.get("truncated", "killed") not in TRUNCATED_REASONS:
        attributes["truncated"] = "read_error"
    if attributes.get(TRIMMED, "rule") not in TRIMMED_REASONS:
        attributes[TRIMMED] = "rule"
    return attributes


def is_trimmed(attributes: Mapping[str, object]) -> bool:
    """Tell whether a dump is whole but for the memory that was left out on purpose."""
    return TRIMMED in attributes and attributes.get("truncated") == "max_dump_bytes"

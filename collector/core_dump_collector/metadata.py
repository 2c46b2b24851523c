"""Owns what is known of a dump, and its metadata object (docs/contracts.md, "Object and metadata object")."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from core_dump_collector import __version__
from core_dump_collector.node import identity
from core_dump_format.attributes import TRIMMED, is_trimmed, read_attributes
from core_dump_format.crc32 import encode_crc32
from core_dump_format.keys import build_record_key, date_and_hour
from core_dump_format.names import parse_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core_dump_collector.jobs import Document
    from core_dump_collector.node import kubernetes
    from core_dump_collector.node.dumpfile import DumpFile
    from core_dump_collector.options import UploadOptions

MOST_BYTES = 64 * 1024
_MOST_METADATA_TEXT = 128


@dataclass(frozen=True, slots=True)
class Facts:
    """What the name, the attributes and the node say about a dump."""

    name: str
    attributes: dict[str, str | int]
    node: str
    timestamp: int
    """Unix seconds of the crash, or of the last write where nothing says so."""
    pod: kubernetes.PodIdentity | None

    @property
    def signal(self) -> int | None:
        """Signal number."""
        return _number(self.attributes.get("signal"))

    @property
    def truncated(self) -> str | None:
        """Why the dump is not whole; None for a whole one."""
        reason = self.attributes.get("truncated")
        return str(reason) if reason is not None else None

    @property
    def sensitive(self) -> str | None:
        """Why the dump is sensitive; None when it is not."""
        reason = self.attributes.get("sensitive")
        return str(reason) if reason is not None else None

    @property
    def state(self) -> str:
        """`complete`, `trimmed` or `truncated`."""
        if is_trimmed(self.attributes):
            return TRIMMED
        return "truncated" if self.truncated else "complete"

    def with_attributes(self, attributes: Mapping[str, str | int]) -> Facts:
        """Return the facts with attributes that the collector adds, such as the length of a file that it compresses."""
        return replace(self, attributes={**self.attributes, **attributes})

    def key_fields(self) -> dict[str, str | int | None]:
        """Return the values of KEY_TEMPLATE."""
        date, hour = date_and_hour(self.timestamp)
        attributes = self.attributes
        return {
            "node": self.node,
            "name": self.name,
            "namespace": self.pod.namespace if self.pod else None,
            "pod": self.pod.pod if self.pod else None,
            "container": self.pod.container if self.pod else None,
            "comm": attributes.get("comm"),
            "pid": attributes.get("pid"),
            "signal": self.signal,
            "timestamp": self.timestamp,
            "date": date,
            "hour": hour,
        }

    def user_metadata(self) -> dict[str, str]:
        """Return the S3 user metadata: a few facts for people with only a browser, in ASCII."""
        values = {name: self.attributes.get(name) for name in ("pid", "signal", "comm")}
        values |= {"state": self.state, "sensitive": "true" if self.sensitive else "false"}
        return {name: _ascii(str(value)) for name, value in values.items() if value not in {None, ""}}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The dump as S3 has it."""

    key: str
    size_bytes: int
    crc32: int


def gather(dump: DumpFile, raw: dict[str, bytes], options: UploadOptions) -> Facts:
    """Put together what is known; attributes win over the name, since the helper wrote them."""
    attributes = read_attributes(raw)
    named = parse_name(dump.name)
    if named is not None:
        from_name: dict[str, str | int] = {
            "comm": named.comm,
            "timestamp": named.timestamp,
            "pid": named.pid,
            "signal": named.signal,
        }
        attributes = from_name | attributes
    timestamp = _number(attributes.get("timestamp"))
    pod = identity.find(attributes, options.pod_logs_directory)
    if pod is not None and attributes.get("identity_source") != "runtime":
        attributes.pop("container", None)  # of a label
        attributes |= identity.describe(pod)
    return Facts(
        name=dump.name,
        attributes=attributes,
        node=options.node_name,
        timestamp=dump.modified_at if timestamp is None else timestamp,
        pod=pod,
    )


def render(
    facts: Facts, stored: StoredObject, bucket: str, crash: Mapping[str, str | int] | None = None
) -> bytes:
    """Return the metadata object of a stored dump: one flat JSON object.

    Args:
        facts: of the dump.
        stored: its object.
        bucket: where that is.
        crash: what the core says: fingerprint, frames, build ID.
    """
    document: dict[str, str | int | bool] = {
        "schema": 1,
        "key": stored.key,
        "bucket": bucket,
        "size_bytes": stored.size_bytes,
        "crc32": encode_crc32(stored.crc32),
        "node": facts.node,
        "uploaded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "collector_version": __version__,
        "state": facts.state,
    }
    document |= facts.attributes
    document["sensitive"] = facts.sensitive is not None
    if facts.sensitive is not None:
        document["sensitive_reason"] = facts.sensitive
    document |= crash or {}
    rendered = json.dumps(document, indent=1).encode()
    if len(rendered) > MOST_BYTES:
        raise ValueError("the metadata object is longer than 64 KiB")  # attributes are bounded: cannot be
    return rendered + b"\n"


def record_key(record: Document, options: UploadOptions) -> str:
    """Return the key of a record: it is made of the record's content, so an object under it is the same record."""
    facts = dict(record.facts)
    timestamp = _number(facts.get("timestamp")) or 0
    pod = identity.find(facts, options.pod_logs_directory)
    described = Facts(record.name, facts, options.node_name, timestamp, pod)
    name = record.name.rpartition("/")[2]
    return build_record_key(options.prefix, options.key_template, described.key_fields(), name=name)


def render_record(record: Document, key: str, options: UploadOptions) -> bytes:
    """Return the JSON of dumps that were refused."""
    facts = dict(record.facts)
    pod = identity.find(facts, options.pod_logs_directory)
    document: dict[str, str | int] = {
        "schema": 1,
        "key": key,
        "bucket": options.bucket,
        "node": options.node_name,
        "uploaded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "collector_version": __version__,
        "state": "suppressed",
    }
    document |= facts
    if pod is not None:
        document |= {"namespace": pod.namespace, "pod": pod.pod}
    return json.dumps(document, indent=1).encode() + b"\n"


def _number(value: str | int | None) -> int | None:
    return value if isinstance(value, int) else None


def _ascii(text: str) -> str:
    cleaned = "".join(c if c.isascii() and c.isprintable() else "_" for c in text)
    return cleaned[:_MOST_METADATA_TEXT].strip() or "_"

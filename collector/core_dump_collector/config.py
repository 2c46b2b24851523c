"""Owns every setting: its name, default, unit and text. Nothing else reads the environment.

A setting has one name, used as the environment variable (`BUCKET_NAME`) and as the flag
(`--bucket-name`); the flag wins. Old names are aliases. `AWS_*` variables are boto3's own and are not repeated here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import socket
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core_dump_collector.awsvariables import check_environment
from core_dump_collector.errors import ConfigError
from core_dump_collector.options import MIN_BYTES_PER_SECOND, UploadOptions
from core_dump_format.keys import DEFAULT_TEMPLATE, check_template, parse_location

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

MEBIBYTE = 1024 * 1024
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_NOT_IN_NODE = re.compile(r"[^A-Za-z0-9._-]+")
_TAG = re.compile(r"[\w .:/=+@-]{1,128}")
MOST_TAGS = 10


def usable_name(host_name: str) -> str:
    """Return a host name without what a key cannot hold: before a host has a name, it is called `(none)`."""
    return _NOT_IN_NODE.sub("-", host_name).strip("-._")[:253] or "unknown"


class Settings(BaseSettings):
    """Every setting of the collector, checked before anything is touched."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    bucket_name: str = Field(
        description="Bucket for the dumps: a bare name, or `s3://bucket/prefix`. Required."
    )
    key_template: str = Field(
        DEFAULT_TEMPLATE,
        description="Key of a dump below the prefix. Fields: node, name, namespace, pod, container, "
        "comm, pid, signal, timestamp, date, hour.",
    )
    node_name: str = Field(
        default_factory=lambda: usable_name(socket.gethostname()),
        validate_default=True,
        description="Name of this node in keys and metadata. Default: the host name.",
    )
    workers: int = Field(4, ge=1, le=64, description="Number of processes that upload, 1 to 64.")
    max_upload_bytes_per_second: int = Field(
        0,
        ge=0,
        le=1 << 40,
        description="Bytes a second that dumps and modules together send at most; 0 for no limit, else at least 10000.",
    )
    file_patterns: Annotated[tuple[str, ...], NoDecode] = Field(
        ("core*",),
        description="Names of the files to collect: comma-separated shell patterns, e.g. `core*,*.hprof`.",
    )
    compress_raw: bool = Field(
        default=True,
        description="Compress raw cores (no `.gz`) while they are uploaded; false uploads them as they are.",
    )
    upload_sensitive: bool = Field(
        default=True,
        description="Upload dumps that are flagged sensitive, e.g. of set-uid programs; false leaves them on disk, "
        "and publishes no list and no file that was found behind them alone.",
    )
    metadata: bool = Field(
        default=True,
        validation_alias=AliasChoices("metadata", "sidecar"),
        description="Store a metadata object, `KEY.json`, with each dump. `SIDECAR` is an old name of this setting.",
    )
    fingerprint: bool = Field(
        default=True,
        description="Put a fingerprint of each crash into the metadata; one without frames is read, for 2 s at most.",
    )
    modules: bool = Field(
        default=True,
        description="Store the executables and libraries of crashed processes, each once, and a list of them with "
        "each dump, so that it can be opened wherever it is read. false: the helper copies none either.",
    )
    module_delay_seconds: float = Field(
        300,
        ge=0,
        le=86400,
        description="Executables and libraries are uploaded after a random time of up to so many seconds, so that "
        "nodes with the same ones do not all send them at once.",
    )
    checksum: Literal["when_supported", "when_required"] | None = Field(
        None,
        description="`when_required` for S3-compatible stores that refuse checksums (Backblaze B2, Ceph, Swift). "
        "Default: `AWS_REQUEST_CHECKSUM_CALCULATION`, else the profile's, else `when_supported`.",
    )
    conditional: Literal["auto", "true", "false"] = Field(
        "auto",
        description="Let the store refuse to overwrite objects (`If-None-Match`). `auto`: unless it refuses the "
        "header, and keys are looked at first until it has shown that it honours it; `true`: always, relying on it; "
        "`false`: never, keys are looked at instead.",
    )
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="`path` for S3-compatible stores that do not serve bucket host names."
    )
    storage_class: str | None = Field(
        None,
        pattern=r"^[A-Z_]{1,32}$",
        description="S3 storage class of dumps, e.g. `STANDARD_IA`; metadata objects stay in `STANDARD`.",
    )
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        None,
        description="Encryption of each object. Default: `aws:kms` with `KMS_KEY_ID`, else as the bucket says.",
    )
    kms_key_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9:/_-]{1,2048}$",
        description="KMS key (ID, ARN or alias) for `aws:kms` and `aws:kms:dsse`.",
    )
    expected_bucket_owner: str | None = Field(
        None, pattern=r"^\d{12}$", description="12-digit account that must own the bucket."
    )
    object_tags: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="Tags of each object: `key=value,key=value`, at most 10."
    )
    part_bytes: int = Field(
        16 * MEBIBYTE,
        ge=5 * MEBIBYTE,
        le=1024 * MEBIBYTE,
        description="Size of a part of a multipart upload; larger for a dump that would need more than 10,000 parts.",
    )
    connect_timeout_seconds: float = Field(10, gt=0, le=300, description="Time to connect to S3.")
    read_timeout_seconds: float = Field(
        60,
        gt=0,
        le=3600,
        description="A request that moves less than its share of 10 kB a second (an eighth, less while more "
        "requests are under way) for this long is ended.",
    )
    retry_seconds: float = Field(
        300, ge=1, le=86400, description="Longest pause between two attempts at one dump."
    )
    discard_after_seconds: float = Field(
        0,
        ge=0,
        description="Delete a dump that could not be uploaded so long after the collector first saw it; 0 never does. "
        "Only for nodes whose disk matters more than the dump.",
    )
    scan_seconds: float = Field(
        300,
        ge=1,
        le=86400,
        description="Pause between two scans of the directory, which find what inotify missed.",
    )
    shutdown_seconds: float = Field(
        60,
        ge=0,
        le=86400,
        description="Time that running uploads get after SIGTERM; all other dumps wait on disk.",
    )
    metrics_address: str = Field(
        "::",  # Prometheus scrapes from another host
        description="Address that serves /metrics, /livez and /readyz; `::` is every address, IPv6 and IPv4.",
    )
    metrics_port: int = Field(9412, ge=0, le=65535, description="Port of that address; 0 takes any free one.")
    startup_file: str | None = Field(
        None,
        description="File with the state in one word: `starting`, `ready` once the directory is "
        "collected, `dead` at the end. Written again every 5 s as a heartbeat.",
    )
    pod_logs_directory: str | None = Field(
        None,
        description="The kubelet's `/var/log/pods`, mounted read-only, from which the name of a dump's pod is read.",
    )
    kernel_log: Literal["auto", "off"] = Field(
        "auto",
        description="Read the kernel log and count the dumps that were lost before they reached the directory; `auto`: "
        "if this process may read it (CAP_SYSLOG), `off`: never.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Format of log lines; `auto` is text on a terminal, else JSON."
    )

    @property
    def bucket(self) -> str:
        """Return the bare bucket name."""
        return parse_location(self.bucket_name).bucket

    @property
    def prefix(self) -> str:
        """Return the key prefix, empty or ending in a slash."""
        return parse_location(self.bucket_name).prefix

    def upload_options(self) -> UploadOptions:
        """Return what workers need."""
        names = [field.name for field in dataclasses.fields(UploadOptions)]
        return UploadOptions(**{name: getattr(self, name) for name in names})

    @field_validator("bucket_name")
    @classmethod
    def _check_bucket(cls, value: str) -> str:
        parse_location(value)
        return value

    @field_validator("kms_key_id")
    @classmethod
    def _check_key(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("sse") == "AES256":
            raise ValueError("takes a key with SSE=aws:kms or aws:kms:dsse only")
        return value

    @field_validator("key_template")
    @classmethod
    def _check_template(cls, value: str) -> str:
        check_template(value)
        return value

    @field_validator("max_upload_bytes_per_second")
    @classmethod
    def _check_rate(cls, value: int) -> int:
        if 0 < value < MIN_BYTES_PER_SECOND:
            raise ValueError(f"takes 0 for no limit, or at least {MIN_BYTES_PER_SECOND} bytes a second")
        return value

    @field_validator("node_name")
    @classmethod
    def _check_node(cls, value: str) -> str:
        if not _NODE.fullmatch(value):
            raise ValueError("takes a host name: letters, digits, dot, dash, underscore, at most 253")
        return value

    @field_validator("file_patterns", mode="before")
    @classmethod
    def _split_patterns(cls, value: str | tuple[str, ...]) -> tuple[str, ...]:
        patterns = tuple(p.strip() for p in value.split(",")) if isinstance(value, str) else value
        for pattern in patterns:
            if not pattern or "/" in pattern or "\0" in pattern or pattern.startswith("."):
                raise ValueError("takes comma-separated file name patterns without '/', e.g. core*,*.hprof")
            re.compile(fnmatch.translate(pattern))
        return patterns

    @field_validator("object_tags", mode="before")
    @classmethod
    def _split_tags(cls, value: str | dict[str, str]) -> dict[str, str]:
        if isinstance(value, dict):
            return value
        tags = dict(pair.split("=", 1) for pair in value.split(",") if "=" in pair)
        whole = len(tags) == value.count(",") + 1 <= MOST_TAGS
        if not whole or not all(_TAG.fullmatch(k) and _TAG.fullmatch(v) for k, v in tags.items()):
            raise ValueError("takes key=value,key=value: at most 10, each key once, 1 to 128 characters")
        return tags


def load(flags: Mapping[str, str]) -> Settings:
    """Read the settings from flags, then the environment.

    Args:
        flags: field name to text, only those given on the command line.

    Raises:
        ConfigError: one line that names the setting and says what it takes.
    """
    check_environment()
    try:
        return Settings(**dict(flags))  # type: ignore[arg-type]  # pydantic parses the texts
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise ConfigError(_explain(name, first)) from None


def names_of(field: str) -> list[str]:
    """Return the names of a setting: the current one, then old ones that keep working."""
    alias = Settings.model_fields[field].validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [field]


def _explain(name: str, error: Any) -> str:  # noqa: ANN401  pydantic's ErrorDetails
    setting = name.upper()
    field: FieldInfo | None = next(
        (info for field, info in Settings.model_fields.items() if name in names_of(field)), None
    )
    if field is None:
        return f"{setting}: there is no such setting; core-dump-collector run --help lists them"
    if error["type"] == "missing":
        return f"{setting} is not set: set it to a bucket's name or s3://bucket/prefix"
    if str(error["input"]).startswith("tcp://"):
        return (
            f"{setting}={str(error['input'])[:80]!r}: Kubernetes has set this for a Service called "
            f"{setting.partition('_')[0].lower()!r}; set enableServiceLinks: false in the pod"
        )
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        reason = f"does not look like one. {field.description}"
    return f"{setting}={str(error['input'])[:80]!r}: {reason[:1].lower()}{reason[1:]}"


def describe(settings: Settings) -> dict[str, object]:
    """Return what the start-up log shows: every setting, and AWS_* variables with secrets masked."""
    shown: dict[str, object] = {k: v for k, v in settings.model_dump().items() if v is not None}
    for name in sorted(os.environ):
        if name.startswith("AWS_"):
            secret = any(word in name for word in ("SECRET", "TOKEN", "KEY", "CREDENTIALS"))
            shown[name] = "***" if secret and not name.endswith("_FILE") else os.environ[name]
    return shown


def render_markdown() -> str:
    """Return the table of docs/configuration.md."""
    rows = ["| setting | default | what |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{default_text(field)}`" if default_text(field) else ""
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def default_text(field: FieldInfo) -> str:
    """Return a setting's default as the environment would have it; empty if it has none."""
    if field.is_required() or field.default_factory is not None or field.default is None:
        return ""
    default = field.default
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    return text.lower() if isinstance(default, bool) else text

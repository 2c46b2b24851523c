"""Owns what names and attributes mean: pure functions, no file is touched here.

The grammar of names and the list of attributes are those of docs/contracts.md.
"""

from __future__ import annotations

import re
import string
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from core_dump_collector.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

PARTIAL_SUFFIX = ".partial"
QUARANTINE = "quarantine"
ATTRIBUTE_PREFIX = "user.coredump."
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".lz4", ".bz2", ".zip")
"""Files that are uploaded as they are: another gzip around them would help nobody."""

MOST_KEY_BYTES = 1000
"""S3 takes 1,024; the rest is for `-N` and `.json`. (Amazon S3 User Guide, "Creating object key names")"""
MOST_SEGMENT_BYTES = 240
"""Between slashes: some stores keep objects as files, whose names have 255 bytes."""
MOST_NAME_BYTES = 255
MOST_ATTRIBUTE_BYTES = 1024
MOST_SHOWN = 300

TEMPLATE_FIELDS = frozenset(
    ["node", "name", "namespace", "pod", "container", "comm", "pid", "signal", "timestamp", "date", "hour"]
)
UNKNOWN = "unknown"
"""Stands in a key for what nobody knows, such as the pod of a process outside Kubernetes."""

NUMBERS = frozenset(
    {"pid", "tid", "ns_pid", "uid", "gid", "signal", "timestamp", "rlimit", "dumpable", "threads"}
    | {"bytes", "expected_bytes", "duration_ms"}
)
TEXTS = frozenset(
    {"hostname", "comm", "exe", "cmdline", "thread", "cgroup", "container_id", "pod_uid"}
    | {"truncated", "sensitive", "compressor"}
)
ATTEMPT = ATTRIBUTE_PREFIX + "upload"
SALVAGED = ATTRIBUTE_PREFIX + "salvaged"
ATTRIBUTE_NAMES = frozenset(ATTRIBUTE_PREFIX + name for name in NUMBERS | TEXTS) | {ATTEMPT, SALVAGED}
_FORMS = {"container_id": re.compile(rb"[0-9a-f]{64}"), "pod_uid": re.compile(rb"[0-9a-f-]{36}")}
"""Attributes that become parts of paths and keys: anything else under these names is left out."""
TRUNCATED_REASONS = frozenset(
    {"killed", "max_dump_bytes", "keep_free", "max_total_bytes", "deadline", "disk_full"}
    | {"compressor_failed", "read_error", "not_elf", "salvaged"}
)

_NUMBERS_OF_NAME = r"-(?P<timestamp>[0-9]{1,20})-(?P<pid>[0-9]{1,10})-(?P<signal>[0-9]{1,3})"
_FIRST = re.compile(r"core-(?P<comm>[A-Za-z0-9._+-]*)" + _NUMBERS_OF_NAME + r"(?P<copy>)(\.gz)?")
_COPY = re.compile(r"core-(?P<comm>[A-Za-z0-9._+-]*)" + _NUMBERS_OF_NAME + r"-(?P<copy>[0-9]{1,4})(\.gz)?")
_LEAST_TIMESTAMP = 100_000_000
"""March 1973: a smaller number in its place is a pid, so what follows the signal is the number of a copy."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
_LITERAL = re.compile(r"[A-Za-z0-9!_.*'()=+,@/-]*")
_LAST_TIMESTAMP = 253_402_300_799
"""The end of the year 9999, where datetime ends."""


@dataclass(frozen=True, slots=True)
class CoreName:
    """What the name of a dump says."""

    comm: str
    timestamp: int
    """Unix seconds."""
    pid: int
    signal: int
    copy: int | None
    compressed: bool


def parse(name: str) -> CoreName | None:
    """Read a name of the grammar `core-%e-%t-%p-%s[-N][.gz]`; None for any other."""
    if len(name) > MOST_NAME_BYTES:
        return None
    match = _FIRST.fullmatch(name)
    if match is None or int(match["timestamp"]) < _LEAST_TIMESTAMP:
        as_copy = _COPY.fullmatch(name)
        if as_copy is not None and (match is None or int(as_copy["timestamp"]) >= _LEAST_TIMESTAMP):
            match = as_copy
    if match is None:
        return None
    copy = match["copy"]
    return CoreName(
        comm=match["comm"],
        timestamp=int(match["timestamp"]),
        pid=int(match["pid"]),
        signal=int(match["signal"]),
        copy=int(copy) if copy else None,
        compressed=name.endswith(".gz"),
    )


def is_partial(name: str) -> bool:
    """Tell whether a name is that of a dump still being written."""
    return name.endswith(PARTIAL_SUFFIX) and not name.startswith(".")


def is_candidate(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a name is one that the collector uploads."""
    if not name or name.startswith(".") or name == QUARANTINE or name.endswith(PARTIAL_SUFFIX):
        return False
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def display(name: str) -> str:
    """Return a name for people: printable, without surrogates, at most 300 characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown if len(shown) <= MOST_SHOWN else shown[: MOST_SHOWN - 1] + "…"


def unpartial(name: str) -> str:
    """Return the name under which a salvaged partial is published."""
    return name.removesuffix(PARTIAL_SUFFIX)


def with_copy(name: str, copy: int) -> str:
    """Return a name or key with `-COPY` before its `.gz`: a name already taken by other bytes."""
    if copy == 0:
        return name
    stem = name.removesuffix(".gz")
    return f"{stem}-{copy}{name[len(stem) :]}"


def is_compressed(name: str) -> bool:
    """Tell whether a file is uploaded as it is, by its name."""
    return name.endswith(COMPRESSED_SUFFIXES)


def check_template(template: str) -> None:
    """Check KEY_TEMPLATE.

    Raises:
        ConfigError: one line that says what is wrong with it.
    """
    known = ", ".join(f"{{{field}}}" for field in sorted(TEMPLATE_FIELDS))
    shown = f"KEY_TEMPLATE={display(template)!r}"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}; takes text and {known}") from None
    for literal, field, form, conversion in pieces:
        if field is not None and (field not in TEMPLATE_FIELDS or form or conversion):
            raise ConfigError(f"{shown}: {{{display(field)}}} is not a field; takes {known}")
        if not _LITERAL.fullmatch(literal):
            raise ConfigError(f"{shown}: takes A-Z a-z 0-9 and !_.*'()=+,@/- beside {known}")
    if not any(field is not None for _, field, _, _ in pieces):
        raise ConfigError(f"{shown}: holds no field, so all dumps would share one key; add {{name}}")
    if any(segment in {"", ".", ".."} for segment in template.split("/")):
        raise ConfigError(
            f"{shown}: takes no leading, trailing or double slash and no '.' or '..' between slashes"
        )


def clean(text: str) -> str:
    """Return text as one segment of a key: whitelisted characters, never empty, `.` or `..`."""
    cleaned = _UNSAFE.sub("_", text)
    return cleaned if cleaned.strip(".") else "_" * max(1, len(cleaned))


def build_key(prefix: str, template: str, fields: Mapping[str, str | int | None], *, suffix: str) -> str:
    """Return the key of a dump.

    Args:
        prefix: as configured, empty or ending in a slash.
        template: a KEY_TEMPLATE that `check_template` accepts.
        fields: values of the template; those that are missing or None are `unknown`.
        suffix: `.gz` where the object is gzip; added unless the key has it already.
    """
    values = {name: clean(str(_or_unknown(fields.get(name)))) for name in TEMPLATE_FIELDS}
    wanted = template.format_map(values).removesuffix(suffix)
    if not suffix and wanted.endswith(".json"):
        wanted += "_"  # a dump never takes the key of another dump's sidecar
    segments = [_shorten(segment, MOST_SEGMENT_BYTES - len(suffix)) for segment in wanted.split("/")]
    return _shorten(prefix + "/".join(segments), MOST_KEY_BYTES - len(suffix)) + suffix


def _shorten(text: str, room: int) -> str:
    """Cut a text that is too long, and keep it different from others that begin alike."""
    return text if len(text) <= room else f"{text[: room - 9]}-{zlib.crc32(text.encode()):08x}"


def _or_unknown(value: str | int | None) -> str | int:
    return UNKNOWN if value is None or value == "" else value


def date_and_hour(timestamp: int | None) -> tuple[str | None, str | None]:
    """Return `YYYY-MM-DD` and `HH` in UTC; None for a timestamp outside the calendar."""
    if timestamp is None or not 0 <= timestamp <= _LAST_TIMESTAMP:
        return None, None
    moment = datetime.fromtimestamp(timestamp, UTC)
    return moment.strftime("%Y-%m-%d"), moment.strftime("%H")


def read_attributes(raw: Mapping[str, bytes]) -> dict[str, str | int]:
    """Return the attributes that docs/contracts.md lists, checked and typed; others are left out.

    Args:
        raw: extended attributes by full name. They may have been written by anybody.
    """
    attributes: dict[str, str | int] = {}
    for full_name, value in raw.items():
        name = full_name.removeprefix(ATTRIBUTE_PREFIX)
        if len(value) > MOST_ATTRIBUTE_BYTES:
            continue
        if name in NUMBERS and re.fullmatch(rb"[0-9]{1,20}", value):
            attributes[name] = int(value)
        elif name in TEXTS and (name not in _FORMS or _FORMS[name].fullmatch(value)):
            attributes[name] = value.decode("utf-8", "backslashreplace")
    if attributes.get("truncated", "killed") not in TRUNCATED_REASONS:
        attributes["truncated"] = "read_error"
    return attributes

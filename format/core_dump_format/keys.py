"""Owns the keys of objects: KEY_TEMPLATE, safe segments, `s3://bucket/prefix` (docs/contracts.md)."""

from __future__ import annotations

import re
import string
import zlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_KEY_BYTES = 980
"""S3 accepts 1,024; the rest is for `-CRC32xSIZE` and `.modules.json`. (Amazon S3 User Guide, "Creating object key
names")"""
MOST_SEGMENT_BYTES = 220
"""Between slashes: some stores keep objects as files, whose names have at most 255 bytes."""
TEMPLATE_FIELDS = frozenset(
    ["node", "name", "namespace", "pod", "container", "comm", "pid", "signal", "timestamp", "date", "hour"]
)
DEFAULT_TEMPLATE = "dumps/{date}/{node}/{name}"
"""Dumps have a folder of their own, so that a rule that deletes old dumps does not touch the modules of young ones."""
FORMER_TEMPLATE = "{node}/{name}"
"""The default before modules were stored."""
MODULES_FOLDER = "_modules"
"""Below the prefix; no key of a dump begins with it."""
MODULES_LIST_SUFFIX = ".modules.json"
"""Added to the key of a dump, for the list of its modules."""
UNKNOWN = "unknown"
"""Replaces a missing value in a key, such as the pod of a process outside Kubernetes."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()=+/-]{0,512}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
_LITERAL = re.compile(r"[A-Za-z0-9!_.*'()=+,@/-]*")
_LAST_TIMESTAMP = 253_402_300_799
"""The end of the year 9999, where datetime ends."""


class Location(NamedTuple):
    """A bucket and the prefix of all keys in it."""

    bucket: str
    prefix: str
    """Empty, or ending in a slash."""


def parse_location(text: str) -> Location:
    """Parse a bucket's name or `s3://bucket/prefix`.

    Raises:
        ValueError: it is neither; the message says what is accepted.
    """
    address = text[5:] if text.startswith("s3://") else text
    bucket, _, prefix = address.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("takes a bucket's name (3 to 63 of a-z 0-9 . -) or s3://bucket/prefix")
    if not _PREFIX.fullmatch(prefix) or ".." in prefix or "//" in prefix:
        raise ValueError("takes a prefix of A-Z a-z 0-9 and !_.*'()/=+- without '..' or '//'")
    prefix = prefix.strip("/")
    return Location(bucket, prefix + "/" if prefix else "")


def check_template(template: str) -> None:
    """Check KEY_TEMPLATE.

    Raises:
        ValueError: one line that says what is accepted.
    """
    known = ", ".join(f"{{{field}}}" for field in sorted(TEMPLATE_FIELDS))
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; takes text and {known}") from None
    fields = [piece[1:] for piece in pieces if piece[1] is not None]
    for field, form, conversion in fields:
        if field not in TEMPLATE_FIELDS or form or conversion:
            raise ValueError(f"{{{printable(field)}}} is not a field; takes {known}")
    if not all(_LITERAL.fullmatch(literal) for literal, _, _, _ in pieces):
        raise ValueError(f"takes A-Z a-z 0-9 and !_.*'()=+,@/- as well as {known}")
    if not fields:
        raise ValueError("holds no field, so all dumps would share one key; add {name}")
    if any(segment in {"", ".", ".."} for segment in template.split("/")):
        raise ValueError("takes no leading, trailing or double slash and no '.' or '..' between slashes")
    if template.startswith(f"{MODULES_FOLDER}/"):
        raise ValueError(f"takes another first folder than {MODULES_FOLDER}, which is that of modules")


def literal_folder(template: str) -> str:
    """Return the folders in which all keys of a template are, such as `dumps/`; empty if there is none."""
    folder, slash, _ = template.partition("{")[0].rpartition("/")
    return folder + slash


def module_key(prefix: str, sha256: str) -> str:
    """Return the key of the module whose content has this SHA-256 (hexadecimal)."""
    return f"{prefix}{MODULES_FOLDER}/sha256/{sha256}"


def clean_segment(text: str) -> str:
    """Return text as one segment of a key: only whitelisted characters, never empty, `.` or `..`."""
    cleaned = _UNSAFE.sub("_", text)
    return cleaned if cleaned.strip(".") else "_" * max(1, len(cleaned))


def build_key(prefix: str, template: str, fields: Mapping[str, str | int | None], *, suffix: str) -> str:
    """Return the key of a dump.

    Args:
        prefix: as configured, empty or ending in a slash.
        template: a KEY_TEMPLATE that `check_template` accepts.
        fields: values of the template; a missing value becomes `unknown`.
        suffix: `.gz` if the object is gzip; added unless the key has it already.
    """
    values = {name: clean_segment(str(_or_unknown(fields.get(name)))) for name in TEMPLATE_FIELDS}
    wanted = template.format_map(values)
    if suffix and wanted.endswith(suffix):
        wanted = wanted[: -len(suffix)]
    if not suffix and wanted.endswith((".json", ".modules")):
        wanted += "_"  # neither the dump nor its metadata object may take a key that belongs to another dump
    if wanted.startswith(f"{MODULES_FOLDER}/"):
        wanted = f"_{wanted}"
    segments = [_shorten(segment, MOST_SEGMENT_BYTES - len(suffix)) for segment in wanted.split("/")]
    return _shorten(prefix + "/".join(segments), MOST_KEY_BYTES - len(suffix)) + suffix


def build_record_key(prefix: str, template: str, fields: Mapping[str, str | int | None], *, name: str) -> str:
    """Return the key of a record that has no dump, in the folder of the node's dumps of that time.

    Args:
        prefix: as configured, empty or ending in a slash.
        template: a KEY_TEMPLATE that `check_template` accepts.
        fields: values of the template.
        name: the last segment, which ends in `.json`.
    """
    folders = template.split("/")[:-1]
    if not any("{node}" in folder for folder in folders):
        folders.append("{node}")
    return build_key(prefix, "/".join([*folders, name[:-5]]), fields, suffix="") + name[-5:]


def _shorten(text: str, room: int) -> str:
    """Cut a text that is too long; a checksum keeps it different from others with the same beginning."""
    return text if len(text) <= room else f"{text[: room - 9]}-{zlib.crc32(text.encode()):08x}"


def _or_unknown(value: str | int | None) -> str | int:
    return UNKNOWN if value is None or value == "" else value


def date_and_hour(timestamp: int | None) -> tuple[str | None, str | None]:
    """Return `YYYY-MM-DD` and `HH` in UTC; None for a timestamp outside the calendar."""
    if timestamp is None or not 0 <= timestamp <= _LAST_TIMESTAMP:
        return None, None
    moment = datetime.fromtimestamp(timestamp, timezone.utc)
    return moment.strftime("%Y-%m-%d"), moment.strftime("%H")

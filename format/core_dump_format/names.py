"""Owns the names of dumps: `core-%e-%t-%p-%s[-N|-CRC32xSIZE][.gz][.partial]` (docs/contracts.md)."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

PARTIAL_SUFFIX = ".partial"
QUARANTINE = "quarantine"
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".lz4", ".bz2", ".zip")
"""Files that are uploaded as they are: compressing them a second time saves nothing."""
MOST_NAME_BYTES = 255

_COMM = r"core-(?P<comm>[A-Za-z0-9._+-]*)"
_NUMBERS = r"-(?P<timestamp>[0-9]{1,20})-(?P<pid>[0-9]{1,10})-(?P<signal>[0-9]{1,3})"
_COPY = r"-(?P<copy>[0-9]{1,4})"
_PATTERNS = tuple(
    re.compile(_COMM + numbers + r"(\.gz)?")
    for numbers in (
        _NUMBERS + "(?P<copy>)",
        _NUMBERS + _COPY,
        _NUMBERS.replace("{1,20}", "{9,20}") + _COPY + "(-[0-9]{1,4})+",
    )
)
"""With no number of a copy, one, or several: a dump named `-1` gets the key `-1-1` where its own is taken."""
_MARK = re.compile(r"-(?P<content>[0-9a-f]{8}x[0-9a-f]{1,12})(?=(\.gz)?$)")
LEAST_TIMESTAMP = 100_000_000
"""March 1973: a smaller number in the timestamp's place is a pid, so the numbers after the signal count copies."""


class CoreName(NamedTuple):
    """The fields of a dump's name."""

    comm: str
    timestamp: int
    """Unix seconds."""
    pid: int
    signal: int
    copy: int | None
    compressed: bool
    content: str = ""
    """The CRC-32 and the size of the object, `1a2b3c4dx5f3a`, in a key that is made of them."""


def parse_name(name: str) -> CoreName | None:
    """Parse the name of a dump; return None if it does not follow the grammar."""
    if len(name) > MOST_NAME_BYTES:
        return None
    mark = _MARK.search(name)
    match = _match(name[: mark.start()] + name[mark.end() :] if mark else name)
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
        content=mark["content"] if mark else "",
    )


def _match(name: str) -> re.Match[str] | None:
    """Return the match with a possible time; otherwise the first match."""
    first = None
    for pattern in _PATTERNS:
        match = pattern.fullmatch(name)
        if match is not None and int(match["timestamp"]) >= LEAST_TIMESTAMP:
            return match
        first = first or match
    return first


def is_partial(name: str) -> bool:
    """Tell whether a name belongs to a dump that is still being written."""
    return name.endswith(PARTIAL_SUFFIX) and not name.startswith(".")


def is_candidate(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether the collector uploads files of this name."""
    if not name or name.startswith(".") or name == QUARANTINE or name.endswith(PARTIAL_SUFFIX):
        return False
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def unpartial(name: str) -> str:
    """Return the name under which a salvaged partial is published."""
    return name[: -len(PARTIAL_SUFFIX)] if name.endswith(PARTIAL_SUFFIX) else name


def with_copy(name: str, copy: int | str) -> str:
    """Return a name or key with `-COPY` before its `.gz`, for a name that other bytes have taken.

    Args:
        name: the wanted name or key.
        copy: a number, 0 for the name itself; or what `content_mark` returns.
    """
    if copy == 0:
        return name
    stem = name[:-3] if name.endswith(".gz") else name
    return f"{stem}-{copy}{name[len(stem) :]}"


def content_mark(size_bytes: int, crc32: int) -> str:
    """Return what makes a key an object's own: another object would need the same CRC-32 and the same size."""
    return f"{crc32:08x}x{size_bytes:x}"


def is_compressed(name: str) -> bool:
    """Tell by its name whether a file is already compressed, and so uploaded unchanged."""
    return name.endswith(COMPRESSED_SUFFIXES)

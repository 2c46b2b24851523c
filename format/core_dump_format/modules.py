"""Owns the files behind a crash: their names in `.modules/`, and the list that belongs to a dump (docs/contracts.md).

Anybody may have written a list or a name: no byte is trusted, and every number has a bound.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

DIRECTORY = ".modules"
"""In the watch directory. The collector creates it."""
COLLECTOR_MARK = "collector"
"""File in it whose time the collector sets; without it, nobody takes modules."""
MARK_SECONDS = 24 * 3600
"""The mark is good for so long."""
KNOWN_SECONDS = 7 * 24 * 3600
"""A node copies a file again after so long, even if it has not changed."""
SUFFIX = ".gz"
LIST_SUFFIX = ".json"
LIST_VERSION = 1

MOST_MODULES = 4096
MOST_LIST_BYTES = 4 << 20
MOST_PATH_BYTES = 4096
MOST_MODULE_BYTES = 1 << 40
_HEAD_BYTES = 4096
"""More than a list without modules takes."""
MOST_DUMP_NAME_BYTES = 242
"""A name has 255 bytes; the rest is for `.json.partial`."""
MISSING_REASONS = frozenset(
    {"not_regular", "file_system", "not_readable", "too_large", "changed", "busy", "gone", "read_error"}
    | {"limit", "budget", "disk_full", "deadline", "not_captured"}
)
UNKNOWN_REASON = "unknown"
"""Replaces a reason that a newer release has written."""

_MODULE = re.compile(r"module-(?P<sha256>[0-9a-f]{64})(?P<sensitive>-sensitive)?\.gz")
_SHA256 = re.compile(r"[0-9a-f]{64}")
BUILD_ID = re.compile(r"[0-9a-f]{8,128}")
_ADDRESS = re.compile(r"0x[0-9a-f]{1,16}")
_DUMP = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*")
_SENSITIVE = re.compile(r"[a-z0-9_=-]{1,64}")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
_UNESCAPED = re.compile(r"[^\\\ud800-\udfff]*")


class ListError(ValueError):
    """The bytes are not a list of modules; the message says why."""


class Module(NamedTuple):
    """One file of which the crashed process had mapped executable pages."""

    path: bytes
    """As the kernel shows it to the node, ` (deleted)` included."""
    start: int
    """Address of its first mapping; NT_FILE in the core has the same."""
    end: int
    """Address behind its last mapping."""
    offset: int
    """Offset in the file of the first mapping."""
    build_id: str = ""
    """Hexadecimal; empty if unknown. A hint: strip keeps it, and anybody can forge it."""
    size_bytes: int = 0
    """Of the file; 0 if it is missing."""
    sha256: str = ""
    """Of the file's content, hexadecimal; empty if it is missing."""
    missing: str = ""
    """Why the file was not kept: one of MISSING_REASONS or UNKNOWN_REASON."""


class ModuleList(NamedTuple):
    """The modules of one dump."""

    dump: str
    """Name of the dump in the watch directory."""
    modules: tuple[Module, ...] = ()
    left_out: int = 0
    """Further files with executable pages that a limit kept from the list; at least so many."""
    sensitive: str = ""
    """Why the dump is sensitive; empty if it is not."""


class ModuleName(NamedTuple):
    """The fields of a module's name."""

    sha256: str
    is_sensitive: bool
    """It was found behind sensitive dumps only."""


def module_name(sha256: str, *, is_sensitive: bool) -> str:
    """Return the name of a module in `.modules/`."""
    return "module-" + sha256 + ("-sensitive" if is_sensitive else "") + SUFFIX


def parse_module_name(name: str) -> ModuleName | None:
    """Parse a name in `.modules/`; return None if it is not a module's."""
    match = _MODULE.fullmatch(name)
    return ModuleName(match["sha256"], bool(match["sensitive"])) if match else None


def list_name(dump: str) -> str:
    """Return the name in `.modules/` of a dump's list.

    Raises:
        ValueError: no list can have the name.
    """
    if len(dump) > MOST_DUMP_NAME_BYTES or not _DUMP.fullmatch(dump):
        raise ValueError("not the name of a dump with a list")
    return dump + LIST_SUFFIX


def parse_list_name(name: str) -> str | None:
    """Return the name of the dump to which a file in `.modules/` belongs; None if it is no list."""
    dump = name[: -len(LIST_SUFFIX)]
    is_list = name.endswith(LIST_SUFFIX) and len(dump) <= MOST_DUMP_NAME_BYTES and _DUMP.fullmatch(dump)
    return dump if is_list else None


def escape_path(path: bytes) -> str:
    r"""Return a path as text from which `unescape_path` makes the same bytes.

    Bytes that are not UTF-8, characters that do not print and the backslash become `\xNN`.
    """
    text = path.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return "".join("\\x%02x" % byte for byte in character.encode("utf-8", "surrogateescape"))


def unescape_path(text: str) -> bytes:
    """Return the bytes of a path that `escape_path` has written.

    Raises:
        ListError: it has written no such text.
    """
    pieces = _ESCAPE.split(text)
    if not all(_UNESCAPED.fullmatch(piece) for piece in pieces[::2]):
        raise ListError("a path is not escaped")
    path = bytearray()
    for number, piece in enumerate(pieces):
        path += bytes([int(piece, 16)]) if number % 2 else piece.encode()
    return bytes(path)


def render_list(listed: ModuleList) -> bytes:
    """Return the JSON text of a list; modules that exceed a bound are counted as left out."""
    rows: list[str] = []
    room = MOST_LIST_BYTES - _HEAD_BYTES
    for module in listed.modules[:MOST_MODULES]:
        if len(module.path) <= MOST_PATH_BYTES:
            rows.append(json.dumps(_as_row(module)))
            room -= len(rows[-1]) + 2
        if room < 0:
            del rows[-1]
            break
    head = {"version": LIST_VERSION, "dump": listed.dump}
    head.update({"sensitive": listed.sensitive} if listed.sensitive else {})
    head.update({"left_out": listed.left_out + len(listed.modules) - len(rows)})
    text = json.dumps(head)[:-1] + ', "modules": [\n' + ",\n".join(rows) + "\n]}\n"
    return text.encode()


def _as_row(module: Module) -> dict[str, str | int]:
    row: dict[str, str | int] = {"path": escape_path(module.path)}
    row.update({name: "0x%x" % getattr(module, name) for name in ("start", "end", "offset")})
    if module.build_id:
        row["build_id"] = module.build_id
    row.update(
        {"missing": module.missing}
        if module.missing
        else {"bytes": module.size_bytes, "sha256": module.sha256}
    )
    return row


def parse_list(content: bytes) -> ModuleList:
    """Parse a list of modules; fields that are not known are ignored.

    Raises:
        ListError: it is not one, or exceeds a bound.
    """
    if len(content) > MOST_LIST_BYTES:
        raise ListError("longer than %d bytes" % MOST_LIST_BYTES)
    try:
        document = json.loads(
            content.decode(), parse_int=_parse_int, parse_float=_refuse, parse_constant=_refuse
        )
    except ListError:
        raise
    except (ValueError, RecursionError) as error:
        raise ListError("not JSON: %s" % type(error).__name__) from None
    if not isinstance(document, dict):
        raise ListError("not an object")
    version, rows = document.get("version"), document.get("modules")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ListError("no version")
    if version > LIST_VERSION:
        raise ListError("of a newer version, %d" % version)
    if not isinstance(rows, list) or len(rows) > MOST_MODULES:
        raise ListError("no modules, or more than %d" % MOST_MODULES)
    return ModuleList(
        dump=_text(document, "dump", _DUMP, MOST_DUMP_NAME_BYTES),
        modules=tuple(_parse_rows(rows)),
        left_out=_number(document, "left_out", 1 << 32, 0),
        sensitive=_text(document, "sensitive", _SENSITIVE, 64, ""),
    )


def _parse_rows(rows: list[Any]) -> Iterable[Module]:
    for row in rows:
        if not isinstance(row, dict):
            raise ListError("a module is not an object")
        start, end, offset = (int(_text(row, name, _ADDRESS, 18), 16) for name in ("start", "end", "offset"))
        if start >= end:
            raise ListError("a module ends before it starts")
        path = unescape_path(_text(row, "path", None, 4 * MOST_PATH_BYTES))
        if not path or len(path) > MOST_PATH_BYTES or b"\0" in path:
            raise ListError("a path is empty, too long or holds NUL")
        module = Module(path, start, end, offset, _text(row, "build_id", BUILD_ID, 128, ""))
        if "missing" in row:
            reason = _text(row, "missing", None, 64)
            yield module._replace(missing=reason if reason in MISSING_REASONS else UNKNOWN_REASON)
        else:
            size = _number(row, "bytes", MOST_MODULE_BYTES)
            yield module._replace(size_bytes=size, sha256=_text(row, "sha256", _SHA256, 64))


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise ListError("a number has more than 20 digits")
    return int(digits)


def _refuse(_text: str) -> None:
    raise ListError("a number is not an integer")


def _text(
    row: dict[str, Any], name: str, form: re.Pattern[str] | None, most: int, default: str | None = None
) -> str:
    value = row.get(name, default)
    if not isinstance(value, str) or len(value) > most:
        raise ListError("%s is not a text of at most %d characters" % (name, most))
    if value != default and form is not None and not form.fullmatch(value):
        raise ListError("%s has another form" % name)
    return value


def _number(row: dict[str, Any], name: str, most: int, default: int | None = None) -> int:
    value = row.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ListError("%s is not a number from 0 to %d" % (name, most))
    return value

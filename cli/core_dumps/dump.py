"""Owns one dump as the bucket shows it: its key, its listing, and its metadata once read. Nothing of it is trusted."""

from __future__ import annotations

import json
import signal as signals
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core_dump_format.attributes import METADATA_FIELDS, METADATA_FLAGS, METADATA_NUMBERS, TRIMMED, is_trimmed

if TYPE_CHECKING:
    from collections.abc import Mapping

METADATA_SUFFIX = ".json"
MOST_METADATA_BYTES = 64 * 1024
"""The limit of docs/contracts.md; a longer metadata object is not read."""
MOST_NUMBER = 2**64 - 1
"""The largest number that the attributes can hold."""
STATES = frozenset(
    {
        "present",
        "trimmed",
        "truncated",
        "sensitive",
        "incomplete",
        "damaged",
        "unreadable",
        "missing",
        "suppressed",
    }
    | {"unread"}
)
"""Everything that STATE shows."""
DELETED = " (deleted)"
"""The kernel appends it to the path of a program that was replaced or deleted (d_path in fs/d_path.c)."""

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump, its metadata object, or both."""

    key: str
    """Key of the dump object, whether that exists or not."""
    size_bytes: int | None
    """Size of the dump object; None if there is only a metadata object."""
    timestamp: int
    """Unix seconds of the crash according to the name; the object's last change if the name does not say."""
    has_metadata: bool
    """Whether the bucket holds a metadata object."""
    from_key: Mapping[str, Value]
    """Facts that the key contains."""
    metadata: Mapping[str, Value] | None = None
    """Fields of the metadata object, once read."""
    damage: str | None = None
    """Why the metadata object was refused."""
    has_modules: bool = False
    """Whether the bucket holds a list of the modules."""
    failure: str | None = None
    """Why the store did not give the metadata object."""

    def get(self, field: str) -> Value | None:
        """Return a fact; metadata wins over the key, in which unusual characters were replaced."""
        if self.metadata is not None and field in self.metadata:
            return self.metadata[field]
        return self.from_key.get(field)

    def text(self, field: str) -> str | None:
        """Return a fact as text."""
        value = self.get(field)
        return None if value is None else str(value)

    def number(self, field: str) -> int | None:
        """Return a fact as a number."""
        value = self.get(field)
        return value if isinstance(value, int) else None

    @property
    def sensitive(self) -> bool:
        """Tell whether the metadata flags the dump."""
        return self.get("sensitive") is True

    @property
    def truncated(self) -> bool:
        """Tell whether the dump was cut short on its node."""
        return self.get("state") == "truncated" or self.get("truncated") is not None

    @property
    def trimmed(self) -> str | None:
        """Return why memory was left out of the dump on purpose; None if none was, or if the dump was also cut."""
        facts = {name: self.get(name) for name in (TRIMMED, "truncated") if self.get(name) is not None}
        return self.text(TRIMMED) if is_trimmed(facts) else None

    @property
    def states(self) -> list[str]:
        """Return the warnings about a dump; `present` if there are none."""
        if self.size_bytes is None:
            return ["suppressed" if self.get("state") == "suppressed" else "missing"]
        if not self.has_metadata:
            return ["incomplete"]
        if self.failure is not None:
            return ["unreadable"]
        if self.damage is not None:
            return ["damaged"]
        if self.metadata is None:
            return ["unread"]
        found = ["trimmed"] if self.trimmed else ["truncated"] if self.truncated else []
        found += ["sensitive"] if self.sensitive else []
        return found or ["present"]

    @property
    def signal_name(self) -> str | None:
        """Return a name such as `SIGSEGV`; the number if it has no name."""
        number = self.number("signal")
        return None if number is None else signal_name(number)

    @property
    def fingerprint_version(self) -> int:
        """Return the version of the fingerprint; the first one is not recorded."""
        return self.number("fingerprint_version") or 1

    @property
    def compressed(self) -> bool:
        """Tell whether the object is gzip."""
        return self.key.endswith(".gz")

    @property
    def executable(self) -> str | None:
        """Return the path of the executable without the kernel's ` (deleted)`."""
        path = self.text("exe")
        return None if path is None else path.removesuffix(DELETED)

    @property
    def program(self) -> str:
        """Return the executable's path, or the best name known."""
        return self.executable or self.text("comm") or self.text("thread") or "?"

    def with_metadata(self, document: bytes) -> Dump:
        """Return the dump with its metadata, or with the reason for which that was refused."""
        try:
            return replace(self, metadata=read_metadata(document, self.key))
        except ValueError as error:
            return replace(self, metadata={}, damage=str(error))

    def with_failure(self, reason: str) -> Dump:
        """Return the dump with the reason for which the store did not give its metadata."""
        return replace(self, metadata={}, failure=reason)


def read_metadata(document: bytes, key: str) -> dict[str, Value]:
    """Return the checked fields of a metadata object; unknown fields and wrong types are left out.

    Raises:
        ValueError: it is not a metadata object of this key.
    """
    if len(document) > MOST_METADATA_BYTES:
        raise ValueError("longer than 64 KiB")
    try:
        content: Any = json.loads(document)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  the data is wrong, not the call
    fields: dict[str, Value] = {name: value for name, value in content.items() if _is_of_type(name, value)}
    if fields.get("key", key) != key:
        raise ValueError("describes the dump of another key")
    return fields


def _is_of_type(name: str, value: object) -> bool:
    if name in METADATA_NUMBERS:
        return type(value) is int and 0 <= value <= MOST_NUMBER
    return isinstance(value, bool if name in METADATA_FLAGS else str) and name in METADATA_FIELDS


def signal_name(number: int) -> str:
    """Return a name such as `SIGSEGV`; the number if it has no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return str(number)


def signal_number(text: str) -> int | None:
    """Return the number of `SIGSEGV`, `segv` or `11`; None for any other text."""
    if text.isascii() and text.isdecimal():
        return int(text[:4])
    name = text.upper().removeprefix("SIG")
    found = signals.Signals.__members__.get(f"SIG{name}")
    return None if found is None else int(found)

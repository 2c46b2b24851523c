"""Owns one dump as the bucket shows it: its key, its listing, and its sidecar once read. Nothing of it is trusted."""

from __future__ import annotations

import json
import signal as signals
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core_dump_format.attributes import METADATA_FIELDS, METADATA_FLAGS, METADATA_NUMBERS

if TYPE_CHECKING:
    from collections.abc import Mapping

SIDECAR_SUFFIX = ".json"
MOST_SIDECAR_BYTES = 64 * 1024
"""As docs/contracts.md has it; a longer one is not read."""
MOST_NUMBER = 2**64 - 1
"""What fits into the attributes; a larger number is no fact."""

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump, its sidecar, or both."""

    key: str
    """Of the dump object, whether it is there or not."""
    size_bytes: int | None
    """Of the object; None where there is only a sidecar."""
    timestamp: int
    """Unix seconds of the crash, by the name; of the object's last change where the name does not say."""
    has_sidecar: bool
    named: Mapping[str, Value]
    """What the key says."""
    told: Mapping[str, Value] | None = None
    """What the sidecar says, once read."""
    damage: str | None = None
    """Why the sidecar was refused."""

    def get(self, field: str) -> Value | None:
        """Return a fact; the sidecar wins over the key, which may have been made safe."""
        if self.told is not None and field in self.told:
            return self.told[field]
        return self.named.get(field)

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
        """Whether the sidecar flags it."""
        return self.get("sensitive") is True

    @property
    def states(self) -> list[str]:
        """Return what to know before using it; `present` when there is nothing to know."""
        if self.size_bytes is None:
            return ["suppressed" if self.get("state") == "suppressed" else "missing"]
        if not self.has_sidecar:
            return ["incomplete"]
        if self.damage is not None:
            return ["damaged"]
        if self.told is None:
            return ["unread"]
        found = ["truncated"] if self.get("state") == "truncated" or self.get("truncated") else []
        found += ["sensitive"] if self.sensitive else []
        return found or ["present"]

    @property
    def signal_name(self) -> str | None:
        """Return `SIGSEGV` and the like; the number where it has no name."""
        number = self.number("signal")
        return None if number is None else signal_name(number)

    @property
    def compressed(self) -> bool:
        """Whether the object is gzip."""
        return self.key.endswith(".gz")

    @property
    def program(self) -> str:
        """Return the executable's path, or the best name there is."""
        return self.text("exe") or self.text("comm") or self.text("thread") or "?"

    def with_sidecar(self, document: bytes) -> Dump:
        """Return it with what a sidecar says, or with why that was refused."""
        try:
            return replace(self, told=read_sidecar(document, self.key))
        except ValueError as error:
            return replace(self, told={}, damage=str(error))


def read_sidecar(document: bytes, key: str) -> dict[str, Value]:
    """Check and type what a sidecar says; fields that are not known, or not of their type, are left out.

    Raises:
        ValueError: it is no sidecar of this key.
    """
    if len(document) > MOST_SIDECAR_BYTES:
        raise ValueError("longer than 64 KiB")
    try:
        content: Any = json.loads(document)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  a fault of the data
    told: dict[str, Value] = {name: value for name, value in content.items() if _is_of_type(name, value)}
    if told.get("key", key) != key:
        raise ValueError("it speaks of another key")
    return told


def _is_of_type(name: str, value: object) -> bool:
    if name in METADATA_NUMBERS:
        return type(value) is int and 0 <= value <= MOST_NUMBER
    return isinstance(value, bool if name in METADATA_FLAGS else str) and name in METADATA_FIELDS


def signal_name(number: int) -> str:
    """Return `SIGSEGV` and the like; the number where it has no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return str(number)


def signal_number(text: str) -> int | None:
    """Return the number of `SIGSEGV`, `segv` or `11`; None for anything else."""
    if text.isascii() and text.isdecimal():
        return int(text[:4])
    name = text.upper().removeprefix("SIG")
    found = signals.Signals.__members__.get(f"SIG{name}")
    return None if found is None else int(found)

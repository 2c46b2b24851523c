"""Owns which dumps a command line selects: MATCH words as in coredumpctl, node, namespace and times. Pure.

Matches of one field are alternatives; matches of different fields must all hold (as journalctl(1) combines them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from core_dump_format.attributes import METADATA_FIELDS, METADATA_NUMBERS, TRUNCATED_REASONS
from core_dumps.dump import DELETED, STATES, Dump, signal_number
from core_dumps.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IN_KEYS = frozenset({"key", "node", "pid", "signal", "timestamp", "thread"})
"""Fields that keys of the default template contain; if a key does not contain one, the metadata decides."""
WORD = "word"
"""Pseudo-field of a bare word, which any name of a dump can match."""
_NAMES = ("comm", "thread", "pod", "container", "node", "hostname")
_YES, _NO = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})
_FINGERPRINT = re.compile(r"[0-9a-f]{4,16}")


@dataclass(frozen=True, slots=True)
class Query:
    """A selection of dumps."""

    matches: tuple[tuple[str, str], ...] = ()
    """Field and value."""
    since: float = 0.0
    until: float = float("inf")
    """Unix seconds, both included."""

    def values(self, field: str) -> list[str]:
        """Return the values given for a field; empty if any value matches."""
        return [value for name, value in self.matches if name == field]

    def only(self, field: str) -> str | None:
        """Return the value given for a field if there is exactly one, and it is no pattern."""
        values = self.values(field)
        return values[0] if len(values) == 1 and not _is_pattern(values[0]) else None

    @property
    def selects_everything(self) -> bool:
        """Tell whether nothing restricts the query."""
        return not self.matches and not self.since and self.until == float("inf")

    @property
    def needs_metadata(self) -> bool:
        """Tell whether keys alone cannot decide the query."""
        return any(field not in IN_KEYS for field, _ in self.matches)

    def may_match(self, dump: Dump) -> bool:
        """Tell whether a dump can match, judged by its key and listing alone."""
        if not self.since <= dump.timestamp <= self.until:
            return False
        known = [f for f, _ in self.matches if f == "key" or (f in IN_KEYS and f in dump.from_key)]
        return all(_holds(dump, field, self.values(field)) for field in known)

    def matches_dump(self, dump: Dump) -> bool:
        """Tell whether a dump matches whose metadata was read."""
        return self.may_match(dump) and all(_holds(dump, f, self.values(f)) for f, _ in self.matches)


def parse(words: Sequence[str], **fixed: str | None) -> tuple[tuple[str, str], ...]:
    """Parse MATCH words, and the values of options that stand for a field.

    Raises:
        UsageError: no dump can match a word.
    """
    found = [_parse_word(word) for word in words]
    found += [(field, value) for field, value in fixed.items() if value is not None]
    return tuple(found)


def field_name(text: str) -> str:
    """Return the name of a field, which may be written as coredumpctl does.

    Raises:
        UsageError: there is no such field.
    """
    name = text.removeprefix("COREDUMP_").lower()
    if name not in METADATA_FIELDS:
        raise UsageError(f"{text[:40]!r} is not a field; fields are {', '.join(sorted(METADATA_FIELDS))}")
    return name


def _parse_word(word: str) -> tuple[str, str]:
    field, separator, value = word.partition("=")
    if separator and "/" not in field:
        name = field_name(field)
        accepted = _accepted(name, value)
        if accepted is not None:
            raise UsageError(f"{name}={value[:40]}: {name} takes {accepted}")
        return name, value
    if not word:
        raise UsageError("MATCH is empty: takes a PID, a name, a path or field=value")
    if word.isascii() and word.isdecimal():
        return "pid", word
    return ("exe" if word.startswith("/") else WORD), word


def _accepted(field: str, value: str) -> str | None:  # noqa: PLR0911  a table
    """Return what a field accepts if it does not accept the value."""
    if field == "signal":
        return "SIGSEGV, SEGV or 11" if signal_number(value) is None else None
    if field in METADATA_NUMBERS:
        return None if value.isascii() and value.isdecimal() else "a number"
    if field == "state":
        return None if value in STATES | {"complete"} else ", ".join(sorted(STATES))
    if field == "truncated":
        return (
            None if value in TRUNCATED_REASONS or _is_pattern(value) else ", ".join(sorted(TRUNCATED_REASONS))
        )
    if field == "sensitive":
        return None if value.lower() in _YES | _NO else "true or false"
    if field == "fingerprint":
        return None if _FINGERPRINT.fullmatch(value) else "4 to 16 hexadecimal digits"
    return None


def _is_pattern(value: str) -> bool:
    return any(character in value for character in "*?[")


def _like(text: str | None, wanted: list[str]) -> bool:
    """Tell whether a text is one of the values, or fits one that is a shell pattern."""
    if text is None:
        return False
    return text in wanted or any(_is_pattern(value) and fnmatchcase(text, value) for value in wanted)


def _holds(dump: Dump, field: str, wanted: list[str]) -> bool:
    test = _TESTS.get(field)
    return test(dump, wanted) if test else _like(dump.text(field), wanted)


def _any_like(dump: Dump, fields: Sequence[str], wanted: list[str]) -> bool:
    return any(_like(dump.text(field), wanted) for field in fields)


_TESTS: dict[str, Callable[[Dump, list[str]], bool]] = {
    "key": lambda dump, wanted: _like(dump.key, wanted),
    "word": lambda dump, wanted: any(_like(name, wanted) for name in _names(dump)),
    "comm": lambda dump, wanted: _any_like(dump, ("comm", "thread"), wanted),
    "exe": lambda dump, wanted: _like(dump.executable, [value.removesuffix(DELETED) for value in wanted]),
    "signal": lambda dump, wanted: dump.number("signal") in [signal_number(text) for text in wanted],
    "state": lambda dump, wanted: any(text in dump.states or text == dump.text("state") for text in wanted),
    "sensitive": lambda dump, wanted: dump.sensitive in [text.lower() in _YES for text in wanted],
    "fingerprint": lambda dump, wanted: (dump.text("fingerprint") or "").startswith(tuple(wanted)),
    "image": lambda dump, wanted: any(_like(name, wanted) for name in _image_names(dump)),
    "pid": lambda dump, wanted: any(dump.text(name) in wanted for name in ("pid", "ns_pid")),
}
"""How a field is compared where equality with wildcards is not what people mean. A dump's key holds the name of its
thread, which some users know better than that of the process."""


def _names(dump: Dump) -> list[str]:
    """Return the names that a person may know a dump by."""
    file_name = dump.key.rpartition("/")[2]
    names = [dump.text(field) for field in _NAMES]
    names += [dump.key, file_name, file_name.removesuffix(".gz")]
    names += [(dump.executable or "").rpartition("/")[2], dump.executable]
    return [name for name in names if name]


def _image_names(dump: Dump) -> list[str]:
    """Return the names of a dump's image: `shop.example:5000/app:1.2`, `app:1.2`, both without tag, and the digest."""
    asked = dump.text("image") or ""
    image, _, digest = asked.partition("@")
    names = [asked, image, image.rpartition("/")[2]]
    names += [name.rpartition(":")[0] for name in names[1:] if ":" in name.rpartition("/")[2]]
    return [name for name in [*names, digest, dump.text("image_digest")] if name]

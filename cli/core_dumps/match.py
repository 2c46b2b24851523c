"""Owns which dumps are meant: MATCH as coredumpctl reads it, node, namespace and times. Pure.

Matches of one field are alternatives, different fields must all hold (as journalctl(1) combines them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core_dump_format.attributes import METADATA_FIELDS
from core_dumps.dump import Dump, signal_number
from core_dumps.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMED = frozenset({"key", "node", "pid", "signal", "timestamp", "thread"})
"""What a key says, where it is of the default template: such matches read no sidecar of a dump that does not."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which dumps are meant."""

    matches: tuple[tuple[str, str], ...] = ()
    """(field, value)."""
    since: float = 0.0
    until: float = float("inf")
    """Unix seconds, both included."""

    def values(self, field: str) -> list[str]:
        """Return the values asked for of a field; empty for any."""
        return [value for name, value in self.matches if name == field]

    def only(self, field: str) -> str | None:
        """Return the one value asked for of a field."""
        values = self.values(field)
        return values[0] if len(values) == 1 else None

    @property
    def needs_sidecars(self) -> bool:
        """Whether a key alone cannot tell all that is asked."""
        return any(field not in NAMED for field, _ in self.matches)

    def may_match(self, dump: Dump) -> bool:
        """Tell whether a dump can be meant, by its key and listing alone."""
        if not self.since <= dump.timestamp <= self.until:
            return False
        return all(_holds(dump, f, self.values(f)) for f, _ in self.matches if f in NAMED and _known(dump, f))

    def matches_dump(self, dump: Dump) -> bool:
        """Tell whether a dump whose sidecar was read is meant."""
        return self.may_match(dump) and all(_holds(dump, f, self.values(f)) for f, _ in self.matches)


def parse(words: Sequence[str], **fixed: str | None) -> tuple[tuple[str, str], ...]:
    """Read MATCH words, and fields that have an option of their own.

    Raises:
        UsageError: a word is no match.
    """
    found = [_parse_word(word) for word in words]
    found += [(field, value) for field, value in fixed.items() if value is not None]
    return tuple(found)


def _parse_word(word: str) -> tuple[str, str]:
    field, separator, value = word.partition("=")
    if separator and "/" not in field:
        name = field.removeprefix("COREDUMP_").lower()
        if name not in METADATA_FIELDS:
            raise UsageError(f"{field[:40]!r} is no field; there are {', '.join(sorted(METADATA_FIELDS))}")
        if name == "signal" and signal_number(value) is None:
            raise UsageError(f"{value[:40]!r} is no signal: takes SIGSEGV, SEGV or 11")
        return name, value
    if not word:
        raise UsageError("MATCH is empty: takes a PID, a command name, a path or field=value")
    if word.isascii() and word.isdecimal():
        return "pid", word
    return ("exe" if "/" in word else "comm"), word


def _known(dump: Dump, field: str) -> bool:
    return field == "key" or field in dump.named


def _holds(dump: Dump, field: str, wanted: list[str]) -> bool:  # noqa: PLR0911  a table
    match field:
        case "key":
            return dump.key in wanted
        case "comm":  # the name in the key is that of the thread, which is the better known one at times
            return any(dump.text(name) in wanted for name in ("comm", "thread"))
        case "signal":
            return dump.number("signal") in [signal_number(text) for text in wanted]
        case "state":
            return any(text in dump.states or text == dump.text("state") for text in wanted)
        case "sensitive":
            return dump.sensitive in [text.lower() in {"1", "true", "yes"} for text in wanted]
        case "fingerprint":
            return any(len(text) > 3 and (dump.text(field) or "").startswith(text) for text in wanted)  # noqa: PLR2004
        case "pid":
            return any(dump.text(name) in wanted for name in ("pid", "ns_pid"))
        case _:
            return dump.text(field) in wanted

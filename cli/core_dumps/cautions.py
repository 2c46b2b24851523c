"""Owns the warnings that a user must read before using a dump. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_dump_format.attributes import TRIMMED
from core_dumps import show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.dump import Dump


def cautions(dump: Dump) -> Iterator[str]:
    """Yield a line for each warning about a dump."""
    if dump.trimmed:
        yield f"this dump was trimmed on its node ({dump.trimmed}): {trimmed_note(dump)}"
    elif dump.truncated:
        yield f"this dump was cut short on its node ({dump.text('truncated') or 'unknown reason'})"
    if dump.sensitive:
        reason = dump.text("sensitive_reason") or "unknown reason"
        yield f"this dump is sensitive ({reason}): it may contain another user's secrets"
    if not dump.has_metadata:
        yield "this dump has no metadata object; its upload may be incomplete"
    if dump.damage:
        yield f"the metadata object of this dump is damaged: {dump.damage}"


def trimmed_note(dump: Dump) -> str:
    """Describe the memory that is missing from a trimmed dump."""
    if dump.text(TRIMMED) == "metadata":
        return "it has headers and notes, but no memory"
    dropped = dump.number("dropped_bytes")
    amount = "memory" if dropped is None else f"{show.size(dropped)} of memory"
    return f"{amount} was left out; backtraces do not need it"

"""Owns what tells the acts of the neighbour from faults: its journal, the content that it plants, its files outside."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

from tests.torture.neighbour import MARK, SECRET

from core_dump_format.names import parse_name, unpartial

if TYPE_CHECKING:
    from pathlib import Path


def is_planted(body: bytes) -> bool:
    """Tell whether an object holds what the neighbour writes: MARK, or less where it was truncated.

    A file that the neighbour compressed may be compressed once more by the collector.
    """
    for _ in range(2):
        if body[:2] == b"\x1f\x8b":
            try:
                body = zlib.decompressobj(31).decompress(body, 4096)
            except zlib.error:
                return False
    return MARK.startswith(body[: len(MARK)]) or body == b"\x1f"


class Journal:
    """What the neighbour has done to root's dumps."""

    def __init__(self, path: Path) -> None:
        """Read the lines; the last one of an act tells its outcome."""
        acts = [json.loads(line) for line in path.read_text().splitlines()]
        last = {number: (names, outcome) for number, _, names, outcome in acts}
        done = [names for names, outcome in last.values() if outcome in {"begun", "done"}]
        self.names = {name for names in done for name in names}

    def pids(self) -> set[int]:
        """Return the pids of the dumps that it touched."""
        return {parsed.pid for name in self.names if (parsed := parse_name(unpartial(name)))}


def changed_outside(outside: Path) -> list[str]:
    """Return a complaint for each file outside that was changed or deleted."""
    paths = [outside / name for name in ("secret", "own")]
    changed = [path for path in paths if not path.is_file() or path.read_bytes() != SECRET]
    return [f"outside/{path.name} was changed or deleted" for path in changed]

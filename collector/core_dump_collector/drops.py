"""Owns the reading of what the helper refused: its records in `.helper/`, see docs/contracts.md."""

from __future__ import annotations


class DropRecords:
    """Counts what the helper refused since this daemon started."""

    def __init__(self, directory: str) -> None:
        """Remember the directory; nothing is read yet."""
        self._directory = directory

    def read_new(self) -> dict[str, int]:
        """Return how many dumps were refused since the last call, by reason."""
        return {}

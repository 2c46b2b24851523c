"""Owns the interface through which a selection reads memory, of a held process or of a raw core. Pure."""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Iterator


class Pages:
    """The memory of a process, or a raw core."""

    page = 4096
    refused = 0
    """Pages that were left out because reading them could take for ever."""

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, up to the first page that cannot be read."""
        raise NotImplementedError

    def fetch(self, address: int, size: int) -> bytes:
        """Like `read`, but have absent pages brought in, which may wait for ever where a file is mapped."""
        return self.read(address, size)

    def resident(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that hold data."""
        raise NotImplementedError

    def obtainable(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that hold data, or would after a read that certainly ends."""
        return self.resident(start, end)

    def survey(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of a range that are known, and whether they hold data; by default, those that do."""
        for first, last in self.resident(start, end):
            yield first, last, True

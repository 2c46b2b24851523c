"""Owns reading numbers of DWARF from bytes that may be hostile. Pure."""

from __future__ import annotations

from struct import Struct, error


class UnwindError(ValueError):
    """The information is missing, damaged, or of a kind that is not supported."""


class Cursor:
    """Reads numbers from bytes; raises UnwindError at their end."""

    def __init__(self, content: bytes, at: int = 0) -> None:
        """Start at an offset."""
        self.content, self.at = content, at

    def fixed(self, layout: str) -> int:
        """Return a number of a struct layout."""
        struct = Struct("<" + layout)
        try:
            (value,) = struct.unpack_from(self.content, self.at)
        except error:
            raise UnwindError("it ends early") from None
        self.at += struct.size
        return int(value)

    def uleb(self) -> int:
        """Return an unsigned LEB128 number."""
        value = shift = 0
        while shift < 70:
            byte = self.fixed("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise UnwindError("a number is too long")

    def sleb(self) -> int:
        """Return a signed LEB128 number."""
        start = self.at
        value = self.uleb()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if self.content[self.at - 1] & 0x40 else value

    def block(self, size: int) -> bytes:
        """Return bytes."""
        found = self.content[self.at : self.at + size]
        if len(found) < size:
            raise UnwindError("it ends early")
        self.at += size
        return found

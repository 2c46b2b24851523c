"""Owns fitting a trimmed dump into its limit. Imported only where a dump is trimmed."""

from __future__ import annotations

from core_dump_format.trim import Content, Trimmed

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.front import Front

MAX_FITTINGS = 8
"""Dropping memory changes the number of program headers, and so the length again."""


def fit(front: Front, content: Content, page: int, limit: int) -> tuple[Trimmed, Content]:
    """Return the layout of a trimmed dump and its content, of which the last bytes are dropped until it fits.

    Args:
        front: of the kernel's core.
        content: the memory, the most important first.
        page: bytes of a page.
        limit: length of the dump; 0 means no limit.
    """
    order = Trimmed(front, content, page)
    for _ in range(MAX_FITTINGS):
        if not limit or order.length <= limit or not content.pieces:
            break
        pieces = _shorten(content.pieces, order.length - limit, page)
        content = Content(pieces, content.vital_pieces, content.untouched)
        order = Trimmed(front, content, page)
    return order, content


def _shorten(pieces: list[tuple[int, int, bytes]], excess: int, page: int) -> list[tuple[int, int, bytes]]:
    """Return the pieces without at least `excess` of their last bytes, in whole pages."""
    pieces = list(pieces)
    while pieces and excess > 0:
        index, address, content = pieces.pop()
        kept = (len(content) - excess) // page * page
        if kept > 0:
            pieces.append((index, address, content[:kept]))
        excess -= len(content)
    return pieces

"""Owns the plot of `stats`: crashes over time, as bars of text."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STEPS = (60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400, 365 * 86400)
"""Seconds that a row can stand for."""
MOST_ROWS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def plot(timestamps: Sequence[int], width: int, encoding: str | None = None) -> Iterator[str]:
    """Yield a row for each step of time from the first to the last crash, with a bar for the number of crashes."""
    eighths_known = _can_encode(encoding)
    first, last = min(timestamps), max(timestamps)
    step = next(
        (s for s in STEPS if (last - first) // s < MOST_ROWS), max(STEPS[-1], (last - first) // MOST_ROWS + 1)
    )
    counts = Counter((moment - first) // step for moment in timestamps)
    most, room = max(counts.values()), max(10, min(width, 100) - 30)
    for row in range((last - first) // step + 1):
        count = counts[row]
        eighths = max(count * room * 8 // most, 1) if count else 0
        bar = (
            "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip() if eighths_known else "#" * -(-eighths // 8)
        )
        yield f"{_label(first + row * step)} {bar} {count}".rstrip()


def _can_encode(encoding: str | None) -> bool:
    try:
        f"█{_EIGHTHS}".encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _label(timestamp: int) -> str:
    try:
        return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"@{timestamp}".ljust(16)

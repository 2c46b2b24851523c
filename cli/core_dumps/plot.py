"""Owns the plot of `stats`: how many crashes when, as bars of text."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STEPS = (60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400, 365 * 86400)
"""Lengths of a row in seconds."""
MOST_ROWS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def plot(timestamps: Sequence[int], width: int) -> Iterator[str]:
    """Yield a row for each step of time between the first and the last crash, with a bar of their number."""
    first, last = min(timestamps), max(timestamps)
    step = next(
        (s for s in STEPS if (last - first) // s < MOST_ROWS), max(STEPS[-1], (last - first) // MOST_ROWS + 1)
    )
    counts = Counter((moment - first) // step for moment in timestamps)
    most, room = max(counts.values()), max(10, min(width, 100) - 30)
    for row in range((last - first) // step + 1):
        count = counts[row]
        eighths = max(count * room * 8 // most, 1) if count else 0
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"{_label(first + row * step)} {bar} {count}".rstrip()


def _label(timestamp: int) -> str:
    try:
        return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"@{timestamp}".ljust(16)

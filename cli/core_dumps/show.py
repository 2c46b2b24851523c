"""Owns how facts become text: escaped, sized, dated, coloured. All text from a bucket goes through here."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from typing import TYPE_CHECKING

from core_dump_format.text import printable

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console
    from rich.text import Text

_STATE_STYLES = {
    "present": "green",
    "trimmed": "cyan",
    "truncated": "yellow",
    "sensitive": "magenta",
    "incomplete": "yellow",
    "unreadable": "red",
    "damaged": "red",
}
_UNIT = 1024.0
_SUFFIXES = "BKMGTPE"
_LAST_TIMESTAMP = 253_402_214_400
_SPANS = (("y", 31_557_600), ("month", 2_629_800), ("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
"""Units of systemd.time(7)."""


def never_fail_on_a_character() -> None:
    """Escape characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def size(count: int | None) -> str:
    """Return a number of bytes as coredumpctl does: 1.2M."""
    if count is None:
        return "-"
    amount, unit = float(count), 0
    while amount >= _UNIT and unit < len(_SUFFIXES) - 1:
        amount, unit = amount / _UNIT, unit + 1
    return f"{amount:.1f}{_SUFFIXES[unit]}" if unit else f"{count}B"


def count(number: int, noun: str) -> str:
    """Return `1 dump` or `2 dumps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def moment(timestamp: int) -> str:
    """Return Unix seconds as local time, as coredumpctl does."""
    if not 0 <= timestamp < _LAST_TIMESTAMP:
        return f"@{timestamp}"
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(timestamp))


def ago(timestamp: int, now: float | None = None) -> str:
    """Return the time since Unix seconds, as coredumpctl does: `2h 5min ago`."""
    left = int((time.time() if now is None else now) - timestamp)
    direction, left = ("left", -left) if left < 0 else ("ago", left)
    parts: list[str] = []
    for name, seconds in _SPANS:
        if left >= seconds and len(parts) < 2:  # noqa: PLR2004  the two largest units
            parts.append(f"{left // seconds}{name}")
            left %= seconds
    return f"{' '.join(parts) or '0s'} {direction}"


def states(names: list[str]) -> Text:
    """Return states, coloured."""
    from rich.text import Text  # noqa: PLC0415  --help does not need it

    return Text(",").join(Text(name, style=_STATE_STYLES.get(name, "")) for name in names)


def coloured_state(name: str) -> str:
    """Return a state with the escape sequences of its colour."""
    from rich.color import ColorSystem  # noqa: PLC0415  --help does not need it
    from rich.style import Style  # noqa: PLC0415  likewise

    return Style.parse(_STATE_STYLES.get(name, "none")).render(name, color_system=ColorSystem.STANDARD)


def console(file: TextIO | None = None) -> Console:
    """Return a console: colours only on a terminal, none with NO_COLOR; markup in content is not interpreted."""
    from rich import console as rich_console  # noqa: PLC0415  --help does not need it

    class PipedConsole(rich_console.Console):
        """A console that leaves a closed pipe to its caller; rich would end the process with status 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipedConsole(file=file or sys.stdout, markup=False, highlight=False, emoji=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line for the user to standard error."""
    sys.stderr.write(f"core-dumps: {printable(text, 2000)}\n")

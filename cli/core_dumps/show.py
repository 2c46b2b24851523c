"""Owns how facts become text: escaped, sized, dated, coloured. All that comes from a bucket goes through here."""

from __future__ import annotations

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
    "truncated": "yellow",
    "sensitive": "magenta",
    "incomplete": "yellow",
    "damaged": "red",
}
_UNIT = 1024.0
_SUFFIXES = "BKMGTPE"
_LAST_TIMESTAMP = 253_402_214_400


def size(count: int | None) -> str:
    """Return bytes as coredumpctl does: 1.2M."""
    if count is None:
        return "-"
    amount, unit = float(count), 0
    while amount >= _UNIT and unit < len(_SUFFIXES) - 1:
        amount, unit = amount / _UNIT, unit + 1
    return f"{amount:.1f}{_SUFFIXES[unit]}" if unit else f"{count}B"


def moment(timestamp: int) -> str:
    """Return Unix seconds as local time, as coredumpctl does."""
    if not 0 <= timestamp < _LAST_TIMESTAMP:
        return f"@{timestamp}"
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(timestamp))


def states(names: list[str]) -> Text:
    """Return states, coloured."""
    from rich.text import Text  # noqa: PLC0415  --help does without

    return Text(",").join(Text(name, style=_STATE_STYLES.get(name, "")) for name in names)


def coloured_state(name: str) -> str:
    """Return a state with the escapes of its colour."""
    from rich.color import ColorSystem  # noqa: PLC0415  --help does without
    from rich.style import Style  # noqa: PLC0415  likewise

    return Style.parse(_STATE_STYLES.get(name, "none")).render(name, color_system=ColorSystem.STANDARD)


def console(file: TextIO | None = None) -> Console:
    """Return a console: colours only on a terminal, none with NO_COLOR, nothing of the content interpreted."""
    from rich.console import Console  # noqa: PLC0415  --help does without

    return Console(file=file or sys.stdout, markup=False, highlight=False, emoji=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell the user something that is not the answer."""
    sys.stderr.write(f"core-dumps: {printable(text, 2000)}\n")

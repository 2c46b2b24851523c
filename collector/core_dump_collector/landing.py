"""Owns the page at `/`, which shows people the state of the daemon. Pure.

Crashed processes choose the names on it, and everybody who reaches the port can read it. Names are therefore escaped,
and the page has no keys, no messages of the store and no settings except the directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from core_dump_collector import __version__
from core_dump_format.text import printable

MOST_DUMPS = 10
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #17803d; --bad: #c0262d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .2rem 0; } a { margin-right: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.name { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --bad: #f87171; } }
"""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Recent:
    """A dump whose attempt has ended."""

    name: str
    outcome: str
    at: float
    """Unix seconds."""
    is_good: bool


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of the page."""

    name: str
    text: str
    is_good: bool = True


@dataclass(frozen=True, slots=True)
class Overview:
    """State of the daemon at its last heartbeat."""

    node: str = ""
    facts: tuple[Fact, ...] = ()
    recent: tuple[Recent, ...] = ()


def render(overview: Overview, why_not_ready: str) -> bytes:
    """Return the page; `why_not_ready` is empty if the daemon is ready."""
    state = Fact("State", why_not_ready or "ready", not why_not_ready)
    facts = "".join(
        f"<tr><th>{_text(f.name)}</th>{_cell(f.text, f.is_good)}</tr>\n" for f in (state, *overview.facts)
    )
    dumps = "".join(
        f'<tr><td>{_time(dump.at)}</td><td class="name">{_text(dump.name)}</td>'
        f"{_cell(dump.outcome, dump.is_good)}</tr>\n"
        for dump in overview.recent
    )
    none = "" if dumps else "<p>None since the collector was started.</p>"
    table = (
        f"<table>\n<tr><th>Time (UTC)</th><th>File</th><th>Outcome</th></tr>\n{dumps}</table>"
        if dumps
        else none
    )
    title = f"core-dump-collector on {_text(overview.node)}"
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>Version {_text(__version__)}</p>
<p><a href="/metrics">/metrics</a><a href="/livez">/livez</a><a href="/readyz">/readyz</a></p>
<h2>State</h2>
<table>
{facts}</table>
<h2>Last {MOST_DUMPS} dumps</h2>
{table}
</body></html>
"""
    return page.encode()


def sized(number: float) -> str:
    """Return a number of bytes for people."""
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:  # noqa: PLR2004  binary units
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{number:.0f} {_UNITS[0]}"


def _text(text: str) -> str:
    return escape(printable(text))


def _cell(text: str, is_good: bool) -> str:  # noqa: FBT001  a colour
    return f'<td class="{"good" if is_good else "bad"}">{_text(text)}</td>'


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")

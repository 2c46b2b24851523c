"""Owns words for points in time, those of systemd.time(7): `yesterday`, `-2h`, `3 days ago`, ISO 8601, `@seconds`.

Times without a zone are local time, as in coredumpctl.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from core_dumps.errors import UsageError

_SECONDS = {
    ("s", "sec", "secs", "second", "seconds"): 1,
    ("m", "min", "mins", "minute", "minutes"): 60,
    ("h", "hr", "hour", "hours"): 3600,
    ("d", "day", "days"): 86400,
    ("w", "week", "weeks"): 604800,
    ("M", "month", "months"): 2629800,
    ("y", "year", "years"): 31557600,
}
_UNITS = {word: seconds for words, seconds in _SECONDS.items() for word in words}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]+)?")
_DAYS = {"today": 0, "yesterday": -1, "tomorrow": 1}
_HELP = "takes for example yesterday, -2h, '3 days ago', 2025-06-30, '2025-06-30 14:00', @1751284800"


def parse(text: str, now: datetime | None = None) -> float:
    """Return the Unix seconds of a time in words.

    Args:
        text: the words.
        now: the present, with a zone; default is the local time.

    Raises:
        UsageError: they are not a time.
    """
    now = now or datetime.now(UTC).astimezone()
    words = " ".join(text.split())
    try:
        return _parse(words, now).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{text[:60]!r} is not a time: {_HELP}") from None


def span(text: str) -> float:
    """Return the seconds of a span such as `2h` or `1d 12h`.

    Raises:
        UsageError: it is not a span.
    """
    try:
        return _span(text)
    except ValueError:
        raise UsageError(f"{text[:60]!r} is not a time span: takes for example 90min, 2h, 7d") from None


def _parse(words: str, now: datetime) -> datetime:
    if words == "now":
        return now
    if words in _DAYS:
        day = (now + timedelta(days=_DAYS[words])).replace(tzinfo=None)
        return _local(day.replace(hour=0, minute=0, second=0, microsecond=0), now)
    if words.startswith("@"):
        return datetime.fromtimestamp(float(words[1:]), UTC)
    if words[:1] in {"-", "+"}:
        return now + timedelta(seconds=_span(words[1:]) * (-1 if words[0] == "-" else 1))
    if words.endswith((" ago", " left")):
        span, _, direction = words.rpartition(" ")
        return now + timedelta(seconds=_span(span) * (-1 if direction == "ago" else 1))
    return _absolute(words, now)


def _absolute(words: str, now: datetime) -> datetime:
    zone = UTC if words.endswith(" UTC") else None
    words = words.removesuffix(" UTC")
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", words):
        words = f"{now:%Y-%m-%d} {words.zfill(len('00:00') if words.count(':') == 1 else len('00:00:00'))}"
    words = re.sub(r"^[A-Z][a-z]{2} (?=\d{4}-)", "", words)  # "Thu 2025-06-30", as systemd prints it
    moment = datetime.fromisoformat(words)
    if moment.tzinfo is not None:
        return moment
    return moment.replace(tzinfo=zone) if zone else _local(moment, now)


def _local(moment: datetime, now: datetime) -> datetime:
    """Return a moment in UTC if `now` is in UTC, otherwise in the machine's zone at that moment."""
    return moment.replace(tzinfo=UTC) if now.tzinfo is UTC else moment.astimezone()


def _span(text: str) -> float:
    """Return the seconds of `2h 30min`; ValueError for anything else."""
    rest = text.strip()
    if not rest:
        raise ValueError
    seconds, at = 0.0, 0
    while at < len(rest):
        match = _SPAN.match(rest, at)
        if match is None:
            raise ValueError
        unit = match[2] or "s"
        if unit not in _UNITS:
            raise ValueError
        seconds += float(match[1]) * _UNITS[unit]
        at = match.end() + len(rest[match.end() :]) - len(rest[match.end() :].lstrip())
    return seconds

"""Owns how text from a crashed process, a file name or a bucket is shown in a log, a message or a terminal."""

from __future__ import annotations

MOST_SHOWN = 300


def printable(text: object, most: int = MOST_SHOWN) -> str:
    """Return text that cannot steer a terminal or start a new log line.

    Characters that do not print become backslash escapes; the result has at most `most` characters.
    """
    plain = str(text)
    if len(plain) <= most and plain.isprintable():
        return plain
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"

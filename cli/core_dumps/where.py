"""Owns WHERE: the program's own frames of a crash, the newest first, in short words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_dump_format.frames import decode

if TYPE_CHECKING:
    from core_dump_format.frames import Place


def where(frames: str) -> str:
    """Return the program's own frames: `parse (app+0x1235) < main`; all frames if none is the program's own.

    Frames that only end the process are left out: raise, abort, panics, sanitizers, C libraries.
    """
    places, is_deep = decode(frames)
    shown = [place for place in places if not place.is_runtime] or places
    words = [
        _first(place) if number == 0 else place.name or place.where for number, place in enumerate(shown)
    ]
    return " < ".join(words + ["..."] * is_deep)


def words(frames: str) -> list[str]:
    """Return one word for each frame, with the name of its file."""
    return [place.text() for place in decode(frames)[0]]


def stack(frames: str) -> list[str]:
    """Return a line for each frame, numbered as debuggers do: `#0 parse (app+0x1235)`."""
    places, is_deep = decode(frames)
    lines = [f"#{number} {_first(place)}" for number, place in enumerate(places)]
    return lines + ["... recursion goes on"] * is_deep


def _first(place: Place) -> str:
    return f"{place.name} ({place.where})" if place.name else place.where

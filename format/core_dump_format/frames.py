"""Owns frames as text: where a thread was, as file and offset, with a function's name where it is known. Pure.

`~` marks a frame that only carries out the death (`runtime`). The text is an attribute of a dump and a field of its
metadata object (docs/contracts.md, "Frames").
"""

from __future__ import annotations

from struct import error

from core_dump_format.guess import guess
from core_dump_format.runtime import is_runtime, readable
from core_dump_format.walk import Walk

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.walk import Frame, Process

MAX_OWN, MAX_RUNTIME = 16, 3
MAX_MODULE, MAX_NAME = 64, 48
"""Characters of a file's name and of a function's."""
MAX_BYTES = 520
"""Of all frames as an attribute."""
RECURSION = "..."
"""The last word where recursion was not followed to its end."""
MIN_REPEATS = 3
UNKNOWN = "?"


class Place:
    """One frame, independent of where the kernel put the file."""

    def __init__(self, module: str, offset: int, name: str = "", *, is_runtime: bool = False) -> None:
        """Store names of file and function, the offset in the file, and whether it only carries out the death."""
        self.module, self.offset, self.name, self.is_runtime = module, offset, name, is_runtime

    @property
    def where(self) -> str:
        """Return `file+0xoffset`."""
        return "%s+0x%x" % (self.module, self.offset) if self.module else UNKNOWN

    def text(self, module: str | None = None, *, named: bool = True) -> str:
        """Return the frame as text, without the file's name if that is `module`."""
        where = self.where[len(self.module) :] if self.module and self.module == module else self.where
        name = "=" + self.name if named and self.name else ""
        return ("~" if self.is_runtime else "") + where + name


def find_places(process: Process, registers: dict[int, int], *, has_files: bool) -> tuple[list[Place], bool]:
    """Return where a thread was, the newest frame first, and whether recursion was not followed to its end.

    Args:
        process: its memory and files.
        registers: of the thread, by DWARF number.
        has_files: whether any of its files can be read.
    """
    if not has_files:
        return _places(process, guess(process, registers), has_asked=False), False
    walk = Walk(process)
    frames = walk.run(registers)
    places = _places(process, frames, has_asked=walk.has_asked())
    return places, walk.is_cut and bool(_recurring(places))


def _places(process: Process, frames: list[Frame], *, has_asked: bool) -> list[Place]:
    places = []
    for number, frame in enumerate(frames):
        place = _place(process, frame)
        if place is None and number:
            continue  # code that a program generated at run time
        place = place or Place("", 0)
        if number == 0:
            place.is_runtime = place.is_runtime or has_asked
            has_asked = place.is_runtime
        elif frame.in_handler and has_asked:
            place.is_runtime = True
        places.append(place)
    return places


def _place(process: Process, frame: Frame) -> Place | None:
    mapping = process.mapping_at(frame.lookup)
    if mapping is None:
        return None
    name = b""
    try:
        found = process.object_at(frame.lookup)
        name = found[0].name_at(frame.lookup + found[1]) if found else b""
    except (ValueError, OSError, error):
        pass
    module, function = clean(mapping.name, MAX_MODULE), clean(readable(name), MAX_NAME)
    offset = frame.address - mapping.start + mapping.offset
    return Place(module, offset, function, is_runtime=is_runtime(module, function))


def clean(text: str, limit: int) -> str:
    """Return text in plain ASCII without the characters that separate frames and their parts."""
    kept = "".join(c if "!" <= c <= "~" and c not in "=~" else "_" for c in text[:limit])
    return "_" + kept[1:] if kept[:1] == "+" else kept


def _own(places: list[Place]) -> list[Place]:
    return [place for place in places if not place.is_runtime and place.module]


def _recurring(places: list[Place]) -> list[Place]:
    """Return the program's own places that occur several times, each once."""
    own = _own(places)
    counts: dict[str, int] = {}
    for place in own:
        counts[place.where] = counts.get(place.where, 0) + 1
    return list({place.where: place for place in own if counts[place.where] >= MIN_REPEATS}.values())


def choose(places: list[Place], *, is_deep: bool) -> list[Place]:
    """Return the places that tell the crash: the program's own, each once in succession, and the newest of the runtime.

    Where recursion was not followed to its end, the places behind the first are those that recur, each once: the
    thread may die in any of them.
    """
    own = _own(places)
    if is_deep:
        own = [*own[:1], *_recurring(places)]
    else:
        own = [
            place for number, place in enumerate(own) if not number or place.where != own[number - 1].where
        ]
    kept = set(map(id, own[:MAX_OWN]))
    left, chosen = MAX_RUNTIME, []
    for place in places:
        if id(place) in kept:
            left = 0
            chosen.append(place)
        elif left and (place.is_runtime or not place.module):
            left -= 1
            chosen.append(place)
    return chosen


def encode(places: list[Place], *, is_deep: bool = False, limit: int = MAX_BYTES) -> str:
    """Return frames as an attribute: a file's name is left out where it is that of the frame before.

    Names of functions are left out from the end on until the text fits into `limit` bytes, then frames.
    """
    named = len(places)
    while True:
        words, module = [], None
        for number, place in enumerate(places):
            words.append(place.text(module, named=number < named))
            module = place.module
        text = " ".join(words + [RECURSION] * is_deep)
        if len(text) <= limit or not places:
            return text
        if named:
            named -= 1
        else:
            places = places[:-1]


def decode(text: str) -> tuple[list[Place], bool]:
    """Return the frames of a text, and whether recursion was not followed to its end; unknown words are left out."""
    places: list[Place] = []
    words = text.split()
    is_deep = words[-1:] == [RECURSION]
    module = ""
    for word in words[: len(words) - is_deep]:
        where, _, name = word.partition("=")
        mark, where = where[:1] == "~", where.lstrip("~")
        file, plus, offset = where.rpartition("+0x")
        if where == UNKNOWN:
            places.append(Place("", 0, is_runtime=mark))
        elif plus and 0 < len(offset) <= 16 and set(offset) <= set("0123456789abcdef"):
            module = file or module
            places.append(Place(module, int(offset, 16), name, is_runtime=mark))
    return places, is_deep


def own_places(places: list[Place], *, is_deep: bool) -> list[str]:
    """Return the places that distinguish one bug from another: the program's own frames, or all if it has none.

    Of unfinished recursion, the places that recur, in no order.
    """
    own = [place.where for place in places if not place.is_runtime]
    if is_deep and len(own) > 1:
        return sorted(own[1:])
    return own or [place.where for place in places]

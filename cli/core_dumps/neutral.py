"""Owns making a cached core harmless for a terminal: debuggers print a process's names and arguments as they are.

Only this machine's copy is changed, after it was verified, and each character keeps its length.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from core_dump_format.elf import MOST_NOTES_BYTES, NotACoreError, read_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_format.elf import Form
    from core_dump_format.stream import Forward

_PRPSINFO, _FILE = 3, 0x46494C45
"""NT_ numbers of elf.h."""


def neutralise(path: str, source: Forward) -> None:
    """Replace control characters in the command line, name and mapped files of a core by question marks.

    Args:
        path: a core in the cache.
        source: reads that core.
    """
    try:
        layout = read_layout(source)
    except NotACoreError:
        return
    if layout.notes is None:
        return
    offset, size = layout.notes
    block = bytearray(source.reach(offset, min(size, MOST_NOTES_BYTES)))
    original = bytes(block)
    for first, end in _texts(original, layout.header.form):
        block[first:end] = without_controls(original[first:end])
    if block != original:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, block, offset)
        finally:
            os.close(descriptor)


def without_controls(raw: bytes) -> bytes:
    """Return text of the same length without control and direction characters; NUL separates and stays."""
    text = raw.decode("utf-8", "surrogateescape")
    if text.replace("\0", "").isprintable():
        return raw
    kept = (
        c if c == "\0" or c.isprintable() else "?" * len(c.encode("utf-8", "surrogateescape")) for c in text
    )
    return "".join(kept).encode("utf-8", "surrogateescape")


def _texts(block: bytes, form: Form) -> Iterator[tuple[int, int]]:
    """Yield the ranges of notes that hold text from the process."""
    at = 0
    while at + form.note.size <= len(block):
        name_bytes, length, kind = form.note.unpack_from(block, at)
        first = at + form.note.size + -(-name_bytes // 4) * 4
        end = first + length
        if kind == _PRPSINFO:
            yield first + (40 if form.bits == 64 else 28), end  # noqa: PLR2004  struct elf_prpsinfo
        elif kind == _FILE and length >= 2 * form.word_bytes:
            (count,) = form.words(block, first, 1) if first + form.word_bytes <= len(block) else (0,)
            yield first + (2 + 3 * min(count, length)) * form.word_bytes, end
        at = first + -(-length // 4) * 4

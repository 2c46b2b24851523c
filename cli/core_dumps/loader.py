"""Owns the loader's list of a core: the names under which a process loaded its libraries.

A debugger looks for libraries under these names. The kernel lists the files that they led to: `/lib/libc.so.6` in the
loader's list may be `/usr/lib/libc-2.31.so` there. Nothing in the list is trusted; its form is that of <link.h>.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from core_dump_format.core import read_memory

if TYPE_CHECKING:
    from core_dump_format.core import Core
    from core_dump_format.stream import Forward

MOST_LIBRARIES = 4096
MOST_NAME_BYTES = 4096
MOST_HEADERS = 64
MOST_DYNAMIC_BYTES = 64 * 1024
_PT_DYNAMIC, _PT_PHDR, _DT_DEBUG = 2, 6, 21


class Loaded(NamedTuple):
    """One entry of the loader's list."""

    name: bytes
    base: int
    """Difference between addresses in memory and in the file."""
    dynamic: int
    """Address of the dynamic section."""


class _Memory:
    """The memory in a core, as words and text."""

    def __init__(self, core: Core, source: Forward) -> None:
        self._core, self._source = core, source

    def read(self, address: int, size: int) -> bytes:
        """Return as many of the bytes at an address as the core has."""
        return read_memory(self._core, self._source, address, size)

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """Return words; an empty tuple if the core does not have all of them."""
        form = self._core.form
        content = self.read(address, count * form.word_bytes)
        return form.words(content, 0, count) if len(content) == count * form.word_bytes else ()

    def text(self, address: int) -> bytes:
        """Return the bytes up to NUL; empty if there is no NUL."""
        content = self.read(address, MOST_NAME_BYTES)
        return content.partition(b"\0")[0] if b"\0" in content else b""


def read_loaded(core: Core, source: Forward) -> list[Loaded]:
    """Return the libraries of the first namespace, as far as the core has their list.

    Args:
        core: its headers and notes.
        source: reads the core at any offset.
    """
    memory = _Memory(core, source)
    try:
        return _walk(memory, _find_list(core, memory))
    except (struct.error, OverflowError):
        return []


def _find_list(core: Core, memory: _Memory) -> int:
    """Return the address of the first link_map; 0 for a static program."""
    form, table = core.form, core.header_table
    count = min(MOST_HEADERS, core.header_count)
    rows = [form.segment(row) for row in _rows(form.row, memory.read(table, count * form.row.size))]
    base = next((table - address for kind, _, _, address, _ in rows if kind == _PT_PHDR), 0)
    for kind, _, _, address, size in rows:
        if kind == _PT_DYNAMIC:
            pairs = struct.Struct(f"{form.order}2{form.word}")
            content = memory.read(base + address, min(size, MOST_DYNAMIC_BYTES))
            debug = dict(_rows(pairs, content)).get(_DT_DEBUG, 0)
            found = memory.words(debug, 2)  # struct r_debug: version, first link_map
            return found[1] if found else 0
    return 0


def _rows(row: struct.Struct, content: bytes) -> list[tuple[Any, ...]]:
    return list(row.iter_unpack(content[: len(content) // row.size * row.size]))


def _walk(memory: _Memory, address: int) -> list[Loaded]:
    found: list[Loaded] = []
    seen: set[int] = set()
    while address and address not in seen and len(seen) < MOST_LIBRARIES:
        seen.add(address)
        words = memory.words(address, 4)  # struct link_map: l_addr, l_name, l_ld, l_next
        if not words:
            break
        base, name, dynamic, address = words
        text = memory.text(name)
        if text:
            found.append(Loaded(text, base, dynamic))
    return found

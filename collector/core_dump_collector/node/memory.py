"""Owns the memory limit of this process, which is its control group's, and the share of it in use.

The limit is the least of the group's own and those above it, in either version of control groups (docs.kernel.org,
"Control Group v2", "Memory Resource Controller"). Page cache that the kernel can drop counts as free.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 shows a number near 2^63 where there is no limit."""
_MOST_LEVELS = 32


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit, and the files that tell how much of it is in use."""

    limit_bytes: int
    _usage_file: str
    _stat_file: str
    _cache_name: str

    def used_share(self) -> float | None:
        """Return the share of the limit in use without droppable page cache; None if it cannot be read."""
        used = _number(self._usage_file)
        if used is None:
            return None
        return max(0, used - self._cache_bytes()) / self.limit_bytes

    def _cache_bytes(self) -> int:
        with contextlib.suppress(OSError, ValueError), open(self._stat_file) as file:
            for line in file:
                name, _, value = line.partition(" ")
                if name == self._cache_name:
                    return int(value)
        return 0


def find_limit(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> MemoryLimit | None:
    """Return the tightest limit of this process's control groups; None if there is none or it cannot be read."""
    found = [limit for limit in _limits(root, own) if 0 < limit.limit_bytes < _NO_LIMIT_BYTES]
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _limits(root: str, own: str) -> Iterator[MemoryLimit]:
    for controllers, path in _groups(own):
        if not controllers:
            for base in (root, os.path.join(root, "unified")):
                for place in _upwards(base, path):
                    yield from _read(place, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for place in _upwards(os.path.join(root, "memory"), path):
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _read(place, *files)


def _groups(own: str) -> list[tuple[str, str]]:
    """Return controllers (none in version 2) and path of each group of this process (cgroups(7))."""
    with contextlib.suppress(OSError, ValueError), open(own) as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file.readlines(65536)]
        return [(fields[1], fields[2]) for fields in lines if len(fields) == 3]  # noqa: PLR2004
    return []


def _upwards(base: str, path: str) -> Iterator[str]:
    """Yield the group's directory and those above it; in a container, whose root may be the group itself, the root."""
    steps = [step for step in path.split("/") if step not in {"", ".", ".."}][:_MOST_LEVELS]
    for length in range(len(steps), -1, -1):
        yield os.path.join(base, *steps[:length])


def _read(place: str, limit: str, usage: str, cache: str) -> Iterator[MemoryLimit]:
    number = _number(os.path.join(place, limit))
    if number is not None:
        yield MemoryLimit(number, os.path.join(place, usage), os.path.join(place, "memory.stat"), cache)


def _number(path: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return int(file.read(64))
    return None

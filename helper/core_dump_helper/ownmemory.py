"""Owns the memory limit of the listener's own cgroup; its children together use half of it."""

from __future__ import annotations

import os

from core_dump_helper.limits import VITAL_SLOTS
from core_dump_helper.settings import BOUNDS
from core_dump_helper.system import read_file, write_file

CGROUPS = "/sys/fs/cgroup"
LIMITS = ("memory.max", "memory.limit_in_bytes")
NO_LIMIT_BYTES = 1 << 60
"""Version 1 shows a number near 2^63 where there is no limit."""
MAX_LEVELS = 32
CHILD_BYTES = 16 << 20
"""A child takes no less, with a dump of any size."""
SMALL_CHILD_BYTES, MOST_PROCESSES = 8 << 20, 64
"""Memory of a child whose process is released, because its core is small."""
VITAL_FACTOR = 3
"""Bytes of memory that a byte of the vital part takes."""
OOM_SCORE_PATH = "/proc/self/oom_score_adj"
NEVER_KILLED, CHILD_OOM_SCORE, MOST_OOM_SCORE = -1000, 500, 1000


class OwnMemory:
    """The memory that the listener and its children may use."""

    def __init__(self) -> None:
        """Find the tightest limit of this process's cgroup and those above it, in either version of cgroups."""
        self.directory, self.limit_bytes = "", 0
        """Of the cgroup that has the limit; empty and 0 if there is none."""
        for directory in _directories(_read("/proc/self/cgroup")):
            for name in LIMITS:
                text = _read(directory + "/" + name).strip()
                if text.isdigit() and 0 < int(text) < min(NO_LIMIT_BYTES, self.limit_bytes or NO_LIMIT_BYTES):
                    self.directory, self.limit_bytes = directory, int(text)
        self._children = VITAL_SLOTS + 1

    def most_children(self, wanted: int) -> int:
        """Return how many children may dump at one time; `wanted` is MAX_CONCURRENT, of which 0 means no limit."""
        most = wanted or BOUNDS["MAX_CONCURRENT"][1]
        if self.limit_bytes:
            most = min(most, max(1, self.limit_bytes // 2 // CHILD_BYTES - VITAL_SLOTS))
        self._children = most + VITAL_SLOTS
        return most

    def most_processes(self) -> int:
        """Return how many children may exist: most of them only hold a small core."""
        return min(MOST_PROCESSES, self.limit_bytes // 2 // SMALL_CHILD_BYTES or MOST_PROCESSES)

    def vital_bytes(self) -> int:
        """Return how many bytes a child may read of the vital part, if all children read theirs at the same time."""
        return self.limit_bytes // 2 // self._children // VITAL_FACTOR or NO_LIMIT_BYTES

    def protect(self) -> None:
        """Let this process be killed last when memory runs out, if it has the right to."""
        try:
            write_file(OOM_SCORE_PATH, b"%d" % NEVER_KILLED)
        except OSError:  # needs CAP_SYS_RESOURCE
            pass

    def sacrifice(self) -> None:
        """Let this child be killed before the listener, which hands its own value down."""
        try:
            own = int(_read(OOM_SCORE_PATH))
            write_file(OOM_SCORE_PATH, b"%d" % min(MOST_OOM_SCORE, max(CHILD_OOM_SCORE, own + 1)))
        except (OSError, ValueError):  # /proc is read-only, for example: the dump matters more
            pass


def _directories(text: str) -> list[str]:
    """Return the directories of a process's cgroups and those above them; a container sees its own as the root."""
    found: list[str] = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        bases = [CGROUPS, CGROUPS + "/unified"] if not controllers else []
        if "memory" in controllers.split(","):
            bases = [CGROUPS + "/memory"]
        for base in bases:
            names = [name for name in path.split("/")[:MAX_LEVELS] if name not in ("", "..")]
            found.extend("/".join([base, *names[:count]]) for count in range(len(names), -1, -1))
    return found


def _read(path: str) -> str:
    try:
        return os.fsdecode(read_file(path, 1 << 16))
    except OSError:
        return ""

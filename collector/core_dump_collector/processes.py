"""Owns what the daemon's worker processes use: CPU time and memory, from /proc (proc_pid_stat(5))."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_UTIME, _STIME, _RSS = 11, 12, 21
"""Fields of /proc/PID/stat after the name of the program."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What all living workers use together."""

    processes: int = 0
    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    """Since the daemon's start, also of workers that have ended, up to the last look at them."""


@dataclass(slots=True)
class Workers:
    """Adds up what workers use, whichever come and go."""

    _last: dict[int, float] = field(default_factory=dict)
    _ended_seconds: float = 0.0

    def measure(self) -> Usage:
        """Look at every living worker."""
        now: dict[int, float] = {}
        resident = 0
        for worker in multiprocessing.active_children():
            found = _read_stat(worker.pid)
            if worker.pid is not None and found is not None:
                now[worker.pid], pages = found
                resident += pages * _PAGE_BYTES
        for pid, seconds in self._last.items():
            if now.get(pid, 0.0) < seconds:
                self._ended_seconds += seconds
        self._last = now
        return Usage(len(now), resident, self._ended_seconds + sum(now.values()))


def _read_stat(pid: int | None) -> tuple[float, int] | None:
    """Return a process's CPU seconds and resident pages; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read(4096).rpartition(b")")[2].split()
        return (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_SECOND, int(fields[_RSS])
    except (OSError, ValueError, IndexError):
        return None

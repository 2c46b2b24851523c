"""Owns the CPU time and the memory of the worker processes, as /proc shows them (proc_pid_stat(5))."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from dataclasses import dataclass, field

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_UTIME, _STIME, _RSS = 11, 12, 21
"""Fields that `read_stat` returns."""


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time and memory of all workers together."""

    processes: int = 0
    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    """Since the daemon's start; includes workers that have ended, up to the last measurement of each."""


@dataclass(slots=True)
class Workers:
    """Adds up the use of all workers, also of those that have ended."""

    _last: dict[int, float] = field(default_factory=dict)
    _ended_seconds: float = 0.0

    def measure(self) -> Usage:
        """Measure every living worker."""
        now: dict[int, float] = {}
        resident = 0
        for worker in multiprocessing.active_children():
            fields = read_stat(worker.pid)
            if worker.pid is not None and len(fields) > _RSS:
                now[worker.pid] = (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_SECOND
                resident += int(fields[_RSS]) * _PAGE_BYTES
        for pid, seconds in self._last.items():
            if now.get(pid, 0.0) < seconds:
                self._ended_seconds += seconds
        self._last = now
        return Usage(len(now), resident, self._ended_seconds + sum(now.values()))


def read_stat(pid: int | None) -> list[bytes]:
    """Return the fields of /proc/PID/stat after the name of the program; none if the process has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read(4096).rpartition(b")")[2].split()
    return []

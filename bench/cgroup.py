"""Control groups: CPU seconds and peak memory of processes that are not our children, and memory limits."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@functools.cache
def _mounts() -> dict[str, Path]:
    """Return where cgroup2, and the memory controller of version 1, are mounted."""
    found: dict[str, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.setdefault("cgroup2", Path(where))
        if kind == "cgroup" and "memory" in options.split(","):
            found["memory"] = Path(where)
    return found


class Group:
    """A cgroup (version 2) that counts; `cpu.stat` is there even where controllers belong to version 1."""

    def __init__(self, path: Path) -> None:
        """Take a directory that exists."""
        self.path = path

    @property
    def join(self) -> str:
        """The line of a shell script that moves it here."""
        return f"echo $$ > {self.path}/cgroup.procs"

    def cpu_seconds(self) -> float:
        """Return user and system time of all members, past ones too, in seconds."""
        first = (self.path / "cpu.stat").read_text().split()
        return int(first[1]) / 1e6

    def members(self) -> list[int]:
        """Return the processes in it."""
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def wait_empty(self, leave: int = 0, seconds: float = 120) -> float:
        """Wait until at most `leave` processes are left; return `time.perf_counter()` of that moment."""
        deadline = time.perf_counter() + seconds
        while len(self.members()) > leave:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{self.path}: still there: {self.members()}")
            time.sleep(0.002)
        return time.perf_counter()

    def peaks(self, seen: dict[int, int]) -> None:
        """Note the peak resident size (VmHWM, KiB) of each member so far."""
        for pid in self.members():
            with contextlib.suppress(OSError, StopIteration):
                with open(f"/proc/{pid}/status") as status:
                    line = next(line for line in status if line.startswith("VmHWM"))
                seen[pid] = max(seen.get(pid, 0), int(line.split()[1]))


@contextlib.contextmanager
def group(name: str) -> Iterator[Group]:
    """Make a cgroup; what is left in it at the end is killed."""
    path = _mounts()["cgroup2"] / f"core-dump-bench-{os.getpid()}-{name}"
    path.mkdir()
    counted = Group(path)
    try:
        yield counted
    finally:
        for pid in counted.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        counted.wait_empty(seconds=30)
        path.rmdir()


@contextlib.contextmanager
def memory_limit(name: str, limit_bytes: int) -> Iterator[str]:
    """Make a memory cgroup with a hard limit, of either version; yield the shell line that joins it."""
    mounts = _mounts()
    if "memory" in mounts:
        path, setting = mounts["memory"] / f"core-dump-bench-{name}", "memory.limit_in_bytes"
    else:
        path, setting = mounts["cgroup2"] / f"core-dump-bench-{name}", "memory.max"
    path.mkdir()
    try:
        (path / setting).write_text(str(limit_bytes))
        yield f"echo $$ > {path}/cgroup.procs"
    finally:
        deadline = time.monotonic() + 20
        while (path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        path.rmdir()

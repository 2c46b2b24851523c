"""Makes a memory cgroup with a limit, of either version of cgroups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.collector import wait_until


@contextlib.contextmanager
def memory_cgroup(name: str, limit_bytes: int) -> Iterator[tuple[Path, Path]]:
    """Make a memory cgroup; yield it and the file that tells how often its limit has killed.

    Raises:
        LookupError: there is no memory cgroup, or it takes no limit.
    """
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    old = next((Path(m[1]) for m in mounts if m[2] == "cgroup" and "memory" in m[3].split(",")), None)
    root = old or next((Path(m[1]) for m in mounts if m[2] == "cgroup2"), None)
    if root is None:
        raise LookupError("no memory cgroup")
    path = root / f"{name}-{os.getpid()}"
    path.mkdir()
    try:
        try:
            (path / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            raise LookupError("no memory controller in the root cgroup") from error
        yield path, path / ("memory.oom_control" if old else "memory.events")
    finally:
        wait_until(lambda: not (path / "cgroup.procs").read_text(), 30, "an empty cgroup")
        path.rmdir()

"""`kernel.core_pattern` belongs to the whole machine: set under a lock, restored in every exit path."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL = Path("/proc/sys/kernel")
LOCK = Path("/run/lock/core-pattern.lock")


@contextlib.contextmanager
def core_pattern(pattern: str, pipe_limit: int = 0) -> Iterator[None]:
    """Set pattern and `core_pipe_limit` for a moment.

    Raises:
        ValueError: the kernel did not take the pattern whole.
    """
    settings = {"core_pattern": pattern, "core_pipe_limit": str(pipe_limit)}
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {name: (KERNEL / name).read_text() for name in settings}
        try:
            for name, value in settings.items():
                (KERNEL / name).write_text(value)
                if (KERNEL / name).read_text().strip() != value:
                    raise ValueError(f"{name}: the kernel cut {value!r} short")
            yield
        finally:
            for name, value in before.items():
                (KERNEL / name).write_text(value)

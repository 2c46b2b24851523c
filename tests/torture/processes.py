"""Owns the search for the helpers and compressors of a run among all processes."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.collector import command_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def helper_pids(scratch: Path) -> Iterator[int]:
    """Yield our helpers and their compressors: they descend from kernel threads and have no session of ours."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            command = command_of(int(entry.name))
            if f"{scratch}/core-dump-helper" in command or "pigz" in command.split(" ", 1)[0]:
                with contextlib.suppress(OSError):
                    ours = os.readlink(entry / "fd/1") if "pigz" in command else str(scratch)
                    if ours.startswith(str(scratch)):
                        yield int(entry.name)


def crashed_pid(pid: int) -> int:
    """Return whose dump a helper, or its compressor, is writing: the helper's `-P`; 0 when it is gone."""
    for candidate in (pid, parent_of(pid)):
        if match := re.search(r" -P(\d+) ", command_of(candidate)):
            return int(match[1])
    return 0


def parent_of(pid: int) -> int:
    """Return a process's parent, 0 when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return 0

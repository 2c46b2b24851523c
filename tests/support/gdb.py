"""Crashes a program in gdb, without the kernel's core pattern."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def crash(program: Path, core: Path) -> None:
    """Run a program until it crashes, and write its core."""
    script = ["-ex", "set debuginfod enabled off", "-ex", "run", "-ex", f"generate-core-file {core}"]
    subprocess.run(["gdb", "-nx", "-batch", *script, program], check=True, capture_output=True)

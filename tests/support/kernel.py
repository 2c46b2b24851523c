"""Owns crashes through the real kernel: the core pattern, an installed helper, programs that crash.

`kernel.core_pattern` is global to the machine: whoever sets it holds a lock on LOCK, and a guardian process restores
the old value and releases the lock even when the program that set it is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.cleanup import guarded, guardian

HELPER = Path(__file__).parents[2] / "helper" / "core-dump-helper"
FORMAT = Path(__file__).parents[2] / "format" / "core_dump_format"
CRASHER = Path(__file__).with_name("crash.c")
KERNEL = Path("/proc/sys/kernel")
PATTERN = KERNEL / "core_pattern"
SORT_VMA = KERNEL / "core_sort_vma"
"""Since Linux 6.15."""
LOCK = Path("/run/lock/core-pattern.lock")
LOCK_SECONDS = 3600
"""Longest wait for others on this machine."""
ARGUMENTS = "-P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e"
PATTERN_LIMIT = 127
"""The kernel cuts longer patterns without an error."""
RESTORE = """
for path, value in zip(sys.argv[1::2], sys.argv[2::2]):
    with open(path, "w") as file:
        file.write(value)
"""


def can_crash() -> bool:
    """Say whether this process may set the core pattern."""
    return os.geteuid() == 0 and os.access(PATTERN, os.W_OK)


def to_stderr(text: str) -> None:
    """Print a line for the people who wait."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Stop the timer of a test's time limit (pytest-timeout uses ITIMER_REAL) during a wait for others."""
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def holder(descriptor: int) -> str:
    """Describe the process that holds the lock on a file, from /proc/locks (proc(5))."""
    inode = f":{os.fstat(descriptor).st_ino} "
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and inode in line + " ":
            with contextlib.suppress(OSError):
                return f"process {fields[4]} ({Path('/proc', fields[4], 'comm').read_text().strip()})"
    return "another process"


@contextlib.contextmanager
def locked(say: Callable[[str], None] = to_stderr) -> Iterator[int]:
    """Hold this machine's lock on the core pattern; yield its descriptor.

    The wait for others does not count into the time limit of a test.

    Raises:
        TimeoutError: others held it for LOCK_SECONDS.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{holder(lock.fileno())} uses kernel.core_pattern; waiting until it is free")
            command = guarded(["flock", "-w", str(LOCK_SECONDS), str(lock.fileno())])
            with untimed():
                waited = subprocess.run(command, pass_fds=[lock.fileno()], check=False)
            if waited.returncode:
                raise TimeoutError(f"kernel.core_pattern was in use for {LOCK_SECONDS} s: {LOCK}") from None
        yield lock.fileno()


@contextlib.contextmanager
def core_pattern(
    pattern: str,
    pipe_limit: int | None = None,
    say: Callable[[str], None] = to_stderr,
    *,
    sort_vma: bool | None = None,
) -> Iterator[str]:
    """Set the core pattern, alone on this machine; yield the old one, which every exit path restores.

    Args:
        pattern: see core(5).
        pipe_limit: `kernel.core_pipe_limit`, where it matters.
        say: prints the line that tells whom we wait for.
        sort_vma: `kernel.core_sort_vma`, where it matters.

    Raises:
        ValueError: the kernel did not take a value as it is.
        TimeoutError: others used the core pattern all the time.
    """
    if len(pattern.encode()) > PATTERN_LIMIT:
        raise ValueError(f"{len(pattern)} bytes, the kernel takes {PATTERN_LIMIT}: {pattern}")
    values = {PATTERN: pattern + "\n"}
    if pipe_limit is not None:
        values[KERNEL / "core_pipe_limit"] = f"{pipe_limit}\n"
    if sort_vma is not None:
        values[SORT_VMA] = f"{int(sort_vma)}\n"
    with locked(say) as lock:
        before = [word for path in values for word in (str(path), path.read_text())]
        with guardian(RESTORE, *before, keep=[lock]):
            for path, value in values.items():
                set_value(path, value)
                if path.read_text() != value:
                    raise ValueError(f"the kernel made {path.read_text()!r} of {value!r}")
            yield before[1].rstrip("\n")


def set_value(path: Path, value: str) -> None:
    """Set a value of the kernel; it takes a socket's pattern from the mount namespace of kthreadd alone."""
    try:
        path.write_text(value)
    except OSError:
        if not value.startswith("@"):
            raise
        command = ["nsenter", "--mount=/proc/2/ns/mnt", "tee", str(path)]
        subprocess.run(command, input=value.encode(), stdout=subprocess.DEVNULL, check=True)


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
    for folder in (source.with_name(package.name), FORMAT):
        shutil.rmtree(directory / folder.name, ignore_errors=True)
        shutil.copytree(folder, directory / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
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
    **options: Any,
) -> subprocess.CompletedProcess[bytes]:
    """Run the crashing program to its end; `before` is put in front of it (unshare, setpriv, ...)."""
    command = [*before, str(program), str(int(signal)), name.hex() or "-", str(megabytes), kind, str(threads)]
    done: subprocess.CompletedProcess[bytes]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60, **options)
    return done

"""Owns `core-dump-collector configure-host`: installs the helper on a Kubernetes node that takes no user data.

Runs in a privileged init container with the host's root mounted. Everything done on the host is done by
sysctl/install.sh, which the image carries; this module copies it there and runs it in the host's root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

from core_dump_collector.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOURCE = "/usr/share/core-dump-handler"
"""Where the image keeps the folders of FOLDERS."""
FOLDERS = ("sysctl", "helper", "format")
STATE = "var/lib/core-dump-handler"
COPY = "install-"
"""How the name of a copy on the host begins; whoever uses one holds a lock on it."""
ATTEMPTS = 100
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def configure(root: str, *, restore: bool = False, options: Sequence[str] = (), source: str = SOURCE) -> int:
    """Run install.sh (or uninstall.sh to restore) in the host's root; return its exit code.

    Args:
        root: where the host's root is mounted.
        restore: put the host's own core pattern back, if ours is in use, and remove the helper.
        options: for the script, e.g. `--force`.
        source: directory with the folders of FOLDERS.

    Raises:
        ConfigError: the directory is not a host's root, the scripts are missing, or it may not be entered.
    """
    if not os.path.isdir(os.path.join(source, "sysctl")):
        raise ConfigError(f"{source}/sysctl is missing: configure-host runs from the container image only")
    if not os.path.isfile(os.path.join(root, "bin/sh")):
        raise ConfigError(
            f"{root} holds no /bin/sh: mount the host's / there (Bottlerocket has none: see its page)"
        )
    if not os.path.isfile(os.path.join(root, "proc/sys/kernel/core_pattern")):
        raise ConfigError(
            f"{root}/proc does not show the host's kernel: mount the host's / with everything below it (rbind)"
        )
    state = os.path.join(root, STATE)
    script = "uninstall.sh" if restore else "install.sh"
    try:
        _remove_leftovers(state)
        with _copy(source, state) as copy:
            inside = f"/{STATE}/{os.path.basename(copy)}/sysctl/{script}"
            result = _run_inside(root, ["/bin/sh", inside, "--host", *options])
        with contextlib.suppress(OSError):  # after a removal nothing else is left in it
            os.rmdir(state)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{root}: {error}: configure-host needs a privileged container") from error
    return result


@contextlib.contextmanager
def _copy(source: str, state: str) -> Iterator[str]:
    """Copy the scripts and what they install to the host; yield the directory, remove it at the end."""
    copy, lock = _locked_directory(state)
    try:
        for name in FOLDERS:
            shutil.copytree(
                os.path.join(source, name),
                os.path.join(copy, name),
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        yield copy
    finally:
        shutil.rmtree(copy)
        os.close(lock)


def _locked_directory(state: str) -> tuple[str, int]:
    """Make a directory for a copy; return it and the descriptor that holds its lock.

    Another run may remove the directory as a leftover before it is locked, or `state` while it is empty.
    """
    for _ in range(ATTEMPTS):
        try:
            os.makedirs(state, 0o755, exist_ok=True)
            copy = tempfile.mkdtemp(prefix=COPY, dir=state)
            lock = os.open(copy, OPEN_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(copy):
            return copy, lock
        os.close(lock)
    raise ConfigError(f"{state}: other runs removed {ATTEMPTS} copies: let them end, then try again")


def _remove_leftovers(state: str) -> None:
    """Remove the copies that killed runs left, unless another run does; one that is in use is locked."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(state)
    for name in names:
        path = os.path.join(state, name)
        if name.startswith(COPY) and not os.path.islink(path):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                _remove_unlocked(path)


def _remove_unlocked(path: str) -> None:
    descriptor = os.open(path, OPEN_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(descriptor)


def _run_inside(root: str, command: list[str]) -> int:
    """Run a program of another root; return its exit code."""

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")

    return subprocess.run(  # noqa: S603  the image's own script
        command,
        check=False,
        env={"PATH": PATH},
        preexec_fn=enter,
    ).returncode

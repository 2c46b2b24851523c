"""Owns kernel.core_pattern and kernel.core_pipe_limit: reading, setting, and what was there before us."""

from __future__ import annotations

import os
import re
import subprocess

from core_dump_setup.errors import SetupError, say, warn
from core_dump_setup.files import STATE, Tree
from core_dump_setup.release import HELPER

SYSCTL = "/proc/sys/kernel"
SAVED = STATE + "/previous-core-pattern"
SOCKET = "/run/core-dump-listener/kernel"
"""Where our listener listens."""
LIMIT = 127
"""Bytes of a core pattern; the kernel cuts longer ones without a word (core(5))."""
DEFAULTS = ("", "core", "core.%p", "|/bin/false")
"""Patterns that nobody chose: the kernel's, and those of systemd without systemd-coredump."""
PF_KTHREAD = 0x00200000
PROGRAMS = {
    "|/usr/lib/systemd/systemd-coredump": "systemd-coredump",
    "|/lib/systemd/systemd-coredump": "systemd-coredump",
    "|/usr/share/apport/apport": "apport",
    "|/usr/libexec/abrt-hook-ccpp": "abrt",
}
"""Handlers that distributions install: the program of the pattern, and the handler's name."""
SOCKETS = ("@@/run/systemd/", "@/run/systemd/")
"""Where systemd-coredump listens, from systemd 262 on."""


def is_host() -> bool:
    """Say whether the kernel starts its helpers in our root: false in a chroot, a container or an image build.

    The kernel starts them with the root of kthreadd, which is process 2 where /proc is the host's, and nowhere else.
    """
    try:
        with open("/proc/2/stat", "rb") as file:
            flags = int(file.read(4096).rpartition(b")")[2].split()[6])
        return bool(flags & PF_KTHREAD) and os.path.samestat(os.stat("/proc/2/root"), os.stat("/"))
    except (OSError, ValueError, IndexError):
        return False


def starts_helper_in(root: str) -> bool:
    """Say whether the kernel finds the helper of this root, as far as /proc tells."""
    try:
        return os.path.samestat(os.stat("/proc/2/root"), os.stat(root)) and is_ours(current("core_pattern"))
    except (OSError, SetupError):
        return False


def current(name: str) -> str:
    """Return the value of kernel.NAME.

    Raises:
        SetupError: it cannot be read.
    """
    try:
        with open(os.path.join(SYSCTL, name), "rb") as file:
            return os.fsdecode(file.read(256)).rstrip("\n")
    except OSError as error:
        raise SetupError("cannot read kernel.%s: %s" % (name, error.strerror)) from error


def starts_helper(pattern: str) -> bool:
    """Say whether a pattern starts the helper."""
    return pattern == "|" + HELPER or pattern.startswith("|" + HELPER + " ")


def is_socket(pattern: str) -> bool:
    """Say whether a pattern leads to our listener."""
    return pattern in ("@" + SOCKET, "@@" + SOCKET)


def is_ours(pattern: str) -> bool:
    """Say whether a pattern leads to the helper, in either way."""
    return starts_helper(pattern) or is_socket(pattern)


def is_default(pattern: str) -> bool:
    """Say whether nobody chose this pattern."""
    return pattern in DEFAULTS


def distribution_handler(pattern: str) -> str:
    """Return the name of the handler if the distribution brings it, or an empty string."""
    if pattern.startswith(SOCKETS):
        return "systemd-coredump, socket"
    return PROGRAMS.get(pattern.partition(" ")[0], "")


def is_foreign(pattern: str) -> bool:
    """Say whether an operator, or another product, chose this handler: only --force replaces it."""
    return not (is_ours(pattern) or is_default(pattern) or distribution_handler(pattern))


def describe(pattern: str) -> str:
    """Return a pattern with the name of the handler it belongs to, where that is known."""
    name = distribution_handler(pattern)
    return "%s (%s)" % (pattern, name) if name else pattern


def set_value(name: str, value: str) -> None:
    """Set kernel.NAME and read it back.

    Raises:
        SetupError: the kernel refused it or made something else of it.
    """
    data = os.fsencode(value) + b"\n"
    try:
        with open(os.path.join(SYSCTL, name), "wb", buffering=0) as file:
            file.write(data)
    except OSError as error:
        if not (value.startswith("@") and _set_in_first_namespace(name, data)):
            raise SetupError("cannot set kernel.%s: %s" % (name, error.strerror)) from error
    if current(name) != value:
        raise SetupError("kernel.%s: the kernel made %r of %r" % (name, current(name), value))


def _set_in_first_namespace(name: str, data: bytes) -> bool:
    """Set a value from the mount namespace of kthreadd: the kernel takes a socket's pattern from nowhere else."""
    command = ["/usr/bin/nsenter", "--mount=/proc/2/ns/mnt", "/usr/bin/tee", os.path.join(SYSCTL, name)]
    try:
        return not subprocess.run(command, input=data, stdout=subprocess.DEVNULL, check=False).returncode
    except OSError:
        return False


def check_pattern(pattern: str) -> str:
    """Return why the kernel must not get this pattern, or nothing."""
    data = os.fsencode(pattern)
    if not pattern:
        return "it is empty"
    if len(data) > LIMIT:
        return "it has %d bytes, the kernel takes %d" % (len(data), LIMIT)
    if not pattern.isprintable():
        return "it holds unprintable characters"
    if pattern.startswith("|") and not os.access(pattern[1:].partition(" ")[0], os.X_OK):
        return "its program does not exist"
    return ""


def save(tree: Tree) -> None:
    """Remember the pattern in use, unless it is ours; the last one that we replaced is what counts."""
    pattern = current("core_pattern")
    if is_ours(pattern):
        return
    if tree.dry_run:
        say("would save kernel.core_pattern=" + pattern)
        return
    text = "%s\n%s\n" % (pattern or "core", current("core_pipe_limit"))
    tree.place(SAVED, os.fsencode(text), 0o600)


def saved(tree: Tree) -> tuple[str, str]:
    """Return pattern and pipe limit from before us; the kernel's defaults where they are unusable."""
    data = tree.read(SAVED)
    pattern, limit, *_ = [*os.fsdecode(data or b"").split("\n"), "", ""]
    unusable = check_pattern(pattern) or ("it is our own" if is_ours(pattern) else "")
    if unusable:
        if data is not None:
            warn("%s: %r is not restored: %s" % (tree.path(SAVED), pattern, unusable))
        pattern = "core"
    return pattern, limit if re.fullmatch("[0-9]{1,9}", limit) else "0"


def use(tree: Tree, pattern: str, limit: str) -> None:
    """Set both values; `tree.undo` puts the present ones back."""
    if tree.dry_run:
        say("would set kernel.core_pipe_limit=" + limit)
        say("would set kernel.core_pattern=" + pattern)
        return
    before = [(name, current(name)) for name in ("core_pipe_limit", "core_pattern")]
    for (name, old), new in zip(before, (limit, pattern)):
        if old != new:
            tree.on_failure(lambda name=name, old=old: set_value(name, old))  # type: ignore[misc]
            set_value(name, new)


def restore(tree: Tree) -> None:
    """Give the kernel the pattern from before us, if ours is in use."""
    now = current("core_pattern")
    if not is_ours(now):
        say("kernel.core_pattern is not ours and is left alone: " + describe(now))
        return
    pattern, limit = saved(tree)
    if tree.dry_run:
        say("would set kernel.core_pattern=" + pattern)
        return
    set_value("core_pattern", pattern)
    set_value("core_pipe_limit", limit)
    say("kernel.core_pattern is again: " + pattern)

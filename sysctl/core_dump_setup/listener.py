"""Owns the other way to get a core: a socket that the kernel connects to, instead of a program that it starts.

core-dump-listener.socket keeps the socket open; core-dump-listener.service receives the cores. The pipe stays
configured for the boot: the kernel uses it until the listener is ready, and again before it ends.
"""

from __future__ import annotations

import os
import subprocess

from core_dump_helper.socketpath import PathError, open_directory
from core_dump_setup import kernel, systemd
from core_dump_setup.errors import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from core_dump_setup.files import Tree

UNIT_NAMES = ("core-dump-listener.socket", "core-dump-listener.service")
UNITS = tuple("/usr/lib/systemd/system/" + name for name in UNIT_NAMES)
WANTED = tuple(
    "/etc/systemd/system/%s.wants/%s" % item
    for item in zip(("sockets.target", "multi-user.target"), UNIT_NAMES)
)
"""Exist while this host uses the socket."""
MODES = "core_modes"
ACCEPTS = "00010000"
"""__SO_ACCEPTCON of a socket that listens."""
SECONDS = 400
"""The service may have crashes to handle before it stops."""


def check(*, live: bool) -> None:
    """Raise SetupError unless this host can receive cores over a socket."""
    if not live:
        raise SetupError(
            "--socket: the running kernel cannot be asked from here: run activate --socket on the host"
        )
    try:
        modes = kernel.current(MODES).split()
    except SetupError:
        modes = []
    if "socket" not in modes:
        raise SetupError(
            "--socket: this kernel (%s) sends cores to no socket: that needs Linux 6.16" % os.uname().release
        )
    if not systemd.is_running():
        raise SetupError("--socket: systemd does not run here, and nothing else keeps the socket open")


def is_wanted(tree: Tree) -> bool:
    """Return whether this host uses the socket."""
    return tree.exists(WANTED[0])


def switch(tree: Tree, *, on: bool) -> None:
    """Let the units start at every boot, or not."""
    for link, unit in zip(WANTED, UNITS):
        if on and not tree.exists(link):
            tree.link(link, unit)
        elif not on:
            tree.remove(link)


def start(tree: Tree) -> None:
    """Start or restart the listener, which sets the pattern; raises SetupError."""
    if tree.dry_run:
        say("would start %s and %s" % UNIT_NAMES)
        return
    tree.on_failure(stop)
    _systemctl("start", UNIT_NAMES[0])
    _systemctl("restart", UNIT_NAMES[1])
    if not kernel.is_socket(kernel.current("core_pattern")):
        raise SetupError("%s is started, but kernel.core_pattern does not lead there" % UNIT_NAMES[1])


def stop() -> None:
    """Let the kernel start the helper again, end the listener, then close the socket; raises SetupError."""
    if systemd.is_running():
        _systemctl("stop", *UNIT_NAMES)


def is_open() -> bool:
    """Return whether somebody listens at the socket: proc_net_unix(5)."""
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
            return any(
                line.split()[3:4] == [ACCEPTS] and line.rstrip().endswith(" " + kernel.SOCKET)
                for line in file
            )
    except OSError:
        return False


def use_socket() -> None:
    """Let the kernel send cores to the socket; core-dump-listener.service does it.

    Raises:
        SetupError: the path is not safe, or the kernel refuses it.
    """
    check(live=kernel.is_host())
    try:
        os.close(open_directory(kernel.SOCKET))
    except PathError as error:
        raise SetupError(str(error)) from error
    try:
        kernel.set_value("core_pattern", "@@" + kernel.SOCKET)
    except SetupError:  # Linux 6.16 knows @ only
        kernel.set_value("core_pattern", "@" + kernel.SOCKET)


def use_pipe(pattern: str) -> None:
    """Let the kernel start the helper, if it sends cores to the socket now; raises SetupError."""
    if kernel.is_socket(kernel.current("core_pattern")):
        kernel.set_value("core_pattern", pattern)


def _systemctl(command: str, *units: str) -> None:
    done = systemd.control(command, *units, seconds=SECONDS, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise SetupError("cannot %s %s: %s" % (command, " and ".join(units), said))

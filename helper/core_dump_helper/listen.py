"""Owns `--listen`: checks the requirements of a listener, protects its process, and takes or makes the socket."""

from __future__ import annotations

import fcntl
import os
from _socket import AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket

from core_dump_helper import socketpath
from core_dump_helper.compress import make_writer
from core_dump_helper.listener import Listener
from core_dump_helper.ownmemory import OwnMemory
from core_dump_helper.settings import CONFIG, Settings
from core_dump_helper.system import log, read_file

MODES = "/proc/sys/kernel/core_modes"
MOST_CONNECTIONS = "/proc/sys/net/core/somaxconn"
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in linux/proc_ns.h."""
PR_SET_DUMPABLE = 4
MOST_DESCRIPTORS = 8192
SYSTEMD_DESCRIPTOR = 3
"""Of the first socket that systemd hands over: sd_listen_fds(3)."""


class UnusableError(Exception):
    """No listener is possible here; the message says why."""


def listen(argv: list[str], config: str) -> int:
    """Receive cores at the path that `argv` begins with, until the process is told to stop; return an exit code."""
    path = argv[0] if argv else ""
    try:
        directory = socketpath.open_directory(path)
        check_kernel()
        connections, is_kept = inherit(path), True
        memory = OwnMemory()
        protect_process()
        memory.protect()
        preload(config)
        if connections is None:
            connections, is_kept = make_socket(path, directory), False
    except (socketpath.PathError, UnusableError, OSError) as error:
        os.write(2, b"core-dump-helper --listen: %s\n" % str(error).encode("ascii", "backslashreplace"))
        return 1 if isinstance(error, OSError) else 2
    os.close(directory)
    warn(path)
    listener = Listener(connections, path, config, memory, is_kept=is_kept)
    log("listening at " + path, 6)
    leave_journal()
    tell_systemd()
    for mark in (word[2:] for word in argv[1:] if word.startswith("-R")):
        os.close(os.open(mark, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    listener.run()
    return 0


def check_kernel() -> None:
    """Raise UnusableError unless the kernel can connect to a socket and this process can identify who crashed."""
    try:
        modes = read_file(MODES, 4096).split()
    except OSError:
        modes = []
    if b"socket" not in modes:
        raise UnusableError("this kernel sends cores to no socket: that needs Linux 6.16")
    if os.readlink("/proc/self/ns/pid") != FIRST_PID_NAMESPACE:
        raise UnusableError("crashed processes cannot be seen from this PID namespace: set hostPID")


def inherit(path: str) -> socket | None:
    """Return the socket that systemd hands over, or None; raises UnusableError if it is another one."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise UnusableError("LISTEN_FDS is %a, but one socket is needed" % os.environ.get("LISTEN_FDS"))
    connections = socket(fileno=SYSTEMD_DESCRIPTOR)
    if connections.getsockname() != path:
        raise UnusableError("systemd listens at %a instead of %s" % (connections.getsockname(), path))
    fcntl.fcntl(SYSTEMD_DESCRIPTOR, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return connections


def leave_journal() -> None:
    """Log to the kernel alone where that is possible: the journal's own crash must not wait for the journal."""
    try:
        os.close(os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY))
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # in a pod, where nothing else shows the lines
        return
    os.dup2(null, 2)
    os.close(null)


def tell_systemd() -> None:
    """Say that the listener is ready, where systemd waits for that: sd_notify(3)."""
    path = os.environ.pop("NOTIFY_SOCKET", "")
    if path:
        told = socket(AF_UNIX, SOCK_DGRAM)
        told.sendto(b"READY=1", "\0" + path[1:] if path[0] == "@" else path)
        told.close()


def make_socket(path: str, directory: int) -> socket:
    """Return a socket that listens at a path, in place of another listener's."""
    connections = socket(AF_UNIX, SOCK_STREAM)
    socketpath.bind(connections, path, directory)
    return connections


def protect_process() -> None:
    """Make this process, and the programs that it starts, leave no core; raises OSError.

    A core of its own would wait for this very process. Its programs get RLIMIT_CORE=1, as those of the pipe have it.
    """
    import resource
    from ctypes import CDLL

    os.umask(0o077)
    if CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(1, "cannot make this process leave no core")
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def preload(config: str) -> None:
    """Import the modules that every child needs: a crashed process would wait for them."""
    import core_dump_helper.backtrace
    import core_dump_helper.corecopy
    import core_dump_helper.keep
    import core_dump_helper.modules
    import core_dump_helper.runtime
    import core_dump_helper.usage  # noqa: F401

    settings = Settings()
    settings.load(config or CONFIG)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        make_writer("isal", null, settings).start()
    except (ImportError, OSError):  # each child tries the next compressor
        pass
    finally:
        os.close(null)
    give_back()


def give_back() -> None:
    """Give the memory back to the kernel that importing took for a moment; only the GNU C library can."""
    from ctypes import CDLL

    try:
        CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def warn(path: str) -> None:
    """Log conditions that lose dumps: another core pattern, a short backlog."""
    if not socketpath.is_in_pattern(path):
        log("kernel.core_pattern does not lead here; it has to be @@%s" % path)
    most = int(read_file(MOST_CONNECTIONS, 64))
    if most < socketpath.BACKLOG:
        log("net.core.somaxconn=%d: the kernel drops dumps beyond so many crashes at once" % most)

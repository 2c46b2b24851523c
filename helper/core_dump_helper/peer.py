"""Owns the identity of a connection's peer: only the kernel is accepted, on behalf of a process that dumps core.

The kernel names no process in its request. Everything comes from the connection (unix(7)), from the pidfd that it
gives (PIDFD_GET_INFO in linux/pidfd.h), and from /proc/PID while the kernel holds the process.
"""

from __future__ import annotations

import fcntl
import os
import time
from _socket import SO_PEERCRED, SOL_SOCKET
from _struct import pack_into, unpack, unpack_from

from core_dump_helper.cgroup import origin_of, parse_cgroup
from core_dump_helper.crash import MAX_CGROUP_BYTES, Crash, open_process, stat_fields
from core_dump_helper.system import Refused, read_fields, read_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from _socket import socket

SO_PEERPIDFD = 77
INFO_BYTES = 80
GET_INFO = 3 << 30 | INFO_BYTES << 16 | 0xFF << 8 | 11
"""_IOWR(0xFF, 11, struct pidfd_info); a kernel whose structure is shorter fills the rest with zeros."""
HAS_OWNER, HAS_COREDUMP, HAS_SIGNAL = 1 << 1, 1 << 4, 1 << 6
"""Fields of the structure. The owner is missing once the process is gone; the signal comes with Linux 6.19."""
WANTED = 0x1F | HAS_SIGNAL
COREDUMPED, DUMPABLE_BY_USER = 1, 4
"""Bits of coredump_mask; without the second one, only root may see the dump."""
NO_LIMIT = "18446744073709551615"
"""As %c writes RLIM_INFINITY."""
MAX_THREADS = 65536
MAX_LIMITS_BYTES = 4096


class Peer:
    """The process whose core comes over a connection."""

    def __init__(self, connection: socket) -> None:
        """Ask the connection; raises Refused unless the kernel opened it to dump a core."""
        self.accepted = time.time()
        try:
            self.pid, self.uid, self.gid = unpack("=iII", connection.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))
            (self.pidfd,) = unpack("=i", connection.getsockopt(SOL_SOCKET, SO_PEERPIDFD, 4))
        except OSError as error:
            raise Refused("", "the kernel does not say who connected: %s" % error.strerror) from error
        self._info = bytearray(INFO_BYTES)
        try:
            pack_into("=Q", self._info, 0, WANTED)
            fcntl.ioctl(self.pidfd, GET_INFO, self._info, True)
            (self._has,) = unpack_from("=Q", self._info)
            if not self._has & HAS_COREDUMP or not self._mask() & COREDUMPED:
                raise Refused("", "process %d, which does not dump core, connected" % self.pid)
            if self.pid <= 0:
                raise Refused("", "a process that cannot be seen from here dumps core: hostPID is missing")
        except OSError as error:
            self.close()
            raise Refused("", "process %d cannot be identified: %s" % (self.pid, error.strerror)) from error
        except Refused:
            self.close()
            raise

    def _mask(self) -> int:
        return int(unpack_from("=I", self._info, 64)[0])

    def close(self) -> None:
        """Close the pidfd."""
        os.close(self.pidfd)

    def origin(self) -> bytes:
        """Return the origin of the crash, for the queue: cgroup.origin_of."""
        metadata = {"uid": b"%d" % self.uid}
        try:
            metadata.update(parse_cgroup(read_file("/proc/%d/cgroup" % self.pid, MAX_CGROUP_BYTES)))
        except OSError:  # it was killed
            pass
        return origin_of(metadata)

    def crash(self, config: str) -> Crash:
        """Return the crash with the values that the pipe's arguments would have, if they can be read."""
        uid, gid = self.uid, self.gid
        found: dict[str, str] = {}
        if self._has & HAS_OWNER:
            uid, gid = unpack_from("=II", self._info, 28)
        values = {
            "P": "%d" % self.pid,
            "u": "%d" % uid,
            "g": "%d" % gid,
            "t": "%d" % self.accepted,
            "d": "1" if self._mask() & DUMPABLE_BY_USER else "2",
            "F": "%d" % self.pidfd,
            "C": config,
        }
        try:
            directory = open_process(self.pid)
        except OSError:  # it was killed
            return Crash(values)
        try:
            for read in (self._signal, _thread, _names, _limit, _host):
                try:
                    found.update(read(directory))
                except (OSError, ValueError, LookupError):  # costs only the values of this file
                    pass
        finally:
            os.close(directory)
        if self._is_alive():  # so the directory was that of this process
            values.update(found)
        return Crash(values)

    def _is_alive(self) -> bool:
        pid = read_fields("/proc/self/fdinfo/%d" % self.pidfd).get(b"Pid")
        return pid == [b"%d" % self.pid]

    def _signal(self, directory: int) -> dict[str, str]:
        """Return the signal: the wait status of a process that is about to end, before the core bit is set."""
        if self._has & HAS_SIGNAL:
            return {"s": str(unpack_from("=I", self._info, 68)[0])}
        status = int(stat_fields(directory, "stat")[49])
        return {"s": "%d" % (status & 0x7F)} if status & 0x7F else {}


def _thread(directory: int) -> dict[str, str]:
    """Return the crashing thread and its name.

    It is the only one that runs or waits for this process: before the kernel connects, every other thread has reached
    the state TASK_IDLE (coredump_task_exit in kernel/exit.c), or is a zombie.
    """
    tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        names = os.listdir(tasks)[:MAX_THREADS]
        for name in names:
            state = stat_fields(tasks, name + "/stat")[0]
            if state not in (b"I", b"Z", b"X") or len(names) == 1:
                return {"i": name, "e": _as_e(os.fsdecode(read_file(name + "/comm", 64, tasks)[:-1]))}
    finally:
        os.close(tasks)
    return {}


def _as_e(name: str) -> str:
    """Return a name as the kernel writes %e: cn_esc_printf in fs/coredump.c."""
    return "!" + name[1:] if name in ("", ".", "..") else name.replace("/", "!")


def _names(directory: int) -> dict[str, str]:
    """Return the number of the process in its own pid namespace."""
    return {"p": read_fields("status", directory)[b"NSpid"][-1].decode()}


def _limit(directory: int) -> dict[str, str]:
    """Return the soft limit of RLIMIT_CORE."""
    for line in read_file("limits", MAX_LIMITS_BYTES, directory).split(b"\n"):
        if line.startswith(b"Max core file size"):
            soft = line.split()[4].decode()
            return {"c": NO_LIMIT if soft == "unlimited" else soft}
    return {}


def _host(directory: int) -> dict[str, str]:
    """Return the host name of the process; this process moves to its UTS namespace, if it has the right to."""
    if os.readlink("ns/uts", dir_fd=directory) != os.readlink("/proc/self/ns/uts"):
        from ctypes import CDLL

        namespace = os.open("ns/uts", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            if CDLL(None).setns(namespace, 0):
                return {}
        finally:
            os.close(namespace)
    return {"h": os.uname().nodename}

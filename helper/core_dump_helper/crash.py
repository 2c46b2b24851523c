"""Owns what is known about a crash: the kernel's arguments and /proc/PID. The crashed process chose all of it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms
import os

from core_dump_helper.cgroup import origin_of, parse_cgroup
from core_dump_helper.system import read_fields, read_file

NUMBERS = "PpiugstcdF"
CORE_SIGNALS = ("SEGV", "ABRT", "BUS", "FPE", "ILL", "QUIT", "TRAP", "SYS", "XCPU", "XFSZ")
"""Signals whose default action is to dump core: signal(7)."""
FROM_KERNEL = ("pid", "signal", "timestamp", "uid", "gid", "tid", "dumpable", "rlimit", "thread", "hostname")
FROM_PROC = ("comm", "ns_pid", "container_id", "pod_uid", "origin", "threads", "exe", "cgroup", "cmdline")

MAX_CGROUP_BYTES = 64 << 10
"""Of /proc/PID/cgroup: each of 13 hierarchies may have a path of 4,096 bytes."""


class Crash:
    """One crash as the kernel describes it. Numbers are decimal digits, or empty where the kernel gives none."""

    def __init__(self, arguments: dict[str, str]) -> None:
        """Store the kernel's arguments, keyed by the letters of core(5)."""
        self.pid = arguments.get("P", "")
        """Process id in the initial pid namespace."""
        self.ns_pid = arguments.get("p", "")
        """Process id in the process's own pid namespace."""
        self.tid = arguments.get("i", "")
        """Crashing thread in the initial pid namespace."""
        self.uid = arguments.get("u", "")
        self.gid = arguments.get("g", "")
        self.signal = arguments.get("s", "")
        self.timestamp = arguments.get("t", "")
        self.rlimit = arguments.get("c", "")
        self.dumpable = arguments.get("d", "") or "2"  # the safest meaning
        self.pidfd = arguments.get("F", "")
        """Number of a descriptor of this process, or empty."""
        self.hostname = arguments.get("h", "")
        self.thread = arguments.get("e", "")
        """Name (comm) of the crashing thread."""
        self.config = arguments.get("C", "")
        """Path of the configuration file, or empty."""
        self.process = -1
        """Descriptor of /proc/PID if that belongs to the process that crashed."""

    def __str__(self) -> str:
        """Return how log lines name the process, with control characters escaped."""
        return "Process %s (%s)" % (self.pid or "?", ascii(self.thread)[1:-1])

    def sentence(self) -> str:
        """Return how log lines tell the crash: process, user and signal."""
        signal = self.signal or "?"
        for name in CORE_SIGNALS:
            if signal == str(int(getattr(_signal, "SIG" + name, 0))):
                signal += " (SIG%s)" % name
        return "%s of user %s terminated by signal %s" % (self, self.uid or "?", signal)


def parse_arguments(argv: list[str]) -> Crash:
    """Split `-Xvalue` arguments; the first of a kind wins, and `-h` takes everything up to `--`.

    Kernels before 5.3 split the pattern after expanding it: host and thread names may come in pieces, and values
    may be missing.
    """
    values: dict[str, str] = {}
    for index, argument in enumerate(argv):
        if argument == "--":
            values["e"] = " ".join(argv[index + 1 :])
            break
        if "h" in values:
            values["h"] += " " + argument
        elif argument[:1] == "-" and argument[1:2] in tuple("Ch" + NUMBERS):
            values.setdefault(argument[1], argument[2:])
    for key in NUMBERS:
        text = values.get(key, "")
        values[key] = text if text.isascii() and text.isdigit() and len(text) <= 20 else ""
    return Crash(values)


def open_process(number: int) -> int:
    """Return the descriptor of /proc/PID; a thread has such a directory too."""
    return os.open("/proc/%d" % number, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def stat_fields(directory: int | None, path: str) -> list[bytes]:
    """Return the fields of a `stat` behind the name, from the state (field 3) on: proc_pid_stat(5).

    Counted from the last `)`, because the name before it may contain one.
    """
    return read_file(path, 4096, directory).rpartition(b")")[2].split()


def start_time(directory: int | None, path: str) -> int:
    """Return when a process started, in clock ticks since boot: field 22 of `stat`."""
    return int(stat_fields(directory, path)[19])


def read_process(crash: Crash) -> dict[str, bytes]:
    """Read /proc/PID through one directory descriptor; return only `sensitive` if it belongs to another process."""
    process = open_process(int(crash.pid))
    try:
        found = read_files(process)
        thread = read_fields("task/%s/status" % crash.tid if crash.tid else "status", process)
        older = start_time(process, "stat") <= start_time(None, "/proc/self/stat")
        if older and is_identical(crash, thread):
            crash.process = process
            return found
    finally:
        if crash.process != process:
            os.close(process)
    return {"sensitive": b"identity"}


def read_files(process: int) -> dict[str, bytes]:
    """Read the files of /proc/PID, the cgroup first; one that cannot be read costs only what it says."""
    found: dict[str, bytes] = {}
    for read in (read_cgroup, read_counts, read_comm, read_cmdline, read_exe):
        try:
            found.update(read(process))
        except OSError:
            pass
    return found


def read_cgroup(process: int) -> dict[str, bytes]:
    """Read /proc/PID/cgroup."""
    return parse_cgroup(read_file("cgroup", MAX_CGROUP_BYTES, process))


def read_counts(process: int) -> dict[str, bytes]:
    """Read /proc/PID/status: the number of threads, the pid in the process's own namespace."""
    status = read_fields("status", process)
    found = {"threads": status.get(b"Threads", []), "ns_pid": status.get(b"NSpid", [])}
    return {name: words[-1] for name, words in found.items() if words}


def read_comm(process: int) -> dict[str, bytes]:
    """Read /proc/PID/comm."""
    return {"comm": read_file("comm", 64, process)[:-1]}


def read_cmdline(process: int) -> dict[str, bytes]:
    """Read /proc/PID/cmdline."""
    return {"cmdline": read_file("cmdline", 1024, process).rstrip(b"\0").replace(b"\0", b" ")}


def read_exe(process: int) -> dict[str, bytes]:
    """Read the link /proc/PID/exe."""
    return {"exe": os.fsencode(os.readlink("exe", dir_fd=process))}


def is_identical(crash: Crash, status: dict[bytes, list[bytes]]) -> bool:
    """Compare the owner in /proc and the kernel's pidfd with the kernel's arguments.

    `%F` exists since Linux 6.16 and in late 5.10 and 6.1; its fdinfo says `Pid: -1` once the process is gone.
    """
    for expected, field in ((crash.uid, b"Uid"), (crash.gid, b"Gid")):
        if expected not in ("", status[field][0].decode()):
            return False
    if not crash.pidfd:
        return True
    pid = read_fields("/proc/self/fdinfo/" + crash.pidfd).get(b"Pid")
    return pid in (None, [crash.pid.encode()])


def read_metadata(crash: Crash) -> tuple[dict[str, bytes], str]:
    """Return the dump's attributes, the most important first, and a warning or an empty string.

    A failure costs metadata, never the dump.
    """
    warning = ""
    metadata = {name: os.fsencode(getattr(crash, name)) for name in FROM_KERNEL}
    if crash.dumpable != "1":
        metadata["sensitive"] = b"dumpable=" + crash.dumpable.encode()
    try:
        metadata.update(read_process(crash))
        if metadata.get("sensitive") == b"identity":
            warning = "%s: /proc/%s belongs to another process; its metadata is dropped" % (crash, crash.pid)
    except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
        warning = "%s: no metadata from /proc: %s: %s" % (crash, type(error).__name__, error)
    metadata["origin"] = origin_of(metadata)
    names = ("sensitive", *FROM_KERNEL, *FROM_PROC)
    return {name: metadata[name] for name in names if metadata.get(name)}, warning


def shares_user_namespace(process: int) -> bool:
    """Return whether a process, given by its directory in /proc, has the helper's user namespace; raises OSError."""
    try:
        own = os.readlink("/proc/self/ns/user")
    except FileNotFoundError:  # a kernel without user namespaces
        return True
    return os.readlink("ns/user", dir_fd=process) == own


def memory_directory(crash: Crash) -> int:
    """Return the directory in /proc that has the memory: the thread's if the main thread has ended; it stays open.

    Raises:
        OSError: it cannot be opened.
        ValueError: it belongs to another process by now.
    """
    if crash.process < 0:
        return open_process(int(crash.pid))
    if not crash.tid or crash.tid == crash.pid or read_file("maps", 1, crash.process):
        return crash.process
    own = open_process(int(crash.tid))
    if start_time(own, "stat") != start_time(crash.process, "task/%d/stat" % int(crash.tid)):
        raise ValueError("/proc/%s belongs to another process" % crash.tid)
    return own


class OpenedFiles:
    """The files behind the code of the crashed process, opened while the kernel holds it, but not for reading."""

    def __init__(self) -> None:
        """Start empty."""
        self.files: dict[int, int] = {}
        """Descriptor, of O_PATH, by address."""
        self.mounts = -1
        """Descriptor of the process's mountinfo, which outlives the process."""
        self.is_ours = False
        """Whether the process has the helper's user namespace."""

    def close(self) -> None:
        """Close everything."""
        for descriptor in [*self.files.values(), *([self.mounts] if self.mounts >= 0 else [])]:
            os.close(descriptor)
        self.files, self.mounts = {}, -1


def open_files(crash: Crash, spans: list[tuple[int, int]]) -> OpenedFiles:
    """Open the files that are mapped at some addresses; those of other memory are left out.

    O_PATH waits for no file system and no lease. Costs about 10 us a file.
    """
    opened = OpenedFiles()
    directory = memory_directory(crash)
    try:
        opened.mounts = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        opened.is_ours = shares_user_namespace(directory)
        for start, end in spans:
            try:
                path = "map_files/%x-%x" % (start, end)
                opened.files[start] = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                continue
    except OSError:
        opened.close()
        raise
    return opened

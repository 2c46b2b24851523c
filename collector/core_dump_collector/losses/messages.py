"""Owns the meaning of one line of the kernel log. Pure.

The crashed process chooses parts of these lines: the name of a thread (15 bytes) and the name of a file. Every pattern
therefore covers the whole line, and a name is at most 15 bytes long. Lines of the kernel have facility 0, which no
other writer can use (devkmsg_write in kernel/printk/printk.c); lines of the helper have facility 3.

Sources: fs/coredump.c of Linux 4.14, 5.10 and 6.18; show_signal_msg in arch/x86/mm/fault.c; show_signal in
arch/x86/kernel/traps.c; arm64_show_signal in arch/arm64/kernel/traps.c; __oom_kill_process in mm/oom_kill.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL, DAEMON = 0, 3
"""Facilities (syslog(3))."""
MOST_COMM_BYTES = 15
"""TASK_COMM_LEN without its NUL."""


class Drop(StrEnum):
    """Why the kernel made no dump of a crash; bounded, so it can be a metric label."""

    PIPE_LIMIT = "pipe_limit"
    """More helpers ran than kernel.core_pipe_limit allows."""
    HELPER_MISSING = "helper_missing"
    """The program that the pattern names does not exist."""
    HELPER_NOT_STARTED = "helper_not_started"
    """It could not be executed, or it is missing and this process cannot see the node's files."""
    NO_LISTENER = "no_listener"
    SOCKET_MISSING = "socket_missing"
    SOCKET_SYMLINK = "socket_symlink"
    """The path of the socket contains a symbolic link."""
    SOCKET_FULL = "socket_full"
    SOCKET_FAILED = "socket_failed"
    HELPER_CRASHED = "helper_crashed"
    """RLIMIT_CORE is 1: the helper itself, or a program that it started, has crashed."""
    PATTERN = "pattern"
    """The kernel cannot use the core pattern."""
    FILE = "file"
    """The kernel refused to write the core into a file."""
    MEMORY = "memory"
    UNNAMED = "unnamed"
    """The kernel suppressed the lines that would have named the reason, and printed their number."""


REFUSALS = (
    *("rate_limit", "keep_free", "max_total_bytes", "inodes", "disk_full", "no_slot"),
    *("directory", "rlimit", "ignored_signal", "rule"),
)
"""Reasons for which the helper refuses a dump; it records the refusal (docs/contracts.md)."""
HELPER_FAILURES = (*REFUSALS, "nothing_read", "killed", "not_started", "memory", "error")
"""Reasons for which there is neither a dump nor a record; a refusal counts here if it could not be recorded."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The kernel made no dump. `pid` is the one in the process's own namespace; 0 if the kernel does not say."""

    reason: Drop
    comm: bytes = b""
    pid: int = 0
    program: bytes = b""
    """Program in the pattern that the kernel could not start."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault killed a process; only other lines can tell whether a dump was made."""

    comm: bytes
    tid: int
    """Of the thread, in the initial namespace."""
    signal: int
    """0 if the line does not say."""


@dataclass(frozen=True, slots=True)
class OomKilled:
    """The kernel killed a process because memory ran out; that never causes a dump."""

    comm: bytes
    pid: int


@dataclass(frozen=True, slots=True)
class Suppressed:
    """The kernel left out lines of one kind, because there were too many."""

    number: int
    faults: bool
    """True for faults, False for dumps that were not made."""


@dataclass(frozen=True, slots=True)
class HelperTold:
    """The helper has reported a crash and makes a dump of it, whole or partial."""

    comm: bytes
    pid: int
    """In the initial namespace."""
    signal: int


@dataclass(frozen=True, slots=True)
class HelperFailed:
    """The helper left neither a dump nor a record of a crash."""

    reason: str
    comm: bytes
    pid: int
    signal: int


@dataclass(frozen=True, slots=True)
class HelperCannotCount:
    """The helper with this pid cannot record what it refuses."""

    helper: int


@dataclass(frozen=True, slots=True)
class HelperRefused:
    """The helper with this pid refused a dump for a reason that it records, if it can."""

    helper: int
    reason: str
    comm: bytes
    pid: int
    signal: int


Event = (
    Dropped | Fault | OomKilled | Suppressed | HelperTold | HelperFailed | HelperCannotCount | HelperRefused
)


def parse(facility: int, text: bytes) -> Event | None:
    """Return the event that a line reports; None if it is not about crashes.

    Args:
        facility: of its writer.
        text: its bytes, as they were written.
    """
    if facility == KERNEL:
        for pattern, build in _OF_KERNEL:
            match = pattern.fullmatch(text)
            if match is not None:
                return build(match)
    elif facility == DAEMON:
        return _parse_helper(text)
    return None


# The kernel

_NEW = rb"coredump: (\d{1,10})\((.{0,60}?)\): "
"""Since 6.12; the name is escaped (%pE)."""
_OLD = rb"(?:Pid|Process) (\d{1,10})\((.{0,15}?)\) "
_COMM = rb"(.{0,15}?)"
_SOCKET_ERRORS = {
    2: Drop.SOCKET_MISSING,
    40: Drop.SOCKET_SYMLINK,
    11: Drop.SOCKET_FULL,
    111: Drop.NO_LISTENER,
}
_TRAPS = {b"trap invalid opcode": 4, b"trap int3": 5, b"trap divide error": 8, b"trap stack segment": 7}
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"f": b"\f", b"v": b"\v", b"a": b"\a", b"e": b"\x1b"}


def _unescape(name: bytes) -> bytes:
    """Undo %pE (string_escape_mem in lib/string_helpers.c)."""

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8) & 0xFF]) if len(code) > 1 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(plain, name)


def _drop(reason: Drop) -> Callable[[re.Match[bytes]], Dropped | None]:
    def build(match: re.Match[bytes]) -> Dropped | None:
        comm = _unescape(match[2])
        return Dropped(reason, comm, int(match[1])) if len(comm) <= MOST_COMM_BYTES else None

    return build


def _drop_unstarted(match: re.Match[bytes]) -> Event | None:
    event = _drop(Drop.HELPER_NOT_STARTED)(match)
    return event and replace(event, program=match[3].split(b" ", 1)[0])


def _drop_at_socket(match: re.Match[bytes]) -> Event | None:
    return _drop(_SOCKET_ERRORS.get(int(match[3]), Drop.SOCKET_FAILED))(match)


def _fault(match: re.Match[bytes]) -> Event:
    return Fault(match[1], int(match[2]), 11)


def _trap(match: re.Match[bytes]) -> Event:
    return Fault(match[1], int(match[2]), 11 if match[3].startswith(b"general") else _TRAPS.get(match[3], 0))


_OF_KERNEL: tuple[tuple[re.Pattern[bytes], Callable[[re.Match[bytes]], Event | None]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), build)
    for pattern, build in (
        (_NEW + rb"over core_pipe_limit, skipping core dump", _drop(Drop.PIPE_LIMIT)),
        (_NEW + rb"\|(.{0,4096}) pipe failed", _drop_unstarted),
        (_NEW + rb"Core dump to \|.{0,4096} disabled", _drop(Drop.HELPER_NOT_STARTED)),
        (_NEW + rb"Coredump socket connection .{0,200} failed -(\d{1,4})", _drop_at_socket),
        (_NEW + rb"Coredump socket .{0,200} receive queue full", _drop(Drop.SOCKET_FULL)),
        (_NEW + rb"RLIMIT_CORE is set to 1, aborting core", _drop(Drop.HELPER_CRASHED)),
        (_NEW + rb"format_corename failed, aborting core", _drop(Drop.PATTERN)),
        (_NEW + rb"this process can only dump core to a fully qualified path, .{0,40}", _drop(Drop.PATTERN)),
        (_NEW + rb"Core dump to .{0,4096} aborted: cannot preserve file \w{1,20}", _drop(Drop.FILE)),
        (_NEW + rb"\w{1,40} failed to allocate memory", _drop(Drop.MEMORY)),
        (_OLD + rb"over core_pipe_limit", _drop(Drop.PIPE_LIMIT)),
        (_OLD + rb"has RLIMIT_CORE set to 1", _drop(Drop.HELPER_CRASHED)),
        (_OLD + rb"can only dump core to fully qualified path!", _drop(Drop.PATTERN)),
        (
            rb"Core dump to \|(\S{1,4096})(?: .{0,4096})? pipe failed",
            lambda match: Dropped(Drop.HELPER_NOT_STARTED, program=match[1]),
        ),
        (rb"format_corename failed", lambda _: Dropped(Drop.PATTERN)),
        (rb"do_coredump failed to allocate memory", lambda _: Dropped(Drop.MEMORY)),
        (
            _COMM + rb"\[(\d{1,10})\]: segfault at [0-9a-f]{1,16} ip [0-9a-f]{8,16} sp [0-9a-f]{8,16} "
            rb"error [0-9a-f]{1,8}(?: in .{1,300})?",
            _fault,
        ),
        (
            rb"traps: " + _COMM + rb"\[(\d{1,10})\] (trap [a-z0-9 ]{1,40}|general protection(?: fault)?) "
            rb"ip:[0-9a-f]{1,16} sp:[0-9a-f]{1,16} error:[0-9a-f]{1,8}(?: in .{1,300})?",
            _trap,
        ),
        (
            _COMM + rb"\[(\d{1,10})\]: unhandled exception: .{1,500}",
            lambda match: Fault(match[1], int(match[2]), 0),
        ),
        (
            (
                rb"(?:(?:Memory cgroup out|Out) of memory[^:]{0,40}: )?Killed process (\d{1,10}) \((.{0,15}?)\),? "
                rb".{0,40}?total-vm:.{1,300}"
            ),
            lambda match: OomKilled(match[2], int(match[1])),
        ),
        (
            (
                rb"(?:do_coredump|vfs_coredump|coredump_(?:pipe|file|sock\w{0,20}|parse|socket)): "
                rb"(\d{1,9}) callbacks suppressed"
            ),
            lambda match: Suppressed(int(match[1]), faults=False),
        ),
        (
            (
                rb"(?:show_signal_msg|show_signal|arm64_show_signal|force_sig_fault\w{0,20}): "
                rb"(\d{1,9}) callbacks suppressed"
            ),
            lambda match: Suppressed(int(match[1]), faults=True),
        ),
    )
)

# The helper

_HELPER = re.compile(rb"core-dump-helper\[(\d{1,10})\]: (.{1,1000})", re.DOTALL)
_CRASH = re.compile(
    rb"Process (\d{1,10}|\?) \((.{0,150}?)\) of user (?:\d{1,10}|\?) terminated by signal (\d{1,3}|\?)"
    rb"(?: \(SIG[A-Z]{1,6}\))?; (dumping|no dump: (.{0,900}))",
    re.DOTALL,
)
_CANNOT_COUNT = re.compile(rb"cannot (?:use \.helper|count [a-z_]{1,20} in \.helper): .{0,900}", re.DOTALL)
_PYTHON_ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|.)", re.DOTALL)
_DIRECTORY_ERRORS = (b"FileNotFoundError", b"NotADirectoryError", b"PermissionError", b"OSError: [Errno 40]")


def _parse_helper(text: bytes) -> Event | None:
    line = _HELPER.fullmatch(text)
    if line is None:
        return None
    helper = int(line[1])
    if _CANNOT_COUNT.fullmatch(line[2]):
        return HelperCannotCount(helper)
    crash = _CRASH.fullmatch(line[2])
    if crash is None:
        return None
    pid, signal = (0 if crash[i] == b"?" else int(crash[i]) for i in (1, 3))
    comm = _PYTHON_ESCAPE.sub(_plain, crash[2])[:MOST_COMM_BYTES]
    return _judge(helper, crash[5] if crash[5] is not None else b"", comm, pid, signal)


def _plain(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code[1:], 16)]) if len(code) > 1 else _ESCAPED.get(code, code)


def _judge(helper: int, why: bytes, comm: bytes, pid: int, signal: int) -> Event:
    """Return the event for the helper's reason for making no dump; the reason is empty if it makes one."""
    word = why.partition(b":")[0].decode("ascii", "replace")
    if word in REFUSALS:
        return HelperRefused(helper, word, comm, pid, signal)
    if not why or why.endswith(b".partial holds what it wrote"):
        return HelperTold(comm, pid, signal)
    reason = "error"
    if why.startswith(b"nothing was written"):
        reason = "nothing_read"
    elif why.startswith(_DIRECTORY_ERRORS):
        reason = "directory"
    elif why.startswith(b"MemoryError"):
        reason = "memory"
    elif why.startswith(b"not_started"):
        reason = "not_started"
    return HelperFailed(reason, comm, pid, signal)

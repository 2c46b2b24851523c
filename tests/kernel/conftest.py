"""A node whose kernel pipes its dumps into the helper."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support import kernel, listener
from tests.support.cleanup import temporary_directory
from tests.support.collector import wait_until

TRANSPORT = os.environ.get("TRANSPORT", "pipe")
"""How the kernel hands dumps over: `pipe`, `@` or `@@`."""
PF_EXITING = 0x4
"""In include/linux/sched.h, and in the field `flags` of /proc/PID/stat (proc_pid_stat(5))."""
DUMP = re.compile(r"core-(.*)-\d+-(\d+)-\d+(-\d+)?(\.gz)?(\.partial)?")


def pytest_collection_modifyitems(items):
    """Skip this tier as an ordinary user."""
    if kernel.can_crash():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="crashes real processes, needs root: sudo make test"))


def is_changing(process):
    """Say whether a process without a command line starts a program, or ends and may still have files open.

    The kernel takes a process's memory first, then its files, and then makes it a zombie (do_exit in kernel/exit.c).

    Raises:
        OSError: it is neither (a thread of the kernel has no program), or it is gone.
    """
    state, *fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
    if int(fields[5]) & PF_EXITING:
        return state not in (b"Z", b"X")
    return bool((process / "exe").readlink())


@dataclass
class Node:
    """A watch directory, an installed helper, and a program that crashes."""

    directory: Path
    watch_dir: Path
    program: Path
    crashes: set[tuple[str, int]] = field(default_factory=set)
    """Name, as a file's name holds it, and pid, in its own namespace, of each crash of this test."""
    started: list[subprocess.Popen] = field(default_factory=list)
    """Processes that will crash, or have."""
    listener: subprocess.Popen | None = None
    """Receives the dumps, where the kernel sends them to a socket."""
    inside: list[str] = field(default_factory=list)
    """The beginning of a command that runs in an image (tests/support/images.py)."""

    @contextlib.contextmanager
    def installed(
        self,
        python=sys.executable,
        *,
        pipe_limit=None,
        sort_vma=None,
        transport=TRANSPORT,
        how=None,
        **settings,
    ):
        """Let the kernel start the helper with these settings, or send dumps to one; `how` is the listener's."""
        given = {"WATCH_DIR": self.watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 1, "VITAL_LIMIT": 0}
        given |= settings
        pattern = kernel.install_helper(self.directory, given, python)
        if transport == "pipe":
            with kernel.core_pattern(pattern, pipe_limit, sort_vma=sort_vma):
                yield self
            return
        pattern = f"{transport}{self.socket}"
        with self.listening(**how or {}), kernel.core_pattern(pattern, pipe_limit, sort_vma=sort_vma):
            yield self
            self.settle()

    @property
    def socket(self):
        """Return the path of this node's socket."""
        return self.directory / "s" / "k"

    @contextlib.contextmanager
    def listening(self, **how):
        """Let the installed helper listen at this node's socket."""
        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        with listener.listening(self.directory, self.socket, **how) as self.listener:
            yield self.listener
        self.listener = None

    def keep_copy(self, *configs):
        """Keep the kernel's own bytes in the file `copy` while they go to the helper, once for each configuration.

        Without one, the helper has that of the node.
        """
        if self.listener:
            pytest.skip("needs the pipe")
        given = [[f"-C{config}"] for config in configs] or [[]]
        installed = kernel.PATTERN.read_text().split()[0][1:]
        tee = self.directory / "tee"
        tee.write_text(
            textwrap.dedent(f"""\
            #!{sys.executable} -IS
            import contextlib, os, subprocess, sys
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, 1), os.dup2(null, 2)
            helpers = [
                subprocess.Popen(
                    [{installed!r}, *options, *sys.argv[1:]], stdin=subprocess.PIPE, pass_fds=[3]
                )
                for options in {given!r}
            ]
            with open({str(self.directory / "copy")!r}, "wb") as copy:
                while data := os.read(0, 1 << 16):
                    copy.write(data)
                    for helper in helpers:
                        with contextlib.suppress(BrokenPipeError):  # it trims the dump
                            helper.stdin.write(data)
            for helper in helpers:
                with contextlib.suppress(BrokenPipeError):
                    helper.stdin.close()
            for helper in helpers:
                helper.wait()
            """)
        )
        tee.chmod(0o755)
        kernel.PATTERN.write_text(f"|{tee} {kernel.ARGUMENTS}\n")

    def expect(self, name, pid):
        """Count dumps of this process as ours: others on this machine may crash at the same time."""
        safe = re.sub(rb"[^A-Za-z0-9._+-]", b"_", name).decode() or "_"
        self.crashes.add((re.sub("^[-.]", "_", safe), pid))

    def crash_only(self, signal=11, program=None, name=b"crash", **how):
        """Crash one process; return its pid."""
        process = kernel.crash(program or self.program, signal, name=name, **how)
        pid = int(process.stdout or 0)
        self.expect(name, pid)
        return pid

    def crash(self, signal=11, program=None, **how):
        """Crash one process and wait until its helper has ended; return the process's pid."""
        pid = self.crash_only(signal, program, **how)
        self.settle()
        return pid

    def start(self, *command, name, **how):
        """Start a process that will crash under this name."""
        process = subprocess.Popen(command, **how)
        self.expect(name, process.pid)
        self.started.append(process)
        return process

    def is_ours(self, name):
        """Say whether a name in the watch directory, or at the end of a key, is not that of a stranger's dump."""
        found = DUMP.fullmatch(name)
        return not found or (found[1], int(found[2])) in self.crashes

    def settle(self):
        """Wait until no helper runs, and until each that has ended has released its locks and files."""
        wait_until(lambda: not self.helpers(or_changing=True), 60, "the helpers to end")

    def helpers(self, *, or_changing=False):
        """Return the pids of helpers started from this node's directory.

        With `or_changing`, also those of all processes that start a program now, as a helper that starts itself
        again, and of those that end now: both have no command line for a moment (proc(5)).
        """
        found, program = [], str(self.directory / "core-dump-helper").encode()
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = entry.read_bytes()
                if program in command or (or_changing and not command and is_changing(entry.parent)):
                    found.append(int(entry.parent.name))
        return [pid for pid in found if not self.listener or pid != self.listener.pid]

    def names(self):
        """Return all names in the watch directory except the helper's state, modules and strangers' dumps."""
        state = {".helper", ".modules"}
        return sorted(name for name in os.listdir(self.watch_dir) if name not in state and self.is_ours(name))

    def has_dump(self):
        """Return whether a dump was published."""
        return any(not name.endswith(".partial") for name in self.names())

    def dump(self):
        """Return the path of the only dump."""
        (name,) = self.names()
        return self.watch_dir / name


def attributes(path):
    """Return the helper's attributes of a dump."""
    prefix = "user.coredump."
    return {n[len(prefix) :]: os.getxattr(path, n) for n in os.listxattr(path) if n.startswith(prefix)}


def core_of(path):
    """Return the core in a dump."""
    return gzip.decompress(path.read_bytes())


def backtrace(program, core):
    """Return gdb's backtrace of every thread."""
    command = ["gdb", "-nx", "--batch", "-ex", "thread apply all bt", program, core]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@contextlib.contextmanager
def new_node():
    """Make a node in a short path: the kernel takes 127 bytes of pattern."""
    with temporary_directory("cdh-", "/var/tmp") as directory:
        watch_dir = directory / "w"
        watch_dir.mkdir(mode=0o700)
        node = Node(directory, watch_dir, directory / "crash")
        kernel.build(kernel.CRASHER, node.program, "-pthread")
        yield node
        node.settle()
        for process in node.started:
            process.kill()
            with process:  # closes its pipes and waits
                pass


@pytest.fixture
def node():
    """A node of one test."""
    with new_node() as made:
        yield made

"""Owns a process that has crashed once and is held, so that its core can be dumped as often as a test wants.

The kernel starts a program that passes the core on to the installed helper and keeps a copy. As long as this program
has the kernel's pipe open, the kernel keeps the process (`kernel.core_pipe_limit`), with its memory and its directory
in /proc. More helpers then get the copy through another pipe, and read the memory of the same process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import isal
from tests.support import kernel, memorycgroup
from tests.support.collector import wait_until

HELD_SECONDS = 900
QUICKLY = {"COMPRESSOR": "isal", "PYTHON_PATH": Path(isal.__file__).parents[1]}
KEEPER = """\
#!{python} -IS
import json, os, signal, subprocess, sys
signal.alarm({seconds})
null = os.open("/dev/null", os.O_RDWR)
os.dup2(null, 1), os.dup2(null, 2)
helper = subprocess.Popen([{installed!r}, *sys.argv[1:]], stdin=subprocess.PIPE, pass_fds=[3])
with open({copy!r}, "xb") as copy:
    while data := os.read(0, 1 << 20):
        if data.count(0) < len(data):
            copy.write(data)
        else:
            copy.seek(len(data), os.SEEK_CUR)
        helper.stdin.write(data)
    copy.truncate()
helper.stdin.close()
helper.wait()
with open({arguments!r} + ".new", "w") as file:
    json.dump(sys.argv[1:], file)
os.rename({arguments!r} + ".new", {arguments!r})
with open({release!r}) as file:
    file.read()
"""
"""A second crash, of somebody else, finds the copy and fails."""
HOG = """\
import os, signal
print(flush=True)
input()
for _ in range(8):
    if not os.fork():
        memory = b"x" * (40 << 20)
        break
signal.pause()
"""
"""Each process of it holds less than half of the limit: the helper, whose oom_score_adj is 500, is the one to go."""
LIMIT_BYTES = 256 << 20
REST_BYTES = 1000
"""Even a MiB of zeros has as many."""


@dataclass
class HeldCrash:
    """One crash; `directory` is that of the installed helper."""

    directory: Path
    helper: str
    """Path of the installed helper."""

    @property
    def copy(self) -> Path:
        """The core as the kernel wrote it."""
        return self.directory / "copy"

    @property
    def _arguments(self) -> Path:
        return self.directory / "arguments"

    @property
    def _release(self) -> Path:
        return self.directory / "release"

    def is_held(self) -> bool:
        """Tell whether the helper that the kernel has started has ended, and the process is held."""
        return self._arguments.exists()

    def keep(self) -> None:
        """Let the kernel start the keeper."""
        values = {"copy": self.copy, "arguments": self._arguments, "release": self._release}
        os.mkfifo(self._release)
        keeper = self.directory / "keeper"
        texts = {name: str(path) for name, path in values.items()}
        keeper.write_text(
            KEEPER.format(python=sys.executable, seconds=HELD_SECONDS, installed=self.helper, **texts)
        )
        keeper.chmod(0o755)
        kernel.PATTERN.write_text(f"|{keeper} {kernel.ARGUMENTS}\n")

    def release(self) -> None:
        """Let the process go."""
        with contextlib.suppress(OSError):  # nobody waits at the other end
            os.close(os.open(self._release, os.O_WRONLY | os.O_NONBLOCK))

    @contextlib.contextmanager
    def dumping(self, watch_dir: Path, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
        """Start another helper for the same crash."""
        given = {"WATCH_DIR": watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 0, "MAX_TOTAL_BYTES": 0}
        config = kernel.write_config(watch_dir.with_suffix(".conf"), given | QUICKLY)
        arguments = [word for word in json.loads(self._arguments.read_text()) if word[:2] not in {"-F", "-C"}]
        with subprocess.Popen(
            [*prefix, self.helper, f"-C{config}", *arguments], stdin=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def dump_again(self, watch_dir: Path) -> None:
        """Dump the whole core again."""
        with self.dumping(watch_dir) as process, self.copy.open("rb") as core:
            feed(process.stdin, core)
            process.wait()

    def dump_half(self, watch_dir: Path, end: Callable[[int], None], prefix: tuple[str, ...] = ()) -> int:
        """Dump half of the core, then `end` the helper, whose pid it gets; return its exit code."""
        with self.dumping(watch_dir, prefix) as process, self.copy.open("rb") as core:
            half = self.copy.stat().st_size // 2
            feed(process.stdin, core, half, end=False)
            wait_until(lambda: has_more_than_vital_part(watch_dir), 60, "some of the rest")
            end(process.pid)
            return process.wait(60)


def has_more_than_vital_part(watch_dir: Path) -> bool:
    """Tell whether the only dump of a directory has its vital part and some of the rest."""
    (dump,) = watch_dir.glob("core-*")
    name = "user.coredump.vital_bytes"
    return name in os.listxattr(dump) and dump.stat().st_size > int(os.getxattr(dump, name)) + REST_BYTES


def feed(pipe: IO[bytes] | None, core: IO[bytes], size: int = sys.maxsize, end: bool = True) -> None:
    """Write a core into a pipe, at most `size` bytes of it, until nobody reads."""
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError):
        while data := core.read(min(size, 1 << 20)):
            pipe.write(data)
            size -= len(data)
        pipe.flush()
    if end:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


@contextlib.contextmanager
def memory_cgroup(name: str) -> Iterator[tuple[tuple[str, ...], Callable[[int], None], Path]]:
    """Yield a prefix that starts a command in a memory cgroup, a function that exhausts its memory, and its events.

    Raises:
        LookupError: there is no memory cgroup.
    """
    with memorycgroup.memory_cgroup(f"core-dump-programs-{name}", LIMIT_BYTES) as (path, events):
        prefix = ("sh", "-c", f'echo $$ > {path}/cgroup.procs && exec "$@"', "sh")
        yield prefix, lambda pid: exhaust(prefix, pid), events


def exhaust(prefix: tuple[str, ...], pid: int) -> None:
    """Use up the memory of a cgroup until the kernel has killed a process in it."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [*prefix, sys.executable, "-c", HOG]
    with subprocess.Popen(command, start_new_session=True, **pipes) as hog:
        assert hog.stdout is not None
        assert hog.stdin is not None
        hog.stdout.readline()
        hog.stdin.write(b"\n")
        hog.stdin.flush()
        try:
            wait_until(lambda: is_dead(pid), 60, "the kernel to kill the helper")
        finally:
            os.killpg(hog.pid, signal.SIGKILL)


def is_dead(pid: int) -> bool:
    """Tell whether a child has ended, without waiting for it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

"""Owns the proof that a crash leaves a whole dump: a process with a name of its own crashes, its dump is read."""

from __future__ import annotations

import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import time
import zlib

from core_dump_setup import release
from core_dump_setup.disk import remove_any
from core_dump_setup.errors import SetupError, say

SECONDS = 10.0
LOOK_SECONDS = 0.01
NOTES_BYTES = 1 << 20
"""A core begins with its headers and notes; the arguments of the process stand in the first few KiB."""
DEFAULT_FILTER = b"0x33"


class KernelLog:
    """Messages that the kernel log gets from now on."""

    def __init__(self) -> None:
        """Open the log at its end; where it cannot be read, there are no messages."""
        self.lines: list[str] = []
        try:
            self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError:
            self._descriptor = -1

    def read(self) -> list[str]:
        """Return all messages since the log was opened, at most 1,000 more with each call."""
        for _ in range(1000 if self._descriptor >= 0 else 0):
            try:
                record = os.read(self._descriptor, 8192)
            except BlockingIOError:
                break
            except OSError:  # the record was overwritten before it could be read: the next one follows
                continue
            self.lines.append(record.decode("utf-8", "replace").partition(";")[2].split("\n")[0])
        return self.lines

    def close(self) -> None:
        """Close the log."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


def prove(directory: str, *, keep: bool) -> None:
    """Crash a process and find its dump, whole, in `directory`; remove the dump unless `keep` is given.

    Raises:
        SetupError: no dump arrived before the helper ended or SECONDS passed, or one that is cut or of another process.
    """
    name, token = "coretest-" + secrets.token_hex(3), secrets.token_hex(16)
    log = KernelLog()
    try:
        _crash(name, token)
        path = _wait_for_dump(directory, name, token, log)
        if not path:
            say("a test process crashed; its dump arrived and was collected")
            return
        say("a test process crashed and its dump arrived: " + path)
        if not keep:
            remove_any(path)
    finally:
        log.close()


def _crash(name: str, token: str) -> None:
    """Let a shell under another name die of SIGSEGV, with `token` among its arguments.

    The name keeps the crash apart from all others, in the log, in the directory and in the helper's rate limit.
    """
    program = os.path.join(release.FOLDER, name)
    try:
        shutil.copyfile("/bin/sh", program)
        os.chmod(program, 0o755)
        command = ["sh", "-c", "read -r line", token]
        with subprocess.Popen(
            command,
            executable=program,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            preexec_fn=_allow_dump,  # noqa: PLW1509 - there is one thread
        ) as process:
            try:
                process.send_signal(signal.SIGSEGV)
                process.wait(SECONDS)
            finally:
                process.kill()  # ends a dump that hangs; nothing happens to a process that is gone
    except subprocess.TimeoutExpired as error:
        raise SetupError("a test process crashed and its dump did not end within %d s" % SECONDS) from error
    except OSError as error:
        raise SetupError("cannot start a test process: %s" % error) from error
    finally:
        remove_any(program)


def _allow_dump() -> None:
    """Give a process the kernel's default settings for its dump, whatever started us had."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        with open("/proc/self/coredump_filter", "wb") as file:
            file.write(DEFAULT_FILTER)
    except OSError:
        pass


def _wait_for_dump(directory: str, name: str, token: str, log: KernelLog) -> str:
    """Return the path of the dump, or nothing if a collector was faster than we are.

    Raises:
        SetupError: as `prove` says.
    """
    published = re.compile(re.escape("core-%s-" % name) + r"\S* is (complete|truncated \(\w+\)): \d+ bytes ")
    end = time.monotonic() + SECONDS
    running = True
    while running and time.monotonic() < end:
        running = (
            release.is_running()
        )  # asked before the looks: what a helper leaves when it ends is found by them
        results = list(filter(None, map(published.search, log.read())))
        for entry in _entries(directory):
            if entry.startswith("core-%s-" % name) and not entry.endswith(".partial"):
                path = os.path.join(directory, entry)
                fault = _fault(path, token)
                if fault:
                    raise SetupError("a test process crashed, but its dump %s %s" % (path, fault))
                if fault is not None:
                    return path
        if results:
            if results[-1].group(1) != "complete":
                raise SetupError("a test process crashed, but its dump is " + results[-1].group(1))
            return ""
        time.sleep(LOOK_SECONDS)
    related = [
        line for line in log.read() if name in line or "coredump" in line or "core-dump-helper" in line
    ]
    raise SetupError(
        "a test process crashed and no dump arrived in %s; the kernel's log:\n%s"
        % (directory, "\n".join(related[-5:]) or "(nothing about it)")
    )


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _fault(path: str, token: str) -> str | None:
    """Return what is wrong with a dump, nothing if it is whole and ours, None if it has just gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        head = file.read(NOTES_BYTES)
        if path.endswith(".gz"):
            try:
                head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, NOTES_BYTES)
            except zlib.error as error:
                return "is no gzip file: %s" % error
        try:
            reason = os.getxattr(descriptor, "user.coredump.truncated").decode("ascii", "replace")
        except OSError:
            reason = ""
    if not head.startswith(b"\x7fELF"):
        return "is no core"
    if token.encode() not in head:
        return "is of another process"
    return "was cut: " + reason if reason else ""

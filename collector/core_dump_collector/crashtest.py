"""Owns `check --crash`: a process of our own crashes, and each stage on its way to the bucket is waited for."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass

from core_dump_collector.node.watch import Watch
from core_dump_format.names import is_partial, parse_name, unpartial

_NAME = "core-check"
_SIGNAL = signal.SIGSYS
"""Rare, so that this crash uses up no other crash's RATE_LIMIT: it counts by executable, container and signal."""
_HELD_SECONDS = 60.0
_HELD = (
    f"crash: the process was held for {_HELD_SECONDS:.0f} s, so it was killed: the program in kernel.core_pattern does "
    "not read the core"
)
_BEGIN_SECONDS = 5.0
"""Without even a partial dump after this time, none is coming."""
_ARRIVAL_SECONDS = 30.0
_COLLECTION_SECONDS = 30.0
_STEP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class CrashResult:
    """How far the dump of our own crash came."""

    passed: bool
    text: str


def run(directory: str) -> CrashResult:
    """Let a process crash, and follow its dump until it leaves the directory.

    A collector that runs beside this uploads and deletes the dump; without one it stays, and this says so.
    """
    name = f"{_NAME}-{os.urandom(2).hex()}"  # 15 bytes, as long as a comm can be
    try:
        with Watch(directory) as watch:
            status = _crash(name)
            if status is None:
                return CrashResult(False, _HELD)
            if not os.WIFSIGNALED(status):
                return CrashResult(False, "crash: a process of this program could not crash itself")
            dump = _wait_for_dump(watch, directory, name)
    except OSError as error:
        return CrashResult(False, f"crash: {directory} cannot be watched: {error.strerror}")
    if dump is None:
        return _explain_missing(directory, name, dumped=os.WCOREDUMP(status))
    deadline = time.monotonic() + _COLLECTION_SECONDS
    while time.monotonic() < deadline:
        if not os.path.lexists(os.path.join(directory, dump)):
            return CrashResult(True, f"crash: {dump} arrived and was collected")
        time.sleep(_STEP_SECONDS)
    return CrashResult(
        False,
        f"crash: kernel and helper work, but {dump} still waits after {_COLLECTION_SECONDS:.0f} s: start a "
        "collector, or see in its log why it does not upload",
    )


def _crash(name: str) -> int | None:
    """Fork a process of this name that ends by _SIGNAL; return its wait status, None if it is held too long."""
    pid = os.fork()
    if pid == 0:
        try:
            with open("/proc/self/comm", "w") as file:
                file.write(name)
            _, most = resource.getrlimit(resource.RLIMIT_CORE)
            resource.setrlimit(resource.RLIMIT_CORE, (most, most))
            signal.signal(_SIGNAL, signal.SIG_DFL)
            os.kill(os.getpid(), _SIGNAL)
            time.sleep(1)
        finally:
            os._exit(1)
    deadline = time.monotonic() + _HELD_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(_STEP_SECONDS)
    os.kill(pid, signal.SIGKILL)  # which ends its dump as well: core(5)
    os.waitpid(pid, 0)
    return None


def _wait_for_dump(watch: Watch, directory: str, name: str) -> str | None:
    """Return the name of the dump that a process of this name left; None if none arrives in time."""
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < _ARRIVAL_SECONDS:
        arrived = [dump for dump in watch.read().names if _is_of(dump, name)]
        if arrived:
            return arrived[0]
        if elapsed > _BEGIN_SECONDS and _partial_of(directory, name) is None:
            return None
        time.sleep(_STEP_SECONDS)
    return None


def _is_of(dump: str, name: str) -> bool:
    parsed = parse_name(dump)
    return parsed is not None and parsed.comm == name


def _partial_of(directory: str, name: str) -> str | None:
    try:
        names = os.listdir(directory)
    except OSError:
        return None
    return next((each for each in names if is_partial(each) and _is_of(unpartial(each), name)), None)


def _explain_missing(directory: str, name: str, *, dumped: bool) -> CrashResult:
    partial = _partial_of(directory, name)
    if partial is not None:
        return CrashResult(
            False, f"crash: the helper did not end {partial}; see `dmesg | grep core-dump-helper`"
        )
    if not dumped:
        return CrashResult(
            False,
            "crash: the kernel wrote no core: see kernel.core_pattern, and this shell's hard limit (ulimit -Hc)",
        )
    return CrashResult(
        False,
        f"crash: the kernel handed the core over, but no dump reached {directory}: see "
        "`dmesg | grep core-dump-helper` on the node (after five tries in ten minutes, RATE_LIMIT refuses more)",
    )

"""Processes to crash: seeded memory images, a loader that makes one its own memory, and `sleep` as a small process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from bench import machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20

# Makes records as a service would hold them and writes its own heap, then text, numbers and zeros, to a file.
MAKE_IMAGE = """
import array, itertools, random, sys
path, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rnd = random.Random(seed)
letters = "etaoinshrdlucmfwypvbgkjqxz"
words = ["".join(rnd.choices(letters, k=rnd.randint(2, 11))) for _ in range(20000)]
weights = list(itertools.accumulate(1 / (n + 3) for n in range(len(words))))
def text(count):
    return " ".join(rnd.choices(words, cum_weights=weights, k=count))
records = []
for number in range(size // 20000):
    records.append({"id": number, "name": text(2), "price": rnd.random() * 100, "tags": rnd.sample(words, 3),
        "note": text(40), "seen": [rnd.getrandbits(40) for _ in range(8)], "key": rnd.randbytes(16)})
walk, price = array.array("d"), 100.0
for _ in range(1 << 20):
    price += rnd.gauss(0, 0.1)
    walk.append(round(price, 2))
numbers = walk.tobytes() + array.array("i", [int(p * 100) for p in walk]).tobytes()
prose = text(2_000_000).encode()
def fill(out, parts, share):
    left = int(size * share)
    while left > 0:
        for part in parts:
            left -= out.write(part[:left])
            if left <= 0:
                break
with open(path, "wb") as out, open("/proc/self/mem", "rb") as memory:
    heap = []
    for line in open("/proc/self/maps").read().splitlines():
        span, mode, *rest = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if mode.startswith("rw") and (len(rest) < 4 or rest[3] == "[heap]") and high - low < 1 << 28:
            memory.seek(low)
            heap.append(memory.read(high - low))
    fill(out, heap, 0.4)
    fill(out, [prose], 0.25)
    fill(out, [numbers], 0.15)
    out.truncate(size)
"""

LOADER = """
import mmap, os, signal, sys
kind, _, rest = sys.argv[1].partition(":")
size = os.stat(rest).st_size if kind == "image" else int(rest)
NORESERVE = 0x4000
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
view, block = memoryview(memory), bytes(1 << 20)
if kind == "hog":
    memory.madvise(mmap.MADV_HUGEPAGE)  # or it takes minutes
if kind != "image":
    for offset in range(0, size if kind != "reserve" else 64 << 20, 1 << 20):
        view[offset:offset + (1 << 20)] = block[:min(1 << 20, size - offset)]
else:
    with open(rest, "rb", buffering=0) as file:
        while (offset := file.tell()) < size:
            file.readinto(view[offset:offset + (1 << 20)])
os.write(1, b"r")
signal.pause()
"""


def make_image(path: Path, size: int, seed: int = 1) -> None:
    """Write an image of a process's memory: 40 % a heap of objects, 25 % text, 15 % numbers, 20 % zeros."""
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    subprocess.run(
        [sys.executable, "-S", "-c", MAKE_IMAGE, path, str(size), str(seed)], check=True, env=environ
    )


def make_random(path: Path, size: int) -> None:
    """Write bytes that nothing compresses."""
    with path.open("wb") as out:
        for _ in range(size // MIB):
            out.write(os.urandom(MIB))


@contextlib.contextmanager
def loaded(what: str) -> Iterator[int]:
    """Yield the pid of a process that holds `image:PATH`, `zeros:BYTES` or `hog:BYTES` as its own memory.

    `reserve:BYTES` is memory of which only the first 64 MiB were touched.
    """
    process = _load(what)
    try:
        _wait_loaded(process)
        yield process.pid
    except BaseException:  # it did not crash
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdout:
            process.stdout.close()
        process.returncode = -signal.SIGSEGV  # it was waited for by its pid


@contextlib.contextmanager
def many(what: str, count: int) -> Iterator[list[int]]:
    """Yield the pids of several processes that hold the same."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(loaded(what)) for _ in range(count)]


def _load(what: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-E", "-c", LOADER, what], stdout=subprocess.PIPE)


def _wait_loaded(process: subprocess.Popen[bytes]) -> None:
    if process.stdout is None or process.stdout.read(1) != b"r":
        raise RuntimeError("the process that holds memory did not start")


@contextlib.contextmanager
def hog(leave: int) -> Iterator[None]:
    """Hold so much memory that only `leave` bytes are available."""
    size = machine.memory_bytes("MemAvailable") - leave - (MIB << 6)
    halves = [_load(f"hog:{size // 2}") for _ in range(2)]  # two cores fill it in half the time
    try:
        for process in halves:
            _wait_loaded(process)
        yield
    finally:
        for process in halves:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def small(count: int = 1) -> Iterator[list[int]]:
    """Yield the pids of `sleep` processes: cores of about half a megabyte."""
    processes = [subprocess.Popen(["/bin/sleep", "600"]) for _ in range(count)]
    try:
        for process in processes:
            while not _sleeps(process.pid):
                time.sleep(0.001)
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.returncode = -signal.SIGSEGV


def _sleeps(pid: int) -> bool:
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().split()[0] in {"230", "115"}  # clock_nanosleep on x86-64, arm64


def crash(pids: list[int]) -> tuple[float, list[float]]:
    """Send SIGSEGV to each; return when that began and how long each took until waitpid had it (seconds)."""
    begin = time.perf_counter()
    for pid in pids:
        os.kill(pid, signal.SIGSEGV)
    times = []
    left = set(pids)
    while left:
        pid, status = os.waitpid(-1, 0)
        if pid in left:
            left.discard(pid)
            times.append(time.perf_counter() - begin)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGSEGV:
                raise RuntimeError(f"{pid} ended otherwise: {status:#x}")
    return begin, times

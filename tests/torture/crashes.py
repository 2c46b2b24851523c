"""Owns the crashes: random processes with random names and sizes, and what their dumps must hold."""

from __future__ import annotations

import contextlib
import gzip
import random
import signal
import struct
import subprocess
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MARK = b"TORTURE-MARK-" + b"START::####"
MASK = 2**64 - 1
SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
NAMES: tuple[bytes, ...] = (
    b"",
    b".",
    b"..",
    b"-rf",
    b"a b",
    b"a  b ",
    b"a/b",
    b"$(reboot)",
    b";id",
    b"`id`",
    b"\n\n",
    b"%s%n",
    b"*",
)
NAMES += (b"'\"", b"\xff\xfe\x80", b"core-1-2-3.gz", b"x.gz.partial", b"\x1b[31m", b"app", b"worker-7")


@dataclass(frozen=True)
class Crash:
    """One process that is going to crash."""

    name: bytes
    size: int
    seed: int
    signal: int

    @classmethod
    def random(cls, dice: random.Random) -> Crash:
        """Choose one."""
        name = dice.choice(NAMES) if dice.random() < 0.7 else dice.randbytes(dice.randint(1, 15))
        size = dice.choice((0, 4096, 100_000, 1_000_000, 8_000_000))
        return cls(name.replace(b"\0", b"?"), size, dice.getrandbits(63), dice.choice(SIGNALS))

    def start(self, program: Path) -> subprocess.Popen[bytes]:
        """Start the process and wait until it is ready to crash."""
        arguments = [self.name.hex(), str(self.size), str(self.seed), str(int(self.signal))]
        process = subprocess.Popen(
            [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    def memory(self) -> bytes:
        """Return what the process has in memory behind the mark."""
        state, words = self.seed | 1, []
        for position in range(0, self.size // 8 * 8, 8):
            state ^= state << 13 & MASK
            state ^= state >> 7
            state ^= state << 17 & MASK
            words.append(0 if position // 4096 % 4 else state)
        return struct.pack(f"<{len(words)}Q", *words)


def compile_crasher(directory: Path) -> Path:
    """Build the crashing program."""
    from pathlib import Path

    program = directory / "crasher"
    source = Path(__file__).with_name("crasher.c")
    subprocess.run(["gcc", "-O1", "-static", "-w", "-o", program, source], check=True)
    return program


def unpack(content: bytes) -> bytes | None:
    """Return the whole of a gzip file, or None when it is not whole."""
    with contextlib.suppress(EOFError, OSError, zlib.error):
        return gzip.decompress(content)
    return None


def expected_length(core: bytes) -> int:
    """Return how long an ELF64 core must be by its program headers."""
    offset, size, count = (*struct.unpack_from("<Q", core, 32), *struct.unpack_from("<HH", core, 54))
    ends = []
    for number in range(count):
        start, length = struct.unpack_from("<Q16xQ", core, offset + number * size + 8)
        ends.append(start + length)
    return max(ends, default=0)


def fault_in(core: bytes, crash: Crash) -> str | None:
    """Return what is wrong with a core that claims to be complete, or None."""
    if not core.startswith(b"\x7fELF"):
        return "no ELF core"
    if len(core) != expected_length(core):
        return f"{len(core)} bytes instead of {expected_length(core)}"
    memory = MARK + crash.memory()
    return None if memory in core else "the process's memory is not in it"

"""Owns frames of a core whose programs and libraries cannot be read: evidence for grouping, not a backtrace. Pure.

A chain of saved frame pointers counts if it has several links; else the first words of the stack that point into the
code of a file. Contexts that signal handlers interrupted are found by their mark.
"""

from __future__ import annotations

from core_dump_format.runtime import is_runtime
from core_dump_format.walk import Frame

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.walk import Process

STACK_BYTES = 64 << 10
SCAN_BYTES = 16 << 10
MAX_CONTEXTS = 4
"""Signal handlers that interrupted one another."""
MAX_FRAMES = 64
MAX_OWN = 16
"""Frames that are not in a library that only carries out a death."""
MIN_CHAIN = 3
"""A shorter chain may be a register that is used for something else."""


def guess(process: Process, registers: dict[int, int]) -> list[Frame]:
    """Return the frames of a thread from its registers, by DWARF number, and its stack."""
    machine = process.machine
    frames = [Frame(registers[machine.pc], is_exact=True)]
    for _ in range(MAX_CONTEXTS if machine.mark else 0):
        saved = _interrupted(process, registers[machine.sp])
        if saved is None:
            break
        registers = saved
        for frame in frames:
            frame.in_handler = True
        frames.append(Frame(registers[machine.pc], is_exact=True))
    sp, fp = registers[machine.sp], registers.get(machine.fp, 0)
    found = _chain(process, sp, fp)
    if len(found) < MIN_CHAIN:
        found = _scan(process, sp)
    return frames + [Frame(address, is_exact=False) for address in found]


def _interrupted(process: Process, sp: int) -> dict[int, int] | None:
    """Return the registers in the first signal frame above a stack pointer."""
    machine = process.machine
    size = machine.word_bytes
    stack = process.read(sp, STACK_BYTES)
    at = stack.find(machine.mark)
    while at >= 0 and ((sp + at) % size or at + machine.saved_at < 0):
        at = stack.find(machine.mark, at + 1)
    if at < 0:
        return None
    start = at + machine.saved_at
    registers = machine.from_signal_frame(stack[start : start + len(machine.saved) * size])
    is_known = registers is not None and len(process.read(registers[machine.sp], size)) == size
    return registers if is_known else None


def _in_file_code(process: Process, address: int) -> bool:
    return process.mapping_at(address) is not None and process.is_code(address)


def _chain(process: Process, sp: int, fp: int) -> list[int]:
    """Follow saved frame pointers: each points to the next one, followed by the return address."""
    size = process.machine.word_bytes
    found: list[int] = []
    stack = process.read(sp, STACK_BYTES)
    word = process.machine.word
    while len(found) < MAX_FRAMES and sp <= fp <= sp + len(stack) - 2 * size and not fp % size:
        (saved,) = word.unpack_from(stack, fp - sp)
        (address,) = word.unpack_from(stack, fp - sp + size)
        if not _in_file_code(process, address):
            break
        found.append(address)
        if saved <= fp:
            break
        fp = saved
    return found


def _scan(process: Process, sp: int) -> list[int]:
    """Return the first words of a stack that point into the code of a mapped file."""
    word = process.machine.word
    stack = process.read(-(-sp // word.size) * word.size, SCAN_BYTES)
    found: list[int] = []
    own = 0
    for (value,) in word.iter_unpack(stack[: len(stack) // word.size * word.size]):
        if len(found) == MAX_FRAMES or own == MAX_OWN:
            break
        mapping = process.mapping_at(value)
        if mapping and process.is_code(value):
            found.append(value)
            own += not is_runtime(mapping.name, "")
    return found

"""Owns finding the frames of a thread: from its registers to its callers, through signal handlers. Pure.

A caller is found by the first of these that holds: the unwind information of the file; the frame pointer; the words of
the stack, of which one counts only if a call instruction precedes the address that it holds. Where no file can be
read, as in a raw core, `guess` is used.

The stack, the registers and the files come from the crashed process. Each step moves up the stack, or out of a signal
handler; the numbers of steps and of words are limited.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from struct import error

from core_dump_format.cfi import unwind
from core_dump_format.cursor import UnwindError
from core_dump_format.machine import ADDRESS_MASK, CALL_BYTES, call_before, follows_system_call

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dump_format.machine import Call, Machine
    from core_dump_format.objectfile import ObjectFile

MAX_STEPS = 128
SCAN_BYTES = 32 << 10
REACH_BYTES = 8 << 20
"""The longest frame that a frame pointer may bridge."""
LEAF_BYTES = 4096
"""Of the stack: below a frame pointer, where the return addresses of functions lie that keep none."""


_UNUSABLE = (UnwindError, error, OverflowError, KeyError, OSError)
"""Hostile memory and files raise these, and files that cannot be read."""


class Mapping:
    """One mapping of a file."""

    __slots__ = ("end", "name", "offset", "start")

    def __init__(self, start: int, end: int, offset: int, name: str) -> None:
        """Store addresses, offset in the file, and the file's name without its directory."""
        self.start, self.end, self.offset, self.name = start, end, offset, name


class Process:
    """The process whose frames are found. Subclasses provide its memory and its files."""

    def __init__(self, machine: Machine, mappings: list[Mapping]) -> None:
        """Store the mappings of files, in any order."""
        self.machine = machine
        self._mappings = sorted(mappings, key=lambda mapping: mapping.start)
        self._starts = [mapping.start for mapping in self._mappings]

    def mapping_at(self, address: int) -> Mapping | None:
        """Return the mapping of a file at an address."""
        place = bisect_right(self._starts, address)
        found = self._mappings[place - 1] if place else None
        return found if found and address < found.end else None

    def is_code(self, address: int) -> bool:
        """Tell whether an address is in executable memory."""
        raise NotImplementedError

    def read(self, address: int, size: int) -> bytes:
        """Return the memory at an address, as far as it is known."""
        raise NotImplementedError

    def object_of(self, mapping: Mapping) -> ObjectFile | None:
        """Return the file of a mapping, or None if it cannot be read."""
        del mapping
        return None

    def object_at(self, address: int) -> tuple[ObjectFile, int] | None:
        """Return the file at an address, and the distance from an address of the process to one of the file."""
        mapping = self.mapping_at(address)
        code = self.object_of(mapping) if mapping else None
        own = code.address_of(address - mapping.start + mapping.offset) if code and mapping else None
        return (code, own - address) if code and own is not None else None


class Frame:
    """One frame: an address, and whether the thread was exactly there or a call returns there."""

    __slots__ = ("address", "in_handler", "is_exact")

    def __init__(self, address: int, *, is_exact: bool) -> None:
        """Store the address."""
        self.address, self.is_exact = address, is_exact
        self.in_handler = False
        """Whether a signal handler, or something that it called, was there."""

    @property
    def lookup(self) -> int:
        """Return an address within the instruction that was executed."""
        return self.address if self.is_exact or not self.address else self.address - 1


class Walk:
    """Finds the frames of one thread, the newest first."""

    def __init__(self, process: Process, seconds: float = 2.0) -> None:
        """Prepare to walk for so many seconds."""
        self._process, self._machine = process, process.machine
        self._deadline = time.monotonic() + seconds
        self.frames: list[Frame] = []
        self.is_cut = False
        """Whether there are more frames than were followed."""
        self._follows = False
        """Whether a frame pointer has led to the newest frame."""

    def run(self, registers: dict[int, int]) -> list[Frame]:
        """Find the frames from a thread's registers on, by DWARF number."""
        is_exact = True
        for _ in range(MAX_STEPS):
            if time.monotonic() > self._deadline:
                return self.frames
            saved = self._saved_context(registers[self._machine.sp] + self._machine.mark_at)
            if not is_exact and saved:
                registers, is_exact = saved, True
                self._mark_handler()
                continue
            frame = Frame(registers[self._machine.pc], is_exact=is_exact)
            self.frames.append(frame)
            found = self._caller(registers, frame)
            if found is None:
                return self.frames
            registers, is_exact = found
            if is_exact:
                self._mark_handler()
        self.is_cut = True
        return self.frames

    def has_asked(self) -> bool:
        """Tell whether the thread was in a system call, as after raise(3): nothing in its newest function failed."""
        if not self.frames:
            return False
        machine, address = self._machine, self.frames[0].address
        return follows_system_call(machine, self._code(address))

    def _mark_handler(self) -> None:
        for frame in self.frames:
            frame.in_handler = True

    def _saved_context(self, mark_at: int) -> dict[int, int] | None:
        """Return the registers in the signal frame whose mark lies at an address."""
        machine = self._machine
        size = machine.word_bytes
        if not machine.mark or self._process.read(mark_at, size) != machine.mark:
            return None
        content = self._process.read(mark_at + machine.saved_at, len(machine.saved) * size)
        return machine.from_signal_frame(content)

    def _caller(self, registers: dict[int, int], frame: Frame) -> tuple[dict[int, int], bool] | None:
        """Return the registers of a frame's caller, and whether they are those of an interrupted function."""
        steps: list[Callable[[dict[int, int], Frame], dict[int, int] | None]]
        if not self._process.is_code(frame.lookup):
            steps = [self._by_call]
        else:
            steps = [self._by_information, self._by_leaf, self._by_frame_pointer]
        for step in steps:
            try:
                found = step(registers, frame)
            except _UNUSABLE:
                continue
            if found is not None:
                return (found, False) if found.get(self._machine.pc) else None
        try:
            return self._by_scan(registers, frame)
        except _UNUSABLE:
            return None

    def _word(self, address: int) -> int:
        content = self._process.read(address, self._machine.word_bytes)
        if len(content) < self._machine.word_bytes:
            raise UnwindError("memory that the core lacks")
        return int(self._machine.word.unpack(content)[0])

    def _words(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield address and value of the words of a range."""
        step = self._machine.word_bytes
        address = -(-address // step) * step
        content = self._process.read(address, size)
        values = self._machine.word.iter_unpack(content[: len(content) // step * step])
        for number, (value,) in enumerate(values):
            yield address + number * step, value

    def _function_start(self, address: int) -> int | None:
        """Return the start of the function at an address, or None if its file does not have it."""
        found = self._process.object_at(address)
        start = found[0].function_start(address + found[1]) if found else None
        return start - found[1] if found and start is not None else None

    def _code(self, address: int) -> bytes:
        """Return the CALL_BYTES bytes before an address, or nothing if they are not known."""
        at = address - CALL_BYTES
        if at < 0 or not self._process.is_code(address - 1):
            return b""
        found = self._process.object_at(address - 1)
        return found[0].code(at + found[1], CALL_BYTES) if found else self._process.read(at, CALL_BYTES)

    def _call(self, address: int) -> Call | None:
        return call_before(self._machine, self._code(address), address)

    def _by_information(self, registers: dict[int, int], frame: Frame) -> dict[int, int] | None:
        """Apply the unwind information of the file; without a program counter if the function has no caller."""
        machine = self._machine
        found = self._process.object_at(frame.lookup)
        if found is None:
            return None
        code, shift = found
        function = code.function_at(frame.lookup + shift)
        caller = unwind(function, frame.lookup + shift, registers, machine.sp, self._word)
        number = function.common.return_register
        caller[machine.pc] = caller.get(number, 0)
        if machine.link is not None:
            caller[machine.pc] &= ADDRESS_MASK
        if not caller[machine.pc]:
            return caller
        grown = caller[machine.sp] - registers[machine.sp]
        least = 0 if frame.is_exact and machine.link is not None else machine.word_bytes
        is_plausible = least <= grown < REACH_BYTES and self._process.is_code(caller[machine.pc] - 1)
        return caller if is_plausible else None

    def _by_call(self, registers: dict[int, int], frame: Frame) -> dict[int, int] | None:
        """Return from a function whose code is not there: a call of a wrong address has just pushed its caller."""
        machine = self._machine
        sp = registers[machine.sp]
        pushed = registers[machine.link] & ADDRESS_MASK if machine.link is not None else self._word(sp)
        if not frame.is_exact or not self._process.is_code(pushed - 1):
            return None
        if self._has_code_at(pushed) and self._call(pushed) is None:
            return None
        above = sp if machine.link is not None else sp + machine.word_bytes
        return {**registers, machine.pc: pushed, machine.sp: above}

    def _has_code_at(self, address: int) -> bool:
        return len(self._code(address)) == CALL_BYTES

    def _by_leaf(self, registers: dict[int, int], frame: Frame) -> dict[int, int] | None:
        """Find the caller of a function that keeps no frame pointer, below the frame that the register points to."""
        machine = self._machine
        sp, fp = registers[machine.sp], registers.get(machine.fp, 0)
        start = self._function_start(frame.lookup)
        if start is None:
            return None
        if machine.link is not None and frame.is_exact:
            call = self._call(registers[machine.link] & ADDRESS_MASK)
            if call and call.target == start:
                return {**registers, machine.pc: registers[machine.link] & ADDRESS_MASK}
        for at, value in self._words(sp, min(LEAF_BYTES, fp - sp if fp > sp else 0)):
            if self._process.is_code(value - 1):
                call = self._call(value)
                if call and call.target == start:
                    return {**registers, machine.pc: value, machine.sp: at + machine.word_bytes}
        return None

    def _by_frame_pointer(self, registers: dict[int, int], frame: Frame) -> dict[int, int] | None:
        """Follow the frame pointer: it points to the saved one of the caller, followed by the return address."""
        del frame
        machine = self._machine
        sp, fp = registers[machine.sp], registers.get(machine.fp, 0)
        if not fp and self._follows:
            return {machine.pc: 0}  # the outermost frame has no saved one
        self._follows = False
        if not sp <= fp < sp + REACH_BYTES or fp % machine.word_bytes:
            return None
        saved, address = self._word(fp), self._word(fp + machine.word_bytes)
        if machine.link is not None:
            address &= ADDRESS_MASK
        if not self._process.is_code(address - 1):
            return None
        if self._has_code_at(address) and self._call(address) is None and not self._is_link(saved, fp):
            return None
        self._follows = True
        return {**registers, machine.pc: address, machine.sp: fp + 2 * machine.word_bytes, machine.fp: saved}

    def _is_link(self, saved: int, fp: int) -> bool:
        """Tell whether a frame pointer leads on to a return address.

        Go makes a faulting instruction look as if it had called the function that panics.
        """
        size = self._machine.word_bytes
        return (
            fp < saved < fp + REACH_BYTES
            and not saved % size
            and self._call(self._word(saved + size)) is not None
        )

    def _by_scan(self, registers: dict[int, int], frame: Frame) -> tuple[dict[int, int], bool] | None:
        """Find the next word of the stack that a call has pushed, or the context that a signal handler interrupted.

        A call of another function in the same file counts only if no better call is found.
        """
        machine = self._machine
        start, mapping = self._function_start(frame.lookup), self._process.mapping_at(frame.lookup)
        second = None
        for at, value in self._words(registers[machine.sp], SCAN_BYTES):
            saved = (
                self._saved_context(at)
                if value.to_bytes(machine.word_bytes, "little") == machine.mark
                else None
            )
            if saved:
                return saved, True
            other = self._process.mapping_at(value - 1)
            if not other or not self._process.is_code(value - 1):
                continue
            call = self._call(value)
            if call is None:
                continue
            caller = {**registers, machine.pc: value, machine.sp: at + machine.word_bytes}
            if start is None or call.target in (None, start) or other is not mapping:
                return caller, False
            second = second or caller
        return (second, False) if second else None

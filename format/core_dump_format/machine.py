"""Owns the properties of each machine by which frames are found: registers, signal frames, call instructions. Pure.

Registers have their DWARF numbers. Sources: the psABI of each machine ("DWARF Register Number Mapping"), <asm/user.h>
for the notes of a core, struct sigcontext in <asm/sigcontext.h> for signal frames.
"""

from __future__ import annotations

from struct import Struct

from core_dump_format.state import AARCH64, I386, SIGNAL_MARKS, X86_64

CALL_BYTES = 8
"""The longest call instruction of any machine here has 7 bytes."""
_REL32 = Struct("<i")


class Machine:
    """The properties of one machine."""

    def __init__(  # noqa: PLR0913, PLR0917 - a row of a table
        self,
        word: str,
        registers: dict[int, int],
        pc: int,
        sp: int,
        fp: int,
        link: int | None = None,
        context: tuple[bytes, int, int, tuple[int, ...]] | None = None,
    ) -> None:
        """Store the numbers.

        Args:
            word: `Q` or `I`.
            registers: place in the notes of each register, by its DWARF number.
            pc: number under which the program counter is kept.
            sp: number of the stack pointer.
            fp: number of the frame pointer.
            link: number of the register that holds a return address, where there is one.
            context: of a signal frame: the word that marks it, its distance from the stack pointer in a handler's
                caller, that of the registers from the mark, and the registers there.
        """
        self.word = Struct("<" + word)
        self.word_bytes = self.word.size
        self.registers, self.pc, self.sp, self.fp, self.link = registers, pc, sp, fp, link
        self.mark, self.mark_at, self.saved_at, self.saved = context or (b"", 0, 0, ())

    def from_notes(self, values: tuple[int, ...]) -> dict[int, int]:
        """Return the registers of NT_PRSTATUS by DWARF number."""
        return {number: values[place] for number, place in self.registers.items()}

    def from_signal_frame(self, content: bytes) -> dict[int, int] | None:
        """Return the registers in the part of a signal frame that holds them; None if it is cut short."""
        if len(content) < len(self.saved) * self.word_bytes:
            return None
        return dict(zip(self.saved, [value for (value,) in self.word.iter_unpack(content)]))


_X86_CONTEXT = (8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 6, 3, 1, 0, 2, 7, 16)
"""r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip."""
_X86_NOTES = (10, 12, 11, 5, 13, 14, 4, 19, 9, 8, 7, 6, 3, 2, 1, 0, 16)
"""rax, rdx, rcx, rbx, rsi, rdi, rbp, rsp, r8 to r15, rip."""
MACHINES = {
    (64, X86_64): Machine(
        "Q",
        dict(enumerate(_X86_NOTES)),
        pc=16,
        sp=7,
        fp=6,
        context=(SIGNAL_MARKS[X86_64], 184, -144, _X86_CONTEXT),
    ),
    (64, AARCH64): Machine(
        "Q",
        {number: number for number in range(33)},  # x0 to x30, sp, pc
        pc=32,
        sp=31,
        fp=29,
        link=30,
        context=(SIGNAL_MARKS[AARCH64], 592, -280, tuple(range(33))),
    ),
    (32, I386): Machine("I", {0: 6, 1: 1, 2: 2, 3: 0, 4: 15, 5: 5, 6: 3, 7: 4, 8: 12}, pc=8, sp=4, fp=5),
}
"""By ELF class and number of the machine."""
ADDRESS_MASK = (1 << 48) - 1
"""AArch64 may keep a pointer authentication code above a return address."""


class Call:
    """A call instruction, and the address that it calls if the instruction holds it."""

    def __init__(self, target: int | None) -> None:
        """Store the target."""
        self.target = target


def call_before(machine: Machine, code: bytes, address: int) -> Call | None:
    """Return the call instruction that ends at an address, or None if none does.

    Args:
        machine: the machine of the instruction.
        code: the CALL_BYTES bytes before the address.
        address: a possible return address.
    """
    if len(code) != CALL_BYTES:
        return None
    return _arm_call(code, address) if machine.link is not None else _x86_call(machine, code, address)


def _arm_call(code: bytes, address: int) -> Call | None:
    instruction = int.from_bytes(code[-4:], "little")
    if instruction >> 26 == 0x25:  # BL
        words = instruction & 0x3FFFFFF
        return Call(address - 4 + 4 * (words - (words >> 25 << 26)))
    is_indirect = instruction & 0xFEFFF800 == 0xD63F0800 or instruction & 0xFFFFFC1F == 0xD63F0000
    return Call(None) if is_indirect else None  # BLR, BLRA*


def _x86_call(machine: Machine, code: bytes, address: int) -> Call | None:
    if code[-5] == 0xE8:
        (distance,) = _REL32.unpack(code[-4:])
        return Call(address + distance & (1 << 8 * machine.word_bytes) - 1)
    return Call(None) if any(_is_indirect_call(code[-size:]) for size in (2, 3, 4, 6, 7)) else None


def _is_indirect_call(code: bytes) -> bool:
    """Tell whether bytes are exactly one `call r/m`: opcode FF /2 (Intel SDM, volume 2, "ModR/M and SIB Bytes")."""
    if code[0] != 0xFF or code[1] >> 3 & 7 != 2:
        return False
    mode, operand = code[1] >> 6, code[1] & 7
    size = 2
    if mode == 3:
        return len(code) == size
    base = operand
    if operand == 4:
        if len(code) < 3:
            return False
        size, base = 3, code[2] & 7
    if mode == 1:
        size += 1
    elif mode == 2 or base == 5:
        size += 4
    return len(code) == size


def follows_system_call(machine: Machine, code: bytes) -> bool:
    """Tell whether code ends in the instruction that enters the kernel: the thread has asked for its signal."""
    if machine.link is not None:
        return code[-4:] == b"\x01\x00\x00\xd4"
    return code[-2:] in (b"\x0f\x05", b"\xcd\x80", b"\x0f\x34")

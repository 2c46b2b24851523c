"""Owns unwinding by call frame information: from the registers in a function to those in its caller. Pure.

`.eh_frame` is in every program that a C, C++ or Rust compiler makes for Linux. Sources: DWARF 5, section 6.4; Linux
Standard Base, "Exception Frames". The file may be hostile: every length is compared with what was read, and one
instruction or operation takes at least a byte of it.
"""

from __future__ import annotations

from core_dump_format.cursor import Cursor, UnwindError
from core_dump_format.expression import MASK, evaluate

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.expression import ReadWord

    Rule = tuple[str, int | bytes]

MAX_REMEMBERED = 16
MAX_REGISTER = 96
_POINTERS = {0x00: "Q", 0x02: "H", 0x03: "I", 0x04: "Q", 0x0A: "h", 0x0B: "i", 0x0C: "q"}
"""DW_EH_PE_ formats."""


class Common:
    """A CIE: the properties that several functions share."""

    def __init__(self, content: bytes) -> None:
        """Read an entry behind its length and id; raises UnwindError."""
        cursor = Cursor(content)
        version = cursor.fixed("B")
        end = content.find(b"\0", 1)
        letters = content[1:end]
        if version not in (1, 3) or end < 0 or letters[:1] not in (b"", b"z"):
            raise UnwindError("an unknown version")
        cursor.at = end + 1
        self.code_factor, self.data_factor = cursor.uleb(), cursor.sleb()
        self.return_register = cursor.fixed("B") if version == 1 else cursor.uleb()
        self.pointers, self.is_augmented = 0, letters[:1] == b"z"
        rest = cursor.uleb() if self.is_augmented else 0
        self.program = content[cursor.at + rest :]
        for letter in letters[1:]:
            if letter == ord("R"):
                self.pointers = cursor.fixed("B")
            elif letter == ord("L"):
                cursor.fixed("B")
            elif letter == ord("P"):
                cursor.fixed(_POINTERS.get(cursor.fixed("B") & 0x0F, "Q"))
            elif letter != ord("S"):  # a signal frame, which has nothing to read
                break


class Function:
    """An FDE: the addresses of a function, and the program that tells where its registers are saved."""

    def __init__(self, common: Common, content: bytes, address: int) -> None:
        """Read an entry behind its length and id, which begins at `address`; raises UnwindError."""
        layout = _POINTERS.get(common.pointers & 0x0F)
        base = {0x00: 0, 0x10: address}.get(common.pointers & 0xF0)
        if layout is None or base is None:
            raise UnwindError("pointers of an unknown kind")
        cursor = Cursor(content)
        self.common = common
        self.start = base + cursor.fixed(layout) & MASK
        self.end = self.start + cursor.fixed(layout.upper())
        if common.is_augmented:
            cursor.block(cursor.uleb())
        self.program = content[cursor.at :]


class Row:
    """The rules that hold at one address."""

    def __init__(self) -> None:
        """Start without a rule."""
        self.base: tuple[int, int] | bytes = (0, 0)
        """Of the canonical frame address (CFA): register and offset, or an expression."""
        self.rules: dict[int, Rule] = {}

    def copy(self) -> Row:
        """Return a copy."""
        other = Row()
        other.base, other.rules = self.base, dict(self.rules)
        return other


class _Program:
    """Runs the instructions of a function up to an address."""

    def __init__(self, function: Function, target: int) -> None:
        self.row, self.initial = Row(), Row()
        self.remembered: list[Row] = []
        self._common, self._at, self._target = function.common, function.start, target
        self._run(function.common.program)
        self.initial = self.row.copy()
        self._run(function.program)

    def _run(self, program: bytes) -> None:
        cursor = Cursor(program)
        while cursor.at < len(program) and self._at <= self._target:
            code = cursor.fixed("B")
            kind, low = code & 0xC0, code & 0x3F
            if kind == 0x40:
                self._advance(low)
            elif kind == 0x80:
                self._offset(low, cursor.uleb())
            elif kind == 0xC0:
                self._restore(low)
            elif not self._advanced(code, cursor) and not self._defined(code, cursor):
                self._ruled(code, cursor)

    def _advance(self, count: int) -> None:
        self._at += count * self._common.code_factor

    def _set(self, register: int, rule: Rule) -> None:
        if register < MAX_REGISTER:
            self.row.rules[register] = rule

    def _offset(self, register: int, factored: int) -> None:
        self._set(register, ("offset", factored * self._common.data_factor))

    def _restore(self, register: int) -> None:
        self.row.rules.pop(register, None)
        if register in self.initial.rules:
            self.row.rules[register] = self.initial.rules[register]

    def _advanced(self, code: int, cursor: Cursor) -> bool:
        """Run an instruction that moves on or has no effect here; return False for another one."""
        if code in (0x02, 0x03, 0x04):  # advance_loc1, 2, 4
            self._advance(cursor.fixed("BHI"[code - 2]))
        elif code == 0x0A:  # remember_state
            if len(self.remembered) >= MAX_REMEMBERED:
                raise UnwindError("too many remembered rows")
            self.remembered.append(self.row.copy())
        elif code == 0x0B:  # restore_state
            if not self.remembered:
                raise UnwindError("no remembered row")
            self.row = self.remembered.pop()
        elif code == 0x2E:  # GNU_args_size
            cursor.uleb()
        else:
            return code in (0x00, 0x2D)  # nop, AARCH64_negate_ra_state
        return True

    def _defined(self, code: int, cursor: Cursor) -> bool:
        """Run an instruction that defines the CFA; return False for another one."""
        factor = self._common.data_factor
        if code == 0x0C:  # def_cfa
            self.row.base = (cursor.uleb(), cursor.uleb())
        elif code == 0x12:  # def_cfa_sf
            self.row.base = (cursor.uleb(), cursor.sleb() * factor)
        elif code == 0x0F:  # def_cfa_expression
            self.row.base = cursor.block(cursor.uleb())
        elif code in (0x0D, 0x0E, 0x13):
            if isinstance(self.row.base, bytes):
                raise UnwindError("no register to change")
            register, offset = self.row.base
            if code == 0x0D:  # def_cfa_register
                self.row.base = (cursor.uleb(), offset)
            else:  # def_cfa_offset, def_cfa_offset_sf
                self.row.base = (register, cursor.uleb() if code == 0x0E else cursor.sleb() * factor)
        else:
            return False
        return True

    def _ruled(self, code: int, cursor: Cursor) -> None:
        """Run an instruction about one register."""
        register = cursor.uleb()
        factor = self._common.data_factor
        if code == 0x05:  # offset_extended
            self._offset(register, cursor.uleb())
        elif code == 0x11:  # offset_extended_sf
            self._offset(register, cursor.sleb())
        elif code == 0x06:  # restore_extended
            self._restore(register)
        elif code == 0x07:  # undefined
            self._set(register, ("undefined", 0))
        elif code == 0x08:  # same_value
            self.row.rules.pop(register, None)
        elif code == 0x09:  # register
            self._set(register, ("register", cursor.uleb()))
        elif code in (0x14, 0x15):  # val_offset, val_offset_sf
            self._set(register, ("value", factor * (cursor.uleb() if code == 0x14 else cursor.sleb())))
        elif code in (0x10, 0x16):  # expression, val_expression
            self._set(register, ("at" if code == 0x10 else "is", cursor.block(cursor.uleb())))
        else:
            raise UnwindError("instruction 0x%x" % code)


def unwind(
    function: Function, address: int, registers: dict[int, int], sp: int, word: ReadWord
) -> dict[int, int]:
    """Return the registers of the caller, its return address under the function's return register.

    The number of the return register is missing from the result if the function has no caller.

    Args:
        function: the function that was left.
        address: the place in it, relative to the file.
        registers: their values at that place, by DWARF number.
        sp: DWARF number of the stack pointer.
        word: returns the word of memory at an address; raises UnwindError.

    Raises:
        UnwindError: the rules cannot be applied.
    """
    row = _Program(function, address).row
    if isinstance(row.base, bytes):
        frame = evaluate(row.base, registers, word)
    else:
        register, offset = row.base
        if register not in registers:
            raise UnwindError("register %d is not known" % register)
        frame = registers[register] + offset & MASK
    caller = {
        number: value for number, value in registers.items() if number != function.common.return_register
    }
    caller[sp] = frame
    for number, (kind, operand) in row.rules.items():
        value = _apply(kind, operand, frame, registers, word)
        if value is None:
            caller.pop(number, None)
        else:
            caller[number] = value
    return _with_link(caller, function, row, registers)


def _with_link(
    caller: dict[int, int], function: Function, row: Row, registers: dict[int, int]
) -> dict[int, int]:
    """Keep a return address that is still in its register: a leaf function on AArch64."""
    number = function.common.return_register
    if number not in row.rules and number in registers:
        caller[number] = registers[number]
    return caller


def _apply(
    kind: str, operand: int | bytes, frame: int, registers: dict[int, int], word: ReadWord
) -> int | None:
    if isinstance(operand, bytes):
        value = evaluate(operand, registers, word, frame)
        return word(value) if kind == "at" else value
    if kind == "offset":
        return word(frame + operand & MASK)
    if kind == "value":
        return frame + operand & MASK
    return registers.get(operand) if kind == "register" else None

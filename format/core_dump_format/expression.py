"""Owns the expressions of call frame information: DWARF 5, section 2.5. Pure; without branches, so without loops."""

from __future__ import annotations

from core_dump_format.cursor import Cursor, UnwindError

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    ReadWord = Callable[[int], int]

MAX_STACK = 64
MASK = (1 << 64) - 1

_BINARY: dict[int, Callable[[int, int], int]] = {
    0x1A: lambda a, b: a & b,
    0x1C: lambda a, b: a - b,
    0x1E: lambda a, b: a * b,
    0x21: lambda a, b: a | b,
    0x22: lambda a, b: a + b,
    0x24: lambda a, b: a << min(b, 64),
    0x25: lambda a, b: a >> min(b, 64),
    0x29: lambda a, b: int(a == b),
    0x2A: lambda a, b: int(a >= b),
    0x2B: lambda a, b: int(a > b),
    0x2C: lambda a, b: int(a <= b),
    0x2D: lambda a, b: int(a < b),
    0x2E: lambda a, b: int(a != b),
}
_CONSTANTS = {0x08: "B", 0x09: "b", 0x0A: "H", 0x0B: "h", 0x0C: "I", 0x0D: "i", 0x0E: "Q", 0x0F: "q"}


def evaluate(expression: bytes, registers: dict[int, int], word: ReadWord, *initial: int) -> int:
    """Return the value of a DWARF expression; raises UnwindError. It cannot loop: branches are not supported."""
    cursor, stack = Cursor(expression), list(initial)
    try:
        while cursor.at < len(expression):
            code = cursor.fixed("B")
            if code in _BINARY:
                second, first = stack.pop(), stack.pop()
                stack.append(_BINARY[code](first, second) & MASK)
            elif code == 0x06:  # deref
                stack.append(word(stack.pop()))
            elif code == 0x23:  # plus_uconst
                stack.append(stack.pop() + cursor.uleb() & MASK)
            elif code == 0x12:  # dup
                stack.append(stack[-1])
            else:
                stack.append(_operand(code, cursor, registers) & MASK)
            if len(stack) > MAX_STACK:
                raise UnwindError("an expression is too long")
        return stack[-1]
    except (IndexError, KeyError):
        raise UnwindError("an expression is not supported") from None


def _operand(code: int, cursor: Cursor, registers: dict[int, int]) -> int:
    """Return the number that an operation pushes; raises KeyError, UnwindError."""
    if 0x30 <= code <= 0x4F:  # lit0 to lit31
        return code - 0x30
    if 0x70 <= code <= 0x8F:  # breg0 to breg31
        return registers[code - 0x70] + cursor.sleb()
    if code in (0x10, 0x11):  # constu, consts
        return cursor.uleb() if code == 0x10 else cursor.sleb()
    return cursor.fixed(_CONSTANTS[code])

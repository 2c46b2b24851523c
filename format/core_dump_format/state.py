"""Owns what the notes of a core say about where to look: registers, thread control blocks, files. Pure.

The crashed process chooses all these addresses. Sources: core(5), getauxval(3), include/uapi/linux/elf.h and the
register sets of <asm/user.h>.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct

TYPE_CHECKING = False  # `typing` costs 7 ms
if TYPE_CHECKING:
    from core_dump_format.front import Front

MAX_NOTES = 1 << 18
MAX_THREADS = 1 << 15
MAX_FILES = 1 << 18
NT_PRSTATUS, NT_AUXV, NT_FILE = 1, 6, 0x46494C45
NT_386_TLS, NT_ARM_TLS = 0x200, 0x401
AT_PHDR, AT_PHNUM, AT_BASE, AT_ENTRY, AT_SYSINFO_EHDR = 3, 5, 7, 9, 33
I386, X86_64, AARCH64 = 3, 62, 183
MACHINE_NAMES = {I386: "i386", X86_64: "x86-64", AARCH64: "aarch64"}
SIGNAL_MARKS = {
    X86_64: 0x002B000000000033.to_bytes(8, "little"),
    AARCH64: 0x0000021046508001.to_bytes(8, "little"),
}
"""By machine: a word that the kernel writes into the frame of a signal handler. It holds the segment selectors of user
space, or the header of the floating-point registers: struct sigcontext in <asm/sigcontext.h>."""


class Registers:
    """Where NT_PRSTATUS holds the registers of one machine."""

    def __init__(self, layout: str, at: int, pc: int, sp: int, tls: int | None = None) -> None:
        """Take their struct layout, their offset, and the numbers of pc, sp and thread pointer among them."""
        self.struct, self.at, self.pc, self.sp, self.tls = Struct(layout), at, pc, sp, tls


REGISTERS = {
    (64, X86_64): Registers("=27Q", 112, 16, 19, 21),
    (64, AARCH64): Registers("=34Q", 112, 32, 31),
    (32, I386): Registers("=17I", 72, 12, 15),
}
"""By ELF class and machine. Machines that are not here have no vital part."""


class Thread:
    """One thread: its registers, and its thread control block where the notes tell it."""

    def __init__(self, registers: tuple[int, ...], pc: int, sp: int, tls: int) -> None:
        """Store the values."""
        self.registers, self.pc, self.sp, self.tls = registers, pc, sp, tls


class ProcessState:
    """The threads (the one that crashed is first), the auxiliary vector and the mapped files of a process."""

    def __init__(self, front: Front) -> None:
        """Read the notes; what is malformed is left out."""
        self.threads: list[Thread] = []
        self.auxv: dict[int, int] = {}
        self.raw_auxv = b""
        self.files: list[tuple[int, int, bytes]] = []
        """Start, end and path of each mapping of a file."""
        self.offsets: list[int] = []
        """Where each mapping begins in its file, in bytes."""
        self.has_all_files = False
        """Whether `files` has every mapping of a file; the kernel leaves out a note that would be too long."""
        self._layout = front.layout
        self._registers = REGISTERS.get((front.layout.bits, front.machine))
        readers = {
            NT_PRSTATUS: self._read_thread,
            NT_ARM_TLS: self._read_arm_tls,
            NT_386_TLS: self._read_386_tls,
            NT_AUXV: self._read_auxv,
            NT_FILE: self._read_files,
        }
        for kind, content in front.walk_notes(MAX_NOTES):
            read = readers.get(kind)
            if read:
                read(content)

    def maps_no_file(self, address: int) -> bool:
        """Tell whether no file is mapped at an address; False if the notes do not say so."""
        return self.has_all_files and not any(start <= address < end for start, end, _ in self.files)

    def _read_thread(self, content: memoryview) -> None:
        layout = self._registers
        if layout and len(content) >= layout.at + layout.struct.size and len(self.threads) < MAX_THREADS:
            values = layout.struct.unpack_from(content, layout.at)
            tls = 0 if layout.tls is None else values[layout.tls]
            self.threads.append(Thread(values, values[layout.pc], values[layout.sp], tls))

    def _read_arm_tls(self, content: memoryview) -> None:
        if self.threads and len(content) >= 8:
            self.threads[-1].tls = Struct("=Q").unpack_from(content)[0]

    def _read_386_tls(self, content: memoryview) -> None:
        """Read the first user_desc: entry number, base address, limit, flags."""
        if self.threads and len(content) >= 16:
            self.threads[-1].tls = Struct("=II").unpack_from(content)[1]

    def _read_auxv(self, content: memoryview) -> None:
        pair = Struct("=2" + self._layout.word)
        self.raw_auxv = bytes(content)
        self.auxv = dict(pair.iter_unpack(content[: len(content) // pair.size * pair.size]))

    def _read_files(self, content: memoryview) -> None:
        word = self._layout.word_bytes
        words = self._layout.cast(content)
        if len(words) < 2:
            return
        count = min(words[0], (len(words) - 2) // 3, MAX_FILES)
        names = bytes(content[word * (2 + 3 * words[0]) :]).split(b"\0", count)
        rows = words[2 : 2 + 3 * count].tolist()
        self.files = list(islice(zip(rows[::3], rows[1::3], names), count))
        self.offsets = [pages * words[1] for pages in rows[2::3]]
        self.has_all_files = len(self.files) == words[0]

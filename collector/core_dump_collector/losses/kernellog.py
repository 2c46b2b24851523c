"""Owns reading the kernel log: its two interfaces, their limits, and the number of records lost before they were read.

`/dev/kmsg` numbers its records and escapes their text, so that none can look like two; it is used where it can be
opened. In a container, and in the unit, only syslog(2) is left. Both take CAP_SYSLOG where `kernel.dmesg_restrict` is
1. syslog(2) prints a record that contains a newline as several lines, which have the same time; they are joined again.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from typing import Protocol

DEVICE = "/dev/kmsg"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
MOST_LINES = 5000
"""Most records of one reading. More wait in the kernel's buffer, or are overwritten there and counted as lost."""
_MOST_RECORD_BYTES = 16384
"""The kernel needs 8,192 for any record (CONSOLE_EXT_LOG_MAX, PRINTK_MESSAGE_MAX)."""
_MOST_BUFFER_BYTES = 16 << 20
_READ_ALL, _SIZE = 3, 10
"""SYSLOG_ACTION_READ_ALL and SYSLOG_ACTION_SIZE_BUFFER (syslog(2))."""


@dataclass(frozen=True, slots=True)
class Line:
    """One record of the kernel log."""

    microseconds: int
    """On the kernel's clock, which starts with the system."""
    facility: int
    text: bytes
    sequence: int = -1
    """Number of the record; -1 if the interface does not give it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The result of one reading."""

    lines: tuple[Line, ...] = ()
    lost: int = 0
    """Records that were overwritten before they were read; 1 if their number is not known."""


class Reader(Protocol):
    """Reads the records that are new since the last reading, oldest first."""

    name: str

    def read(self) -> Batch:
        """Return at most MOST_LINES of them without waiting; raises OSError."""

    def close(self) -> None:
        """Close the log."""


def open_reader(device: str = DEVICE) -> Reader:
    """Return a reader at the oldest record.

    Raises:
        OSError: this process may not read the kernel log.
    """
    try:
        return DeviceReader(device)
    except OSError:
        return SyscallReader()


def boot_id() -> str:
    """Return the ID of the running system; empty if it cannot be read."""
    try:
        with open(BOOT_ID) as file:
            return file.read(64).strip()
    except OSError:
        return ""


class DeviceReader:
    """Reads `/dev/kmsg`, one record a call (Documentation/ABI/testing/dev-kmsg)."""

    _HEAD = re.compile(rb"(\d{1,5}),(\d{1,19}),(\d{1,19}),[^;\n]{0,100};")
    _ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")

    def __init__(self, path: str) -> None:
        """Open the device; raises OSError."""
        self.name = path
        self._expected: int | None = None
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISCHR(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)

    def read(self) -> Batch:
        """Return the new records."""
        lines: list[Line] = []
        lost = 0
        for _ in range(MOST_LINES):
            try:
                record = os.read(self._file, _MOST_RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:  # overwritten; the next call returns the oldest record that is left
                continue
            line = self._parse(record)
            if line is not None:
                lost += max(0, line.sequence - (line.sequence if self._expected is None else self._expected))
                self._expected = line.sequence + 1
                lines.append(line)
        return Batch(tuple(lines), lost)

    def _parse(self, record: bytes) -> Line | None:
        head = self._HEAD.match(record)
        if head is None:
            return None
        priority, sequence, microseconds = (int(number) for number in head.groups())
        text = record[head.end() :].split(b"\n", 1)[0]  # lines after the first are a dictionary
        plain = self._ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), text)
        return Line(microseconds, priority >> 3, plain, sequence)

    def close(self) -> None:
        """Close the device."""
        os.close(self._file)


class SyscallReader:
    """Reads the whole buffer with syslog(2) and returns the records that came after the last reading."""

    name = "syslog(2)"
    _PREFIX = re.compile(rb"<(\d{1,5})>\[ *(\d{1,12})\.(\d{6})\](?:\[ *[TC]\d+\])? ")

    def __init__(self) -> None:
        """Read the size of the buffer; raises OSError."""
        import ctypes  # noqa: PLC0415  only where the device cannot be opened

        self._library = ctypes.CDLL(None, use_errno=True)
        self._errno = ctypes.get_errno
        size = min(self._call(_SIZE, None, 0), _MOST_BUFFER_BYTES)
        self._buffer = ctypes.create_string_buffer(max(size, _MOST_RECORD_BYTES))
        self._last: Line | None = None
        self._before = b""
        length = self._call(_READ_ALL, self._buffer, len(self._buffer))
        if length and self._PREFIX.match(self._buffer.raw[:100]) is None:
            raise OSError(errno.ENOTSUP, "its lines have no time: set kernel parameter printk.time=1")

    def _call(self, action: int, buffer: object, size: int) -> int:
        result = int(self._library.klogctl(action, buffer, size))
        if result < 0:
            raise OSError(self._errno(), os.strerror(self._errno()), "syslog(2)")
        return result

    def read(self) -> Batch:
        """Return the new records."""
        length = self._call(_READ_ALL, self._buffer, len(self._buffer))
        text = self._buffer.raw[:length]
        if text == self._before:
            return Batch()
        lines = self.split(text)
        before, lost = self._last, 0
        if before is not None:
            at = next((i for i in reversed(range(len(lines))) if lines[i] == before), None)
            if at is not None:
                lines = lines[at + 1 :]
            else:
                lost = int(bool(lines) and lines[0].microseconds > before.microseconds)
                lines = [line for line in lines if line.microseconds > before.microseconds]
        self._before = text if len(lines) <= MOST_LINES else b""
        if lines:
            self._last = lines[min(len(lines), MOST_LINES) - 1]
        return Batch(tuple(lines[:MOST_LINES]), lost)

    @classmethod
    def split(cls, text: bytes) -> list[Line]:
        """Return the records in the text of READ_ALL; the first one is left out if it is cut."""
        records: list[tuple[bytes, Line]] = []
        for line in text.split(b"\n"):
            prefix = cls._PREFIX.match(line)
            if prefix is None:
                continue
            content = line[prefix.end() :]
            if records and records[-1][0] == prefix[0]:
                content = records.pop()[1].text + b"\n" + content
            microseconds = int(prefix[2]) * 1_000_000 + int(prefix[3])
            records.append((prefix[0], Line(microseconds, int(prefix[1]) >> 3, content)))
        return [record for _, record in records]

    def close(self) -> None:
        """Close nothing."""

"""Owns the run of a debugger, and the judgement of its backtrace."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections import deque
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

MOST_LINE_BYTES = 64 * 1024
MOST_SKIPPED = 1000
"""So many lines before a backtrace are kept; they are written if no backtrace follows."""
MOST_FRAMES = 256
"""Frames of a thread in a backtrace; a stack overflow has tens of thousands."""
_RESOLVED = re.compile(
    r" *#\d+ +(?:(?:0x[0-9a-f]+|<unavailable>) in )?(?!0x|\?\?|<unavailable>|<signal handler)\S"
    r"| *(?:\* )?frame #\d+: .*`"
    r"|#\d+ +0x[0-9a-f]+ (?:- \d+ )?(?!in |-)\S"
)
"""A frame of gdb, lldb or eu-stack with a function."""
_BEGINNING = re.compile(r"Thread \d|[* ] thread #|TID \d+:")
"""The first line of a backtrace of gdb, lldb or eu-stack: the heading of a thread."""
_CHATTER = "warning: "
"""gdb's remarks between frames, for example on registers that the kernel dumped in another layout."""
_NUMBER = re.compile(r" *(?:\* )?(?:frame )?#(\d+)")
_ENDLESS = f"(more frames follow; a backtrace has at most {MOST_FRAMES} of a thread)"


def run(line: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run a debugger on this terminal and return its exit status. Only the debugger reacts to Ctrl-C."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler ends at exec(2), SIG_IGN would not
    try:
        return subprocess.run(line, check=False, env=environ).returncode  # noqa: S603  a list, no shell
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(output: IO[bytes] | None) -> Iterator[bytes]:
    while output is not None and (line := output.readline(MOST_LINE_BYTES)):
        yield line


class Backtrace:
    """The output of a debugger from its first thread on; earlier lines report progress, or repeat `info`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """Write lines with `write`."""
        self._write = write
        self._skipped: deque[str] = deque(maxlen=MOST_SKIPPED)
        self._begun = False
        self._beyond: str | None = None
        """The first frame beyond the limit, until the next line tells whether another one follows."""
        self.resolved = False
        """Whether a frame names a function."""
        self.is_cut = False
        """Whether a thread has more frames than were asked for."""

    def run(self, line: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
        """Run a debugger in batch mode, write its backtrace line by line, and return its exit status."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": environ}
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(line, stderr=errors, **pipes) as process:  # noqa: S603  likewise
                try:
                    for raw in _lines(process.stdout):
                        self._take(raw.decode("utf-8", "backslashreplace").rstrip("\n"))
                except BaseException:
                    process.kill()
                    raise
            errors.seek(0)
            self._explain(
                process.returncode, errors.read(MOST_LINE_BYTES).decode("utf-8", "backslashreplace")
            )
        return 0 if self.is_cut and process.returncode == 1 else process.returncode

    def _take(self, text: str) -> None:
        self._begun = self._begun or _BEGINNING.match(text) is not None
        self.resolved = self.resolved or _RESOLVED.match(text) is not None
        if not self._begun:
            self._skipped.append(text)
            return
        if text.startswith(_CHATTER):
            return
        number = _NUMBER.match(text)
        self._end_thread(goes_on=number is not None and int(number[1][:9]) > MOST_FRAMES)
        if number is not None and number[1] == str(MOST_FRAMES):
            self._beyond = text
        else:
            self._write(text)

    def _end_thread(self, *, goes_on: bool) -> None:
        """Write the frame beyond the limit if the user asked for more, else a note instead of it."""
        if self._beyond is not None:
            self._write(self._beyond if goes_on else _ENDLESS)
            self.is_cut = self.is_cut or not goes_on
            self._beyond = None

    def _explain(self, code: int, errors: str) -> None:
        """Write the skipped lines if no backtrace followed, and the errors if the debugger failed."""
        self._end_thread(goes_on=False)
        failed = code and not self.is_cut  # eu-stack calls a long stack a failure
        for text in [*(() if self._begun else self._skipped), *(errors.splitlines() if failed else ())]:
            self._write(text)


def threads(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return a backtrace as JSON: the heading and the lines of each thread."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if _BEGINNING.match(line):
            found.append({"thread": line.strip("* :"), "frames": []})
        elif found and line.strip():
            found[-1]["frames"].append(line.strip())
    return found

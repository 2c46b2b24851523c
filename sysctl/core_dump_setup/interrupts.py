"""Owns SIGTERM, SIGINT and SIGHUP: they end a run with an exception of their own while it can still be undone."""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the run to end; no handler of ordinary errors catches it."""


def catch() -> None:
    """Raise Interrupted at the first signal; ignore later ones."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def ignore() -> None:
    """Ignore the signals from now on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    ignore()
    raise Interrupted("interrupted by signal %d" % number)

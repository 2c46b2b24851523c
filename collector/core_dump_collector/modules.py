"""Owns the daemon's part of modules: the mark for the helper, the times of passes over `.modules/`, and their events.

A pass is a process of its own, so that no dump waits for a module. It starts at a random time within
MODULE_DELAY_SECONDS: after a bad roll-out, thousands of nodes have the same files, and one of them has to send them.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import random
import threading
import time
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.deadlines import seconds_for
from core_dump_collector.moduleevents import DROPPED, STORED, Kind
from core_dump_collector.node import modulefiles
from core_dump_collector.node.modulefiles import Contents, ModuleFiles
from core_dump_collector.observation import Look
from core_dump_collector.workers import fork_server

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from core_dump_collector.config import Settings
    from core_dump_collector.metrics import Metrics
    from core_dump_collector.moduleevents import Event
    from core_dump_collector.observation import Observer
    from core_dump_collector.options import UploadOptions

log = structlog.get_logger()

POLL_SECONDS = 5.0
MARK_PAUSE_SECONDS = 600.0
CLEAN_PAUSE_SECONDS = 3600.0
FIRST_PAUSE_SECONDS = 30.0
"""After a pass that failed; each further failure doubles it."""
BUSY_SECONDS = 600.0
"""Due modules wait for so long while dumps are being uploaded."""


def _run(pipe: Connection, directory: str, options: UploadOptions, lists: bool, modules: bool) -> None:  # noqa: FBT001  pickled
    """Make one pass in this process, which ends with the daemon."""
    from core_dump_collector import modulepass  # noqa: PLC0415  boto3 stays out of the daemon's memory

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    modulepass.run(directory, options, pipe.send, lists=lists, modules=modules)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


class Backoff:
    """Decides when to try again after failures."""

    def __init__(self, most_seconds: float) -> None:
        """Start without a pause; no pause is longer than `most_seconds`."""
        self._most_seconds = most_seconds
        self._failures = 0
        self.until = 0.0

    def apply(self, now: float, *, failed: bool) -> None:
        """Pause longer after each further failure; end the pause after a success."""
        self._failures = self._failures + 1 if failed else 0
        pause = FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures - 1, 16)
        wait_seconds = min(pause, self._most_seconds) * random.uniform(0.5, 1)  # noqa: S311  spread
        self.until = now + wait_seconds if failed else 0.0


class ModuleUploads:
    """Decides when passes run; one at a time."""

    def __init__(self, directory: str, settings: Settings, metrics: Metrics, observer: Observer) -> None:
        """Prepare; delete the files of an earlier collector if modules are not wanted."""
        self._directory = directory
        self._settings = settings
        self._options = settings.upload_options()
        self._metrics = metrics
        self._observer = observer
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._deadline = math.inf
        self._mark_due = self._clean_due = time.monotonic()
        self._modules_due: float | None = None
        # one for each, because a policy may allow the folder of the dumps alone
        self._lists, self._modules = Backoff(settings.retry_seconds), Backoff(settings.retry_seconds)
        self._sent: Backoff | None = None
        """The backoff of the last pass, for lists or for modules."""
        self._failed = self._interrupted = False
        self.due = time.monotonic() if settings.modules else math.inf
        """When `advance` has something to do, on the monotonic clock."""
        if not settings.modules:
            modulefiles.clear(directory)

    @property
    def is_running(self) -> bool:
        """Tell whether a pass is under way."""
        return self._process is not None

    def advance(self, now: float, *, reachable: bool, busy: bool) -> None:
        """Take the events of a pass, or start one that is due.

        Args:
            now: monotonic seconds.
            reachable: the store takes dumps, as far as is known.
            busy: dumps are being uploaded.
        """
        if now < self.due:
            return
        self.due = now + POLL_SECONDS
        if self._process is not None:
            self._follow(now)
            return
        found = self._observer.look(Look.MODULES, lambda: self._look(now))
        if found is None:
            return
        self._metrics.modules_waiting.set(len(found.modules))
        self._metrics.modules_waiting_bytes.set(sum(file.size_bytes for file in found.modules))
        self._plan(found, now, reachable=reachable, busy=busy)

    def _look(self, now: float) -> Contents:
        with ModuleFiles(self._directory, create=True) as files:
            if now >= self._mark_due:
                self._mark_due = now + MARK_PAUSE_SECONDS
                self._touch_mark(files)
            return files.scan()

    def _touch_mark(self, files: ModuleFiles) -> None:
        """Set the mark; if a full disk prevents that, modules must still be sent."""
        try:
            files.touch_mark()
        except OSError as error:
            log.warning("helpers are not told to keep modules", error=error.strerror or str(error))

    def _plan(self, found: Contents, now: float, *, reachable: bool, busy: bool) -> None:
        if not found.modules:
            self._modules_due = None
        elif self._modules_due is None:
            self._modules_due = now + random.uniform(0, self._settings.module_delay_seconds)  # noqa: S311  spread
        due = now - self._modules_due if self._modules_due is not None else -1.0
        modules = reachable and now >= self._modules.until and due >= (BUSY_SECONDS if busy else 0.0)
        listed = not found.receipts.keys().isdisjoint(found.lists)
        lists = reachable and now >= self._lists.until and listed
        cleans = now >= self._clean_due and found != Contents()
        if lists and modules:  # in turns, so that neither waits for long
            lists = self._sent is not self._lists
            modules = not lists
        if modules or lists or cleans:
            self._start(now, lists=lists, modules=modules)

    def _start(self, now: float, *, lists: bool, modules: bool) -> None:
        context = fork_server()
        self._clean_due = now + CLEAN_PAUSE_SECONDS
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, self._directory, self._options, lists, modules)
        process = context.Process(target=_run, args=arguments, daemon=True)
        try:
            process.start()
        except Exception as error:  # noqa: BLE001  no memory, too many processes or files: the next poll tries again
            receiver.close()
            log.warning("cannot start a process for modules", error=str(error)[:500])
            return
        finally:
            sender.close()
        self._process, self._pipe = process, receiver
        self._failed = self._interrupted = False
        self._sent = self._modules if modules else self._lists if lists else None
        self._set_deadline(now, 0)
        self.due = now

    def _set_deadline(self, now: float, size_bytes: int) -> None:
        options = self._options
        seconds = seconds_for(size_bytes, options.request_seconds, options.connection_bytes_per_second)
        self._deadline = now + seconds

    def _follow(self, now: float) -> None:
        """Take the events of the pass; kill it if it hangs, and forget it when it has ended."""
        assert self._process is not None  # noqa: S101
        assert self._pipe is not None  # noqa: S101
        alive = self._process.is_alive()
        with contextlib.suppress(EOFError, OSError):
            while self._pipe.poll():
                event = self._pipe.recv()
                self._failed |= event.kind is Kind.FAILED
                self._interrupted |= event.kind is Kind.INTERRUPTED
                self._apply(event, now)
        if now >= self._deadline:
            self._process.kill()
            self._deadline = math.inf
            log.warning("a pass over modules did not end in time")
        if not alive:
            self._end(now, failed=self._failed or self._process.exitcode != 0)
        else:
            self.due = now + min(POLL_SECONDS, 0.5)

    def _apply(self, event: Event, now: float) -> None:
        metrics, kind = self._metrics, event.kind
        self._set_deadline(now, event.size_bytes if kind is Kind.SENDING else 0)
        if kind in STORED:
            metrics.modules.labels(kind).inc()
            metrics.module_bytes.inc(event.size_bytes if kind is Kind.UPLOADED else 0)
        elif kind in DROPPED:
            metrics.modules_dropped.labels(kind).inc()
        elif kind in {Kind.LIST_PUBLISHED, Kind.LIST_DROPPED}:
            metrics.module_lists.labels(kind.removeprefix("list ")).inc()
        if kind is Kind.FAILED:
            log.warning("modules wait for another attempt", reason=event.name, detail=event.detail)
        elif kind not in {Kind.SENDING, Kind.INTERRUPTED}:
            shown = {"detail": event.detail} if event.detail else {}
            write = log.warning if kind in DROPPED else log.info
            write("module", file=event.name, result=kind.value, bytes=event.size_bytes, **shown)

    def _end(self, now: float, *, failed: bool) -> None:
        assert self._pipe is not None  # noqa: S101
        self._pipe.close()
        self._process = self._pipe = None
        if self._sent is not None:
            self._sent.apply(now, failed=failed)
        if self._sent is self._modules and not failed and not self._interrupted:
            self._modules_due = None
        self.due = now + POLL_SECONDS

    def stop(self) -> None:
        """Kill a pass under way; the next collector finds the rest on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.join(1)

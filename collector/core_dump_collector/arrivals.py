"""Owns how files get into the backlog: inotify events, and scans of the watch directory.

Events only say what changed; the directory is the truth. Where inotify cannot be had, scans follow each other.
"""

from __future__ import annotations

import math
import os
import selectors
import stat
import time
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from core_dump_collector.backlog import Candidate
from core_dump_collector.node import identity, scan
from core_dump_collector.node import watch as inotify
from core_dump_collector.observation import Look
from core_dump_collector.partials import Partials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.backlog import Backlog
    from core_dump_collector.config import Settings
    from core_dump_collector.metrics import Metrics
    from core_dump_collector.observation import Observer

log = structlog.get_logger()

SCAN_SLICE = 500
"""Names looked at before events and results get their turn."""
POLL_SECONDS = 2.0
"""Pause between scans while inotify is not available or the last scan failed."""
NEW_SECONDS = 600.0
"""A file that a scan finds is served before others if its time is so close to the clock's; it decides nothing else."""
POLL_SHARE = 10
"""Such a pause is at least so many times as long as the scan before it."""


class Arrivals:
    """Keeps the backlog filled from one directory, whatever happens to the directory or to inotify."""

    def __init__(
        self, directory: str, settings: Settings, backlog: Backlog, observer: Observer, metrics: Metrics
    ) -> None:
        """Prepare; `follow` starts to watch and to scan."""
        self._directory = directory
        self._settings = settings
        self._backlog = backlog
        self._observer = observer
        self._metrics = metrics
        self._watch = inotify.Watch(directory)
        self._selector: selectors.BaseSelector | None = None
        self._registered = -1
        self._is_there = False
        self._scan: Iterator[scan.WatchedFile] | None = None
        self._scan_began = 0.0
        self._scan_due = time.monotonic()
        self._earliest_scan = 0.0
        self.partials = Partials()
        self.is_complete = False
        """A whole scan has succeeded since the directory was last lost."""

    @property
    def due(self) -> float:
        """Return when `advance` has something to do, on the monotonic clock."""
        if self._scan is not None:
            return 0.0
        return max(self._scan_due, self._earliest_scan) if self._is_there else math.inf

    def attach(self, selector: selectors.BaseSelector) -> None:
        """Follow the directory, and let a selector wait for its events."""
        self._selector = selector
        self.follow()

    def follow(self) -> None:
        """Watch the directory that the path leads to now; repeated with every heartbeat."""
        if self._watch.is_armed:
            if self._watch.is_current():
                return
            self._lose()
        self._unregister()
        try:
            self._watch.arm()
            self._register()
        except OSError as error:
            self._watch.close()
            self._go_blind(error)
            return
        self._observer.succeed(Look.DIRECTORY)
        self._observer.succeed(Look.INOTIFY)
        self._metrics.inotify_active.set(1)
        self._find()
        self._scan_due = 0.0

    def _go_blind(self, error: OSError) -> None:
        """Tell a directory that is gone from inotify that is not available; scan in the latter case."""
        self._metrics.inotify_active.set(0)
        why = error.strerror or str(error)
        if not _is_directory(self._directory):
            self._lose()
            self._observer.fail(Look.DIRECTORY, why, directory=self._directory)
            return
        self._observer.succeed(Look.DIRECTORY)
        instead = f"the directory is scanned every {POLL_SECONDS:g} s"
        self._observer.fail(Look.INOTIFY, why, remedy=inotify.advice(error), instead=instead)
        self._find()
        self._scan_due = min(self._scan_due, time.monotonic() + POLL_SECONDS)

    def _find(self) -> None:
        self._is_there = True
        self._metrics.watched.set(1)

    def _lose(self) -> None:
        self._metrics.watched.set(0)
        self.is_complete = False
        self._scan = None
        if self._is_there:
            self._is_there = False
            self._metrics.watch_losses.inc()
            log.error("the watch directory was replaced or is gone", directory=self._directory)

    def on_events(self) -> None:
        """Take what inotify reports."""
        changes = self._watch.read()
        for name in changes.names:
            found = scan.look(self._directory, name, patterns=self._settings.file_patterns)
            if found is not None:
                self._note(found, reported=True)
        if changes.overflow:
            self._metrics.overflows.inc()
            log.warning("inotify dropped events; the directory is scanned")
            self._scan_due = 0.0
        if changes.lost:
            self.follow()

    def advance(self, now: float) -> None:
        """Begin a scan if one is due; take the next slice of the one under way."""
        if now < self.due:
            return
        if self._scan is None:
            self._scan_began = now
            self._scan_due = now + self._settings.scan_seconds
            self._backlog.turned_away = False
            self._scan = scan.scan(self._directory, self._settings.file_patterns)
        next_slice = islice(self._scan, SCAN_SLICE)
        found = self._observer.look(Look.SCAN, lambda: list(next_slice))
        for item in found or []:
            self._note(item)
        if found is None or len(found) < SCAN_SLICE:
            self._end_scan(succeeded=found is not None)

    def _end_scan(self, *, succeeded: bool) -> None:
        now = time.monotonic()
        taken = now - self._scan_began
        self._scan = None
        self.is_complete = succeeded
        self._earliest_scan = now + taken
        if not succeeded or not self._watch.is_armed:
            self._scan_due = min(self._scan_due, now + max(POLL_SECONDS, taken * POLL_SHARE))

    def scan_again(self, pause_seconds: float) -> None:
        """Scan again so long after the last scan began, or as soon as that allows."""
        self._scan_due = min(self._scan_due, self._scan_began + pause_seconds)

    def _note(self, found: scan.WatchedFile, *, reported: bool = False) -> None:
        """Take a file into the backlog; one that an event reported, or that was just written, is new."""
        now = time.monotonic()
        if found.partial:
            if found.trusted:
                self.partials.note(found.name, (found.size_bytes, found.modified_ns), now)
            return
        new = reported or abs(time.time() - found.modified_ns / 1e9) < NEW_SECONDS
        file = Candidate(
            found.name, found.size_bytes, found.modified_ns, found.owner, origin=found.origin, new=new
        )
        self._backlog.add(file, now)
        logs = self._settings.pod_logs_directory
        if new and logs is not None:
            self._observer.look(Look.POD, lambda: identity.keep(self._directory, found.name, str(logs)))

    def next_partial(self, now: float) -> str | None:
        """Return a partial that nobody has touched for long enough to salvage it, or None."""
        while (name := self.partials.due(now)) is not None:
            found = scan.look(self._directory, name, patterns=self._settings.file_patterns)
            if found is None:
                self.partials.finish(name, now, left=False)
                continue
            self._note(found)
            if self.partials.is_due(name, now):
                return name
        return None

    def close(self) -> None:
        """Stop watching."""
        self._unregister()
        self._watch.close()
        self._scan = None

    def _register(self) -> None:
        if self._selector is not None:
            self._selector.register(self._watch.fileno(), selectors.EVENT_READ, self.on_events)
            self._registered = self._watch.fileno()

    def _unregister(self) -> None:
        if self._selector is not None and self._registered >= 0:
            self._selector.unregister(self._registered)
            self._registered = -1


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False

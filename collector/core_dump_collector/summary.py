"""Owns the facts on the page at `/`: directory, backlog, store, core pattern and kernel log."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from core_dump_collector.landing import Fact, sized
from core_dump_collector.node import corepattern, scan

if TYPE_CHECKING:
    from core_dump_collector.backlog import Backlog
    from core_dump_collector.losses.watcher import KernelLog
    from core_dump_collector.reachability import Reachability


def facts(
    directory: str, backlog: Backlog, store: Reachability, kernel_log: KernelLog, quarantined: int
) -> tuple[Fact, ...]:
    """Return the lines of the page, in its order."""
    free, total, insecure = _look_at(directory)
    ours = corepattern.leads_to(directory)
    obstacle = kernel_log.obstacle
    return (
        Fact("Directory", f"{directory}{', open to other users' if insecure else ''}", not insecure),
        Fact(
            "File system", f"{sized(free)} free of {sized(total)}" if total else "unknown", free * 10 > total
        ),
        Fact("Core pattern", "leads here" if ours else "leads elsewhere: crashes leave no dump here", ours),
        Fact("Backlog", _describe(backlog)),
        Fact("Quarantine", f"{quarantined} dumps" if quarantined else "empty", not quarantined),
        _store_fact(store),
        Fact("Kernel log", f"not watched: {obstacle}" if obstacle else "watched", not obstacle),
    )


def _look_at(directory: str) -> tuple[int, int, bool]:
    """Return free and total bytes of its file system, 0 if it is gone, and whether others may write to it."""
    try:
        files, insecure = os.statvfs(directory), scan.is_insecure(directory)
    except OSError:
        return 0, 0, False
    return files.f_bavail * files.f_frsize, files.f_blocks * files.f_frsize, insecure


def _describe(backlog: Backlog) -> str:
    if not backlog.waiting:
        return "empty"
    oldest = backlog.oldest_seconds(time.time())
    return f"{backlog.waiting} dumps, {sized(backlog.size_bytes)}; the oldest waits {oldest:.0f} s"


def _store_fact(store: Reachability) -> Fact:
    if store.reason is not None:
        return Fact("Store", f"does not take dumps: {store.reason}", is_good=False)
    return Fact("Store", "takes dumps" if store.is_known else "not asked yet", store.is_known)

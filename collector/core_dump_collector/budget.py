"""Owns the memory budget: the worker processes and buffers that fit into the limit, and the size of parts. Pure.

Growth stops at 70 % of the limit. The numbers below were measured (docs/benchmarks.md): they count the pages that a
process does not share with others, and the memory of its threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from core_dump_collector.governor import GROWTH_SHARE

MEBIBYTE = 1024 * 1024
BASE_BYTES = 52 * MEBIBYTE
"""The daemon, the fork server and what workers share with it."""
WORKER_BYTES = 24 * MEBIBYTE
"""A worker with its client, eight small dumps and the threads of a large one."""
LEAST_BUFFERS = 2
"""One part of a stream is filled while the other is sent."""
MOST_BUFFERS = 8
UNLIMITED_BUFFERS = 4
"""Where nothing limits the memory."""
SHORT_BYTES = 256 * MEBIBYTE
"""Below such a limit parts are small: a raw core is compressed into buffers of one part each."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Worker processes and buffers that fit into the limit."""

    workers: int
    buffers: int
    """Of one part each, for each worker that compresses a raw core."""
    small_parts: bool = False


def plan(limit_bytes: int | None, workers: int, part_bytes: int) -> Budget:
    """Return the budget; at least one worker, whatever the limit.

    Args:
        limit_bytes: None where there is none.
        workers: the setting WORKERS.
        part_bytes: size of a buffer.
    """
    if limit_bytes is None:
        return Budget(workers, UNLIMITED_BUFFERS)
    left = int(limit_bytes * GROWTH_SHARE) - BASE_BYTES
    fitting = max(1, min(workers, left // WORKER_BYTES))
    spare = (left - fitting * WORKER_BYTES) // (fitting * part_bytes)
    buffers = max(LEAST_BUFFERS, min(MOST_BUFFERS, LEAST_BUFFERS + spare))
    return Budget(fitting, buffers, small_parts=limit_bytes < SHORT_BYTES)

"""Owns the time limits of a job: pure, no clock.

A job that makes no progress hangs: requests have limits of their own, so the cause is a file system, or a bug. A job
that makes progress may wait for a few requests until their timeouts, and may move its bytes at the least rate at which
a request lives.
"""

from __future__ import annotations

REQUESTS = 10
"""Requests of one job that may each take all the time that they have."""
MOST_SECONDS = 24 * 3600.0
"""No job runs longer, whatever its size: killed there, a multipart upload goes on from the parts that are stored."""
SILENT_SECONDS = 600.0
"""Longest time without progress."""


def seconds_for(size_bytes: int, request_seconds: float, bytes_per_second: float) -> float:
    """Return the time for a job with a file of this size.

    Args:
        size_bytes: length of the file.
        request_seconds: how long a request may hang.
        bytes_per_second: least rate of a request.
    """
    return min(MOST_SECONDS, REQUESTS * request_seconds + size_bytes / bytes_per_second)

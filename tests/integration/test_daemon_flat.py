"""A collector that has seen many dumps holds no more than one that has seen few."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.collector import descendants, running, wait_until

DUMPS = int(os.environ.get("DUMPS", "250"))
"""DUMPS=5000 is the long run."""
BATCH = DUMPS // 5
MOST_BATCHES = 20
DONE = 'core_dump_uploads_total{result="uploaded"}'


def holdings(collector):
    """Return descriptors and threads of the daemon and its processes, those of a scrape left out."""
    pids = [collector.process.pid, *descendants(collector.process.pid)]
    counts = [(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))) for pid in pids]
    return sum(fds for fds, _ in counts), sum(threads for _, threads in counts)


def publish(directory: Path, numbers):
    for number in numbers:
        partial = directory / f"core-app-{1_700_000_000 + number}-{number}-11.gz.partial"
        partial.write_bytes(b"dump %d" % number)
        partial.rename(partial.with_suffix(""))


def test_descriptors_and_threads_do_not_grow_with_the_number_of_dumps(seaweed, bucket, watch_dir, tmp_path):
    held = []
    with running(watch_dir, seaweed.environ() | {"METADATA": "false", "WORKERS": "2"}, tmp_path) as collector:
        for number in range(MOST_BATCHES):
            publish(watch_dir, range(number * BATCH, (number + 1) * BATCH))
            wait_until(lambda done=(number + 1) * BATCH: collector.metric(DONE) == done, 110)
            held.append(holdings(collector))
            if number >= 4 and flat(held[-3:]):  # until then the pools of threads and connections grow
                break
    assert held[0][0] > 20
    assert flat(held[-3:]), held


def flat(held):
    """Whether the last of some holdings is at most a few descriptors and threads above the first."""
    return held[-1][0] <= held[0][0] + 4 and held[-1][1] <= held[0][1] + 2

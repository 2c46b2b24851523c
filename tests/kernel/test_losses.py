"""Crashes that leave no dump: each is counted once, under its reason, and recorded with its name and pid."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.support import kernel, s3
from tests.support.collector import running, wait_until

MARK = b"loss-"
"""Begins the name of each process here: others on this machine may crash at the same time."""
COLLECTOR = """
import sys
from core_dump_collector import daemon
from core_dump_collector.cli import main
from core_dump_collector.losses import kernellog, watcher

class Ours:
    def __init__(self, reader):
        self.reader, self.name, self.close = reader, reader.name, reader.close
    def read(self):
        found = self.reader.read()
        marks = (b"loss-", b"callbacks suppressed", b".helper: ")
        lines = [line for line in found.lines if any(mark in line.text for mark in marks)]
        return kernellog.Batch(tuple(lines), 0)

opened = kernellog.open_reader
kernellog.open_reader = lambda: Ours(opened())
daemon.HEARTBEAT_SECONDS = 0.3
watcher.GRACE_SECONDS = {grace}
sys.exit(main())
"""
"""A collector that sees the lines of these tests alone, and judges faults soon."""
MOST_LINES = 10
"""The kernel prints so many lines of a kind in 5 s."""
RATE_LIMIT_SECONDS = 5.2
"""After so long the kernel prints further lines, and the number of those that it suppressed before."""


class Losses:
    """A node whose dumps are collected, and the truth about each crash on it."""

    def __init__(self, node, collector):
        self.node, self.collector = node, collector
        self.number = 0
        self.truth = Counter()
        """Number of crashes by outcome and reason."""

    def crash(self, number, outcome="stored", reason="", *, wait=True):
        """Crash one process, whose end is known beforehand."""
        self.number += 1
        name = b"%s%d" % (MARK, self.number)
        self.truth[outcome, reason] += 1
        self.node.crash_only(number, name=name)
        if wait:
            self.node.settle()
        return name.decode()

    @contextlib.contextmanager
    def broken(self, path):
        """Move something away."""
        aside = path.with_name(path.name + ".aside")
        path.rename(aside)
        try:
            yield
        finally:
            self.node.settle()
            aside.rename(path)

    @contextlib.contextmanager
    def pattern(self, text):
        """Let crashes lead elsewhere for a while."""
        before = kernel.PATTERN.read_text()
        kernel.PATTERN.write_text(text + "\n")
        try:
            yield
        finally:
            kernel.PATTERN.write_text(before)

    @contextlib.contextmanager
    def setting(self, key, value):
        """Change a line of helper.conf for a while."""
        config = self.node.directory / "helper.conf"
        before = config.read_text()
        config.write_text(before + f"{key}={value}\n")
        try:
            yield
        finally:
            self.node.settle()
            config.write_text(before)

    # The six ways

    def helper_missing(self, number=6, *, wait=True):
        with self.broken(self.node.directory / "core-dump-helper"):
            before = self.kernel_dropped()
            name = self.crash(number, "kernel", "helper_missing")
            wait_until(lambda: self.kernel_dropped() > before or not wait, 30, "a line that was read in time")
            return name

    def kernel_dropped(self):
        """Return the number of dumps that the kernel did not make."""
        return sum(number for (outcome, _), number in self.seen().items() if outcome == "kernel")

    def package_missing(self, number=6):
        with self.broken(self.node.directory / "core_dump_helper"):
            return self.crash(number, "helper", "not_started")

    def directory_missing(self, number=6):
        with self.setting("WATCH_DIR", self.node.directory / "gone"):
            return self.crash(number, "helper", "directory")

    def refused(self, number=6):
        with self.setting("IGNORE_SIGNALS", number):
            return self.crash(number, "refused", "ignored_signal")

    def no_trace(self, number=11):
        with self.pattern("|/bin/true"):
            return self.crash(number, "no_trace", "")

    def pipe_limit(self, number=6):
        """Crash a second process while a first one holds the only place; the first one's dump is lost as well."""
        holder = self.node.directory / "holder"
        if not holder.exists():
            holder.write_text("#!/bin/sh\nexec sleep 60\n")
            holder.chmod(0o755)
        with one_place(), self.pattern(f"|{holder}"), self.hold_the_only_place():
            return self.crash(number, "kernel", "pipe_limit", wait=False)

    @contextlib.contextmanager
    def hold_the_only_place(self):
        """Crash a process whose helper does not end; a stranger's crash may take the place a moment before."""
        held = []

        def is_held():
            if not held or (held[-1].poll() is not None and not sleepers()):
                held.append(
                    self.node.start(self.node.program, "6", b"holder".hex(), "0", "z", "0", name=b"holder")
                )
            return sleepers()

        try:
            wait_until(is_held, 60, "a helper that holds the only place")
            yield
        finally:
            for pid in sleepers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in held:
                process.wait(60)

    # What is counted

    def seen(self):
        """Return what the metrics say, by outcome and reason."""
        found = Counter()
        for line in self.collector.get("/metrics").splitlines():
            name, _, value = line.rpartition(" ")
            label = name.partition('="')[2].partition('"')[0]
            if name.startswith("core_dump_kernel_dropped_total"):
                found["kernel", label] += int(float(value))
            elif name.startswith("core_dump_helper_failures_total"):
                found["helper", label] += int(float(value))
            elif name.startswith("core_dump_dumps_dropped_total"):
                found["refused", label] += int(float(value))
            elif name.startswith("core_dump_crashes_seen_total") and label in {"stored", "no_trace"}:
                found[label, ""] += int(float(value))
        return +found

    def check(self, seconds=60):
        """Wait until everything is counted, once, and nothing else."""
        try:
            wait_until(lambda: self.seen() == +self.truth, seconds)
        except TimeoutError:
            assert self.seen() == +self.truth
        total = sum(
            float(line.rpartition(" ")[2])
            for line in self.collector.get("/metrics").splitlines()
            if line.startswith("core_dump_crashes_seen_total")
        )
        assert total == sum(self.truth.values()), "the denominator"


@contextlib.contextmanager
def one_place():
    """Let one helper run at a time; further crashes leave no dump."""
    limit = kernel.KERNEL / "core_pipe_limit"
    before = limit.read_text()
    limit.write_text("1\n")
    try:
        yield
    finally:
        limit.write_text(before)


def sleepers():
    """Return the processes that hold a place of core_pipe_limit."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if entry.read_bytes() == b"sleep\00060\0":
                found.append(int(entry.parent.name))
    return found


def print_suppressed(node):
    """Let the kernel print how many lines on other crashes it has suppressed: with the next line of each kind."""
    earlier = Losses(node, None)
    earlier.pipe_limit()
    with earlier.pattern("|/nonexistent/helper"):
        earlier.crash(6)


@pytest.fixture
def losses(node, seaweed, bucket, tmp_path, request):
    grace = getattr(request, "param", 3.0)
    environ = seaweed.environ() | {"KERNEL_LOG": "auto"}
    # The pattern and the limit are restored even if this test is killed.
    with node.installed(transport="pipe", pipe_limit=0):
        print_suppressed(node)
        with running(node.watch_dir, environ, tmp_path, program=COLLECTOR.format(grace=grace)) as collector:
            wait_until(
                lambda: collector.metric("core_dump_kernel_log_watched") == 1, 10, "the log to be watched"
            )
            yield Losses(node, collector)


def records(bucket):
    """Return the records in the bucket by the name of their process."""
    found = [json.loads(s3.body_of(bucket, key)) for key in s3.keys_in(bucket) if "/storm-" in key]
    return {record.get("comm"): record for record in found}


def test_each_way_to_lose_a_dump_is_counted_once_and_recorded(losses, bucket):
    losses.crash(6)
    lost = {
        losses.helper_missing(): "helper_missing",
        losses.package_missing(): "not_started",
        losses.directory_missing(): "directory",
        losses.pipe_limit(): "pipe_limit",
        losses.no_trace(): "no_trace",
    }
    losses.refused()
    losses.crash(11)
    losses.check()
    wait_until(lambda: lost.keys() <= records(bucket).keys(), 30, "the records")
    found = records(bucket)
    for name, reason in lost.items():
        assert (found[name]["reason"], found[name]["state"], found[name]["suppressed"]) == (
            reason,
            "suppressed",
            1,
        )
        assert (name, found[name]["pid"]) in losses.node.crashes


@pytest.mark.skipif(not os.environ.get("COVERAGE_COUNT"), reason="minutes: make test-coverage-count")
@pytest.mark.parametrize("losses", [60.0], indirect=True)
def test_thousand_crashes_of_which_a_fifth_is_lost_in_six_ways_are_counted_one_by_one(losses):
    pick = random.Random(20261128)
    kinds = [6, 11, 4, 8, 7, 3, 5, 31]
    for way in (losses.package_missing, losses.directory_missing, losses.refused):
        for _ in range(133):
            losses.crash(pick.choice(kinds), wait=False)
        losses.node.settle()
        for _ in range(33):
            way(pick.choice([6, 3, 7, 31]))
    for way in (losses.helper_missing, losses.pipe_limit):
        for _ in range(133):
            losses.crash(pick.choice(kinds), wait=False)
        losses.node.settle()
        for turn in range(33):
            way(
                pick.choice([6, 3, 7, 31]),
                **({"wait": turn < MOST_LINES} if way == losses.helper_missing else {}),
            )
        time.sleep(RATE_LIMIT_SECONDS)  # the kernel tells how many lines it suppressed with the next one
        way(6)
    for _ in range(135):
        losses.crash(pick.choice(kinds), wait=False)
    losses.node.settle()
    for turn in range(33):
        if turn % 8 == 0:
            time.sleep(RATE_LIMIT_SECONDS)  # a suppressed line on a fault cannot be told apart
        losses.no_trace()
    stored = losses.truth["stored", ""]
    losses.check(300)
    print(f"{sum(losses.truth.values())} crashes, {stored} stored: {dict(losses.truth)}")  # noqa: T201
    assert (stored, sum(losses.truth.values())) == (800, 1000)

"""What a dump gets that waited for its slot, and one that cannot be given attributes."""

import fcntl
import gzip
import os
import stat
import subprocess
import threading
import time

import pytest
from tests.support.collector import wait_until
from tests.support.cores import simple as elf

from core_dump_collector.node.dumpfile import DumpFile
from core_dump_helper import slots
from core_dump_helper.crash import parse_arguments
from core_dump_helper.limits import Limits, RateLimiter
from core_dump_helper.settings import Settings


def test_waiting_for_a_slot_takes_nothing_from_the_time_that_a_dump_has(station):
    station.settings = {"MAX_CONCURRENT": 1, "DEADLINE_SECONDS": 3, "VITAL_LIMIT": 0}
    station.run(elf(b"first"))
    first, core = set(station.names()), elf(b"second" * 1000)
    with (station.watch_dir / ".helper/slot-0").open() as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        process = station.start()
        opened = f"/proc/{process.pid}/fd"
        wait_until(lambda: any(os.path.realpath(f"{opened}/{fd}") == slot.name for fd in os.listdir(opened)))
        threading.Event().wait(2)  # most of what it has
        fcntl.flock(slot, fcntl.LOCK_UN)
    process.stdin.write(core[:1000])
    process.stdin.flush()
    threading.Event().wait(1.8)  # more than what would be left of it
    _, logged = process.communicate(core[1000:], timeout=30)
    (dump,) = (station.watch_dir / name for name in set(station.names()) - first)
    assert "truncated" not in station.attributes(dump), logged
    assert gzip.decompress(dump.read_bytes()) == core


def test_slot_is_free_while_a_dump_is_synced(station):
    station.settings = {"MAX_CONCURRENT": 1}
    fifo, line = station.watch_dir.parent / "fifo", "    os.fsync(dump)\n"
    os.mkfifo(fifo)
    station.edits = [("dumpfile.py", line, f"    open({str(fifo)!r}).read()\n{line}")]
    first = station.start()
    first.stdin.write(elf(b"first"))
    first.stdin.close()
    writer = os.open(fifo, os.O_WRONLY)  # waits until the first one is about to sync
    station.edits = []
    station.run(elf(b"second"))
    (second,) = (name for name in station.names() if name.endswith(".gz"))
    assert first.poll() is None
    os.close(writer)
    first.wait(60)
    first.stderr.close()
    dumps = {gzip.decompress((station.watch_dir / name).read_bytes()) for name in station.names()}
    assert dumps == {elf(b"first"), elf(b"second")}
    assert second in station.names()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, needs root: sudo make test")
@pytest.mark.parametrize("promised", [None, 10_000], ids=["whole", "cut short"])
def test_dump_that_is_cut_short_is_flagged_where_there_are_no_attributes(station, promised):
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=0700", "none", station.watch_dir], check=True)
    try:
        station.run(elf(b"core", promised=promised))
        assert gzip.decompress(station.dump().read_bytes()) == elf(b"core", promised=promised)
        assert bool(station.dump().stat().st_mode & stat.S_ISVTX) == bool(promised)
        with DumpFile(str(station.watch_dir), station.dump().name) as dump:
            assert (b"salvaged" in dump.attributes().values()) == bool(promised)
    finally:
        subprocess.run(["umount", "-l", station.watch_dir], check=True)


def test_slow_helper_does_not_take_a_guard_that_is_held_for_a_moment_for_a_missing_slot(
    directory, records, monkeypatch
):
    """Of many crashes at once, each helper needs more than half a second to come here, and slots are free."""
    held = iter([True] * 3)
    lock = slots.lock
    monkeypatch.setattr(
        slots, "lock", lambda file, seconds: not (seconds and next(held, False)) and lock(file, seconds)
    )
    crash, settings = parse_arguments(["-P1"]), Settings()
    limits = Limits(crash, {"origin": b"user:1"}, directory, settings, may_read_memory=True)
    deadline = time.monotonic() + settings.DEADLINE_SECONDS - 1
    assert limits._wait(records, RateLimiter(records, "0"), deadline, lambda: None) == ""
    limits.release_slots()

"""What the watch directory holds is counted once, kept up to date, and divided among the origins of crashes."""

import os
import subprocess

import pytest
from tests.support.collector import wait_until
from tests.support.cores import simple as elf

from core_dump_helper.disk import CHECK_BYTES, DiskLimits, DiskWatch
from core_dump_helper.settings import Settings
from core_dump_helper.usage import Usage

MIB = 1 << 20
ME = b"unit:me.service"


@pytest.fixture
def settings(directory):
    """MAX_TOTAL_BYTES alone limits the disk; it is more than the dumps of a test, and less than what is in use."""
    space = os.fstatvfs(directory)
    made = Settings()
    made.KEEP_FREE_PERCENT = 0
    made.MAX_TOTAL_BYTES = max(64 * MIB, (space.f_blocks - space.f_bfree) * space.f_frsize)
    return made


@pytest.fixture
def listings(monkeypatch):
    """Every listing of a directory."""
    found = []
    for name in ("scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, real=real: found.append(path) or real(path))
    return found


def dump_of(watch_dir, name, mebibytes, origin=ME):
    """Create a dump of one origin; return its descriptor."""
    dump = os.open(watch_dir / f"core-{name}", os.O_RDWR | os.O_CREAT)
    os.setxattr(dump, "user.coredump.origin", origin)
    os.posix_fallocate(dump, 0, mebibytes * MIB)
    return dump


def test_large_dump_lists_the_directory_once_and_the_next_one_not_at_all(
    watch_dir, directory, records, settings, listings
):
    for number in range(2):
        dump = dump_of(watch_dir, number, 1)
        limits = DiskLimits(directory, settings, ME, records)
        limits.check()
        watch = DiskWatch(dump, limits)
        assert [watch.check(size) for size in range(CHECK_BYTES, 8 * CHECK_BYTES, CHECK_BYTES)] == [""] * 7
        watch.finish()
        os.close(dump)
    assert listings == [directory]
    usage = Usage(directory, records)
    assert usage.load()
    assert usage.total >= 2 * MIB


def test_dumps_that_grow_at_the_same_time_are_counted_together(watch_dir, directory, records, settings):
    settings.MAX_TOTAL_BYTES = 5 * MIB
    both = [DiskLimits(directory, settings, b"user:%d" % number, records) for number in range(2)]
    for limits in both:
        limits.check()
    dumps = [dump_of(watch_dir, number, 3, b"user:%d" % number) for number in range(2)]
    found = [DiskWatch(dump, limits).check(CHECK_BYTES) for dump, limits in zip(dumps, both, strict=True)]
    assert found == ["", "max_total_bytes"]
    for dump in dumps:
        os.close(dump)


def test_dump_is_kept_when_what_was_counted_has_been_collected(watch_dir, directory, records, settings):
    settings.MAX_TOTAL_BYTES = 2 * MIB
    os.close(dump_of(watch_dir, "old", 3))
    assert DiskLimits(directory, settings, ME, records).exceeded() == "max_total_bytes"
    (watch_dir / "core-old").unlink()
    wait_until(
        lambda: not DiskLimits(directory, settings, ME, records).exceeded(),
        60,
        "the files to be counted again: not sooner than REFUSAL_PATIENCE times what the last count took",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners, needs root: sudo make test")
def test_file_of_another_user_counts_for_its_owner_whatever_it_says(watch_dir, directory, records):
    os.close(dump_of(watch_dir, "mine", 1))
    os.close(dump_of(watch_dir, "planted", 2))
    os.chown(watch_dir / "core-planted", 65534, 65534)
    usage = Usage(directory, records)
    assert usage.count(10)
    assert [usage.origins[ME] // MIB, usage.origins[b"user:65534"] // MIB] == [1, 2]


def test_count_that_takes_too_long_is_a_lower_bound_until_nobody_waits(
    watch_dir, directory, records, settings
):
    for number in range(3):
        os.close(dump_of(watch_dir, number, 1))
    usage = Usage(directory, records)
    assert not usage.count(-1, partial=True)
    assert MIB <= usage.total < 2 * MIB
    assert not usage.refresh(0, 0, -1)
    assert MIB <= usage.total < 2 * MIB
    assert usage.refresh(10, 20, 10)
    assert usage.total >= 3 * MIB


@pytest.mark.parametrize("text", [b"", b"x", b"1 2\n", b"nan nan 1\n", b"9e99 0 1\n", b"1 1 1\nx y\n"])
def test_damaged_count_is_replaced_by_a_new_one(watch_dir, directory, records, settings, text):
    (watch_dir / ".helper/usage").write_bytes(text)
    os.close(dump_of(watch_dir, "old", 3))
    settings.MAX_TOTAL_BYTES = 2 * MIB
    assert DiskLimits(directory, settings, ME, records).exceeded() == "max_total_bytes"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, needs root: sudo make test")
@pytest.mark.parametrize("limit", ["KEEP_FREE_PERCENT", "MAX_TOTAL_BYTES", "half"])
def test_dumps_of_one_user_leave_room_on_the_disk_for_others(station, limit):
    size = {"KEEP_FREE_PERCENT": 24, "MAX_TOTAL_BYTES": 64, "half": 32}[limit]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", station.watch_dir], check=True)
    try:
        station.watch_dir.chmod(0o700)
        station.settings = {"COMPRESSOR": "none", "MAX_CONCURRENT": 0, "MAX_TOTAL_BYTES": 0, "VITAL_LIMIT": 0}
        values = {"KEEP_FREE_PERCENT": 33, "MAX_TOTAL_BYTES": 16 * MIB, "half": "half"}
        limit, value = limit.replace("half", "MAX_TOTAL_BYTES"), values[limit]
        station.settings[limit] = value
        core = elf(os.urandom(2 * MIB - 4096))
        with subprocess.Popen(["setpriv", "--reuid=1000", "--clear-groups", "sleep", "100"]) as other:
            greedy = (f"-P{other.pid}", "-u1000", "-s11", "-t17", "-d1")
            logs = [station.run(core, *greedy, name="greedy") for _ in range(9)]
            other.kill()
        kept = [name for name in station.names() if "greedy" in name]
        assert len(kept) == 7, "of 8 that fit"
        assert "no dump: " + limit.lower().replace("_percent", "") in logs[7]
        assert "is complete" in station.run(
            core, f"-P{os.getpid()}", "-u0", "-s11", "-t17", "-d1", name="quiet"
        )
    finally:
        subprocess.run(["umount", "-l", station.watch_dir], check=True)

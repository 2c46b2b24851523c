"""No origin of crashes can use up what the others need: slots, records, the kernel log; and every loss is counted."""

import contextlib
import os
import subprocess
import time

import pytest
from tests.support.collector import wait_until
from tests.support.cores import simple as elf

from core_dump_collector.losses.messages import REFUSALS
from core_dump_collector.node import suppressed
from core_dump_helper.core import Memory
from core_dump_helper.crash import read_files
from core_dump_helper.records import MAX_FILES, MAX_RECORDS, Record, Records, open_state
from core_dump_helper.settings import Settings
from core_dump_helper.slots import Slots

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts or changes owners, needs root: sudo make test"
)
CORE = elf(b"core")


@pytest.fixture
def hold(records):
    """Takes as many of `wanted` slots as one origin gets, each in an object of its own, until the test ends."""
    made = []

    def take(count, origin, wanted):
        attempts = [Slots(records, count, origin, Memory(Settings())) for _ in range(wanted)]
        made.extend(attempts)
        return [slots for slots in attempts if slots.acquire(time.monotonic())]

    yield take
    for slots in made:
        slots.release()


@pytest.mark.parametrize(
    ("count", "shares"), [(1, [1, 0]), (2, [1, 1, 0]), (8, [4, 2, 1, 1, 0]), (16, [8, 4, 2])]
)
def test_origin_may_hold_as_many_slots_as_it_leaves_free(hold, count, shares):
    held = [hold(count, b"user:%d" % number, count) for number in range(len(shares))]
    assert [len(slots) for slots in held] == shares
    held[0][0].release()
    assert len(hold(count, b"user:quiet", 1)) == 1


@needs_root
def test_quiet_service_gets_a_slot_while_one_user_has_more_crashes_than_slots(station):
    station.settings = {"MAX_CONCURRENT": 4, "DEADLINE_SECONDS": 20, "VITAL_LIMIT": 0}
    hog = station.command("-u65534", "-s11", "-t17", "-d1", name="hog")
    quiet = [{"-u65534": f"-P{os.getpid()}", "hog": "quiet"}.get(word, word) for word in hog]
    with contextlib.ExitStack() as stack:
        hogs = [stack.enter_context(subprocess.Popen(hog, stdin=-1, stderr=-3)) for _ in range(6)]
        for process in hogs:
            process.stdin.write(CORE[:-1])
            process.stdin.flush()
        wait_until(lambda: len(station.names()) == 2, 10, "the user's share to be used")
        done = subprocess.run(quiet, input=CORE, stderr=-1, timeout=15, check=True)
        assert b"core-quiet-17-%d-11.gz is complete" % os.getpid() in done.stderr
        assert len([name for name in station.names() if "hog" in name]) == 2
        for process in hogs:
            process.stdin.close()
        wait_until(lambda: len([name for name in station.names() if "hog" in name]) == 6, 15, "its own queue")


@needs_root
def test_supplementary_groups_hide_neither_the_metadata_nor_the_origin(station):
    ready, report = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups(range(100_000, 165_000))
        os.write(report, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1)
        station.run(CORE, f"-P{child}", f"-i{child}", "-u0", "-g0", "-s11", "-t17", "-d1")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(report)
    found = station.attributes()
    assert (found["threads"], found["ns_pid"]) == ("1", str(child))
    assert not found["origin"].startswith("unknown")


def test_file_of_proc_that_cannot_be_read_costs_only_what_it_says(tmp_path):
    (tmp_path / "cgroup").write_text("0::/system.slice/web.service\n")
    (tmp_path / "status").write_text("Name:\tx\nThreads:\nNSpid:\t7\n")
    (tmp_path / "comm").mkdir()
    (tmp_path / "cmdline").write_bytes(b"web\0-x\0")
    directory = os.open(tmp_path, os.O_PATH)
    found = read_files(directory)
    os.close(directory)
    assert found == {"cgroup": b"/system.slice/web.service", "ns_pid": b"7", "cmdline": b"web -x"}


def record_of(origin, exe, reason="rate_limit"):
    return Record({"origin": origin, "exe": exe, "signal": b"11"}, reason, 600)


def test_executables_of_one_origin_cannot_use_up_the_records_of_others(records):
    for number in range(MAX_RECORDS):
        assert records.update(record_of(b"user:1000", b"/evil%d" % number), 5) == (
            number < MAX_RECORDS // 2 + 5
        )
    for number in range(20):
        service = record_of(b"unit:%d.service" % number, b"/service")
        assert [records.update(service, 5) for _ in range(6)] == [True] * 5 + [False]
        assert service.workload["exe"] == b"/service"
    evil = record_of(b"user:1000", b"/another")
    assert not records.update(evil, 5)
    assert (evil.workload["exe"], evil.suppressed > 400) == (b"*", True)


def test_origins_beyond_all_records_are_kept_and_their_losses_counted_together(records, watch_dir):
    for number in range(MAX_FILES):
        (watch_dir / ".helper" / f"{number:024x}").touch()
    names = set(os.listdir(watch_dir / ".helper"))
    assert records.update(record_of(b"user:1", b"/a"), 1)
    assert records.update(record_of(b"user:1", b"/a"), 1), "a limit for one workload must not hit another's"
    assert not records.update(record_of(b"user:1", b"/a", "keep_free"), 0)
    assert not records.update(record_of(b"user:2", b"/b", "keep_free"), 0)
    (shared,) = [name for name in set(os.listdir(watch_dir / ".helper")) - names if len(name) == 24]
    assert b"suppressed=2\n" in (watch_dir / ".helper" / shared).read_bytes()


def test_refusals_of_one_window_are_logged_once(station):
    station.settings = {"RATE_LIMIT": "1/600", "NO_SUCH_KEY": "1", "VITAL_LIMIT": 0}
    station.watch_dir.chmod(0o755 | 0o22)
    logs = [station.run(CORE).splitlines() for _ in range(4)]
    assert [len(log) for log in logs] == [4, 3, 0, 0], logs
    assert "no dump: rate_limit: RATE_LIMIT is reached" in logs[1][-1]
    station.settings = {"RESPECT_RLIMIT": "yes"}
    assert [len(station.run(CORE).splitlines()) for _ in range(3)] == [2, 0, 0]
    assert sorted(record["suppressed"] for record in station.records()) == ["3", "3"]


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(station, tmp_path, request):
    """Put the watch directory on a file system of a few MiB with 160 inodes."""
    options = ["-t", "tmpfs", "-o", "size=4m,nr_inodes=160", "none"]
    if request.param == "ext4":
        image = tmp_path / "image"
        image.write_bytes(bytes(8 << 20))
        subprocess.run(["mkfs.ext4", "-q", "-N", "160", "-m", "0", image], check=True)
        options = ["-o", "loop", image]
    subprocess.run(["mount", *options, station.watch_dir], check=True)
    station.watch_dir.chmod(0o700)
    yield station
    subprocess.run(["umount", "-l", station.watch_dir], check=True)


def use_up(directory, what):
    """Use up the last block or the last inode of a file system."""
    with contextlib.suppress(OSError):
        if what == "inode":
            for number in range(200):
                (directory / f"filler-{number}").touch()
        with (directory / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass


@needs_root
@pytest.mark.parametrize("what", ["block", "inode"])
@pytest.mark.parametrize("keep_free", [0, 15])
def test_every_loss_is_counted_when_the_last_block_or_inode_is_used_up(small_disk, what, keep_free):
    small_disk.settings = {"KEEP_FREE_PERCENT": keep_free, "MAX_TOTAL_BYTES": 0}
    small_disk.run(CORE)
    (small_disk.watch_dir / small_disk.names()[0]).unlink()
    use_up(small_disk.watch_dir, what)
    before = set(small_disk.names())
    logged = ""
    for number in range(1, 9):
        logged += small_disk.run(
            CORE, "-P", "-p1", "-t17", "-d1", f"-s{number}", f"-u{number % 3}", name=f"app{number}"
        )
    assert set(small_disk.names()) == before
    assert logged.count("; dumping") <= logged.count("no dump: ") >= 1
    read = list(suppressed._read_records(str(small_disk.watch_dir)))
    assert sum(record.suppressed for record in read) == 8
    reasons = {record.reason for record in read if record.suppressed}
    assert reasons == {"inodes" if what == "inode" else "keep_free" if keep_free else "disk_full"}


@needs_root
def test_each_reason_is_counted_on_a_full_disk(small_disk):
    directory = os.open(small_disk.watch_dir, os.O_RDONLY)
    records = Records(open_state(directory))
    records.prepare()
    use_up(small_disk.watch_dir, "block")
    reasons = set(REFUSALS) - {"rate_limit"}
    for number in range(5):
        for reason in reasons:
            records.update(record_of(b"user:%d" % number, b"/app", reason), 0)
    os.close(records.directory)
    os.close(directory)
    read = list(suppressed._read_records(str(small_disk.watch_dir)))
    found = {reason: sum(each.suppressed for each in read if each.reason == reason) for reason in reasons}
    assert found == dict.fromkeys(reasons, 5)

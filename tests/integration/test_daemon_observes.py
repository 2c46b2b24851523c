"""Nothing that the collector only observes ends it, and it collects again as soon as that is possible."""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import resource
import shutil
import subprocess

import pytest
from tests.support import kernel, s3
from tests.support.collector import IMPATIENT, running, wait_until

NAME = "core-app-1700000000-1-11.gz"
UPLOADED = 'core_dump_uploads_total{result="uploaded"}'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, limits: needs root: sudo make test")


def put_dump(directory, name=NAME):
    partial = directory / (name + ".partial")
    partial.write_bytes(gzip.compress(name.encode()))
    partial.rename(directory / name)


def wait_collected(collector, directory, count=1):
    """Publish a dump and wait until it is uploaded: the collector lives and works."""
    put_dump(directory, f"core-app-{1_700_000_000 + count}-{count}-11.gz")
    wait_until(lambda: collector.metric(UPLOADED) == count, 30, "the dump to be uploaded")
    assert collector.process.poll() is None


def rename_into(directory, elsewhere):
    (elsewhere / "new").mkdir()
    (elsewhere / "new").rename(directory / "core-new")


def rename_within(directory, elsewhere):
    (directory / "core-first").mkdir()
    (directory / "core-first").rename(directory / "core-other")


def rename_away(directory, elsewhere):
    (directory / "core-old").mkdir()
    (directory / "core-old").rename(elsewhere / "away")


def make_and_remove(directory, elsewhere):
    (directory / "core-old").mkdir()
    (directory / "core-old").rmdir()


def rename_a_partial(directory, elsewhere):
    (directory / f"{NAME}.partial").mkdir()
    (directory / f"{NAME}.partial").rename(directory / "core-x.gz.partial")


def test_directories_that_come_and_go_in_the_watch_directory_end_nothing(
    seaweed, bucket, watch_dir, tmp_path
):
    changes = [rename_into, rename_within, rename_away, make_and_remove, rename_a_partial]
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        for number, change in enumerate(changes, 1):
            elsewhere = tmp_path / f"elsewhere-{number}"
            elsewhere.mkdir()
            change(watch_dir, elsewhere)
            wait_collected(collector, watch_dir, number)


@pytest.fixture
def mounted(watch_dir):
    """A file system mounted on the watch directory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "none", watch_dir], check=True)
    yield watch_dir
    subprocess.run(["umount", "-l", watch_dir], check=False, stderr=subprocess.DEVNULL)


@needs_root
@pytest.mark.parametrize("command", [["umount"], ["umount", "-l"]], ids=" ".join)
def test_watch_directory_that_is_unmounted_is_followed_to_what_lies_below(
    seaweed, bucket, mounted, tmp_path, command
):
    with running(mounted, seaweed.environ(), tmp_path) as collector:
        wait_collected(collector, mounted)
        subprocess.run([*command, mounted], check=True)
        wait_until(lambda: collector.metric("core_dump_watch_losses_total") == 1, 20, "the loss to be seen")
        wait_collected(collector, mounted, 2)
        assert collector.metric("core_dump_watch_directory_watched") == 1
        assert collector.get("/readyz") == "ok\n"


@contextlib.contextmanager
def shared_host(directory):
    """Make a directory a place whose mounts propagate, as systemd makes the host's root."""
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        subprocess.run(["mount", "--make-shared", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "-R", "-l", directory], check=True)


SEES_HOST = {
    "pod": 'mount --rbind "$0" "$1" && mount --make-rslave "$1" && shift && exec "$@"',
    "unit": 'mount --bind "$0" "$0" && shift && exec "$@"',
}
"""A hostPath volume with HostToContainer, and the unit's ReadWritePaths below ProtectSystem=strict."""


@needs_root
@pytest.mark.parametrize("place", SEES_HOST)
def test_volume_mounted_on_the_host_after_the_start_is_collected_and_so_is_its_unmounting(
    seaweed, bucket, tmp_path, place
):
    host, seen = tmp_path / "host", tmp_path / "seen"
    host.mkdir()
    seen.mkdir()
    with shared_host(host):
        on_host = host / "core_dumps"
        on_host.mkdir(mode=0o700)
        script = ["sh", "-c", SEES_HOST[place], str(on_host), str(seen)]
        prefix = ("unshare", "-m", "--propagation", "slave", *script)
        directory = seen if place == "pod" else on_host
        with running(directory, seaweed.environ(), tmp_path, prefix=prefix) as collector:
            wait_collected(collector, on_host)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "none", on_host], check=True)
            wait_collected(collector, on_host, 2)
            subprocess.run(["umount", on_host], check=True)
            wait_collected(collector, on_host, 3)
            assert collector.metric("core_dump_watch_losses_total") == 2


INOTIFY_LIMITS = {"max_inotify_instances": "max_user_instances", "max_inotify_watches": "max_user_watches"}
"""Of a user namespace (namespaces(7), /proc/sys/user), and the sysctl that an operator raises."""


def in_namespace(limit, value):
    """Return the start of a command that runs in a user namespace of its own with such a limit."""
    script = f'echo {value} > /proc/sys/user/{limit} && exec "$@"'
    return ("unshare", "-U", "--map-root-user", "sh", "-c", script, "sh")


def set_limit(collector, limit, value):
    enter = ["nsenter", "-t", str(collector.process.pid), "-U", "--preserve-credentials"]
    command = [*enter, "sh", "-c", f"echo {value} > /proc/sys/user/{limit}"]
    subprocess.run(command, check=True)


@needs_root
@pytest.mark.parametrize("limit", INOTIFY_LIMITS)
def test_without_inotify_the_directory_is_scanned_until_inotify_is_back(
    seaweed, bucket, watch_dir, tmp_path, limit
):
    with running(watch_dir, seaweed.environ(), tmp_path, prefix=in_namespace(limit, 0)) as collector:
        wait_collected(collector, watch_dir)
        assert collector.metric("core_dump_inotify_active") == 0
        assert collector.get("/readyz") == "ok\n"
        set_limit(collector, limit, 128)
        wait_until(lambda: collector.metric("core_dump_inotify_active") == 1, 20, "inotify to be used again")
        wait_collected(collector, watch_dir, 2)
        log = [e for e in collector.log() if e["event"] == "cannot observe"]
    assert len(log) == 1, "told once"
    assert INOTIFY_LIMITS[limit] in log[0]["remedy"]


@needs_root
def test_inotify_that_is_lost_while_the_directory_is_replaced_costs_no_dump(
    seaweed, bucket, watch_dir, tmp_path
):
    limit = "max_inotify_instances"
    with running(watch_dir, seaweed.environ(), tmp_path, prefix=in_namespace(limit, 128)) as collector:
        set_limit(collector, limit, 0)
        shutil.rmtree(watch_dir)
        watch_dir.mkdir(mode=0o700)
        wait_collected(collector, watch_dir)
        assert collector.metric("core_dump_inotify_active") == 0
        assert collector.metric("core_dump_watch_losses_total") == 1


def test_core_pattern_without_a_program_ends_nothing(seaweed, bucket, watch_dir, tmp_path):
    if not kernel.can_crash():
        pytest.skip("run as root to set kernel.core_pattern")
    with kernel.core_pattern("|"), running(watch_dir, seaweed.environ(), tmp_path) as collector:
        wait_collected(collector, watch_dir)
        assert collector.metric("core_dump_core_pattern_ours") == 0


@needs_root
def test_frozen_file_system_stops_neither_heartbeat_nor_the_end(seaweed, bucket, tmp_path, watch_dir):
    """fsfreeze(8) lets every write wait: salvage, unlink and attributes."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, watch_dir], check=True)
    frozen = False
    try:
        watch_dir.chmod(0o700)
        (watch_dir / f"{NAME}.partial").write_bytes(gzip.compress(os.urandom(1000))[:900])
        with running(
            watch_dir, seaweed.environ(), tmp_path, "--shutdown-seconds", "1", program=IMPATIENT
        ) as collector:
            subprocess.run(["fsfreeze", "-f", watch_dir], check=True)
            frozen = True
            wait_until(lambda: any(map(is_blocked, collector.workers())), 30, "a worker that waits")
            assert collector.get("/livez") == "ok\n"
            assert collector.stop(seconds=15) == 0
    finally:
        if frozen:
            subprocess.run(["fsfreeze", "-u", watch_dir], check=True)
        subprocess.run(["umount", "-l", watch_dir], check=True)
    assert s3.keys_in(bucket) == {}


def is_blocked(pid):
    """Tell whether a thread of a process is in uninterruptible sleep (proc_pid_stat(5))."""
    states = []
    for thread in glob.glob(f"/proc/{pid}/task/*/stat"):
        with contextlib.suppress(OSError), open(thread) as file:
            states.append(file.read().rpartition(")")[2].split()[0])
    return "D" in states


def test_no_descriptor_left_ends_nothing(seaweed, bucket, watch_dir, tmp_path):
    with running(
        watch_dir, seaweed.environ(), tmp_path, "--workers", "4", "--scan-seconds", "1"
    ) as collector:
        wait_until(collector.workers, 30, "the first worker")
        pid = collector.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        for number in range(1, 9):
            put_dump(watch_dir, f"core-app-{1_700_000_000 + number}-{number}-11.gz")
        wait_until(lambda: any(e.get("what") == "scan" for e in collector.log()), 30, "a scan that fails")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        wait_until(lambda: not list(watch_dir.glob("core*")), 60, "every dump to be uploaded")
        assert collector.metric('core_dump_observation_failures_total{what="scan"}') >= 1
        wait_until(lambda: collector.metric(UPLOADED) == 8, 10)

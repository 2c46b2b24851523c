"""What other processes do to the collector: its log's reader stops or goes, a signal reaches its whole group."""

from __future__ import annotations

import fcntl
import gzip
import os
import signal
import subprocess

import pytest
from tests.support import s3
from tests.support.cleanup import temporary_directory
from tests.support.collector import COMMAND, Collector, descendants, running, wait_until
from tests.support.slow import slow_proxy

UPLOADED = 'core_dump_uploads_total{result="uploaded"}'
COUNT = 60


def publish(directory, count=COUNT):
    for number in range(1, count + 1):
        partial = directory / f"core-app-{1_700_000_000 + number}-{number}-11.gz.partial"
        partial.write_bytes(gzip.compress(b"%d" % number))
        partial.rename(partial.with_suffix(""))


@pytest.mark.parametrize("reader", ["stops", "goes away"])
def test_log_that_nobody_reads_costs_its_lines_alone(seaweed, bucket, watch_dir, tmp_path, reader):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    port = 20_000 + os.getpid() % 10_000
    environ = seaweed.environ() | {
        "BUCKET_NAME": "dumps",
        "METRICS_ADDRESS": "127.0.0.1",
        "METRICS_PORT": str(port),
        "STARTUP_FILE": str(tmp_path / "startup"),
        "LOG_LEVEL": "debug",
        "AWS_EC2_METADATA_DISABLED": "true",
        "KERNEL_LOG": "off",
    }
    command = [*COMMAND, "run", str(watch_dir)]
    with subprocess.Popen(command, env=dict(os.environ) | environ, stderr=write) as process:
        collector = Collector(process, tmp_path / "none", tmp_path / "startup", port)
        try:
            os.close(write)
            collector.wait_ready()
            if reader == "goes away":
                os.close(read)
            publish(watch_dir)
            wait_until(lambda: not list(watch_dir.glob("core*")), 60, "every dump to be uploaded")
            wait_until(lambda: collector.metric(UPLOADED) == COUNT, 10)
            if reader == "goes away":
                dropped = "core_dump_log_lines_dropped_total"
                wait_until(lambda: collector.metric(dropped) >= COUNT, 10)
            assert collector.stop() == 0
        finally:
            family = [process.pid, *descendants(process.pid)] if process.poll() is None else []
            for pid in family:
                os.kill(pid, signal.SIGKILL)
            if reader == "stops":
                os.close(read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_process_group_lets_an_upload_end(seaweed, bucket, watch_dir, tmp_path, number):
    with slow_proxy(seaweed.endpoint) as endpoint:
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint, "SHUTDOWN_SECONDS": "60"}
        with running(watch_dir, environ, tmp_path, prefix=("setsid",)) as collector:
            (watch_dir / "core-big-1700000000-1-6.partial").write_bytes(os.urandom(12 << 20))
            (watch_dir / "core-big-1700000000-1-6.partial").rename(watch_dir / "core-big-1700000000-1-6")
            wait_until(lambda: collector.metric("core_dump_inflight_uploads") == 1, 20)
            wait_until(collector.workers, 20, "a worker")
            os.killpg(collector.process.pid, number)
            assert collector.process.wait(60) == 0
            events = [e["event"] for e in collector.log()]
    assert "uploads were cut off; their files are on disk" not in events
    assert "a worker process died; another takes its place" not in events
    assert list(watch_dir.iterdir()) == []


BARE_HOST = """
echo -n '(none)' > /proc/sys/kernel/hostname
mount --bind "$1" "$1"
for place in /tmp /var/tmp /dev/shm; do
  mount --rbind $place $place
  mount -o remount,bind,ro $place
done
shift
cd /proc
exec "$@"
"""
"""Early in boot, or in a container without these: what lies below the first argument stays writable."""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, sets a host name: needs root: sudo make test")
def test_host_without_name_temporary_directory_and_shared_memory_is_collected(seaweed, bucket):
    with temporary_directory("cdh-", "/var/tmp") as home:
        # A short path: the socket of the workers is named below it (unix(7)).
        watch_dir = home / "core_dumps"
        watch_dir.mkdir(mode=0o700)
        prefix = ("unshare", "-m", "-u", "sh", "-ec", BARE_HOST, "sh", str(home))
        environ = seaweed.environ() | {"NODE_NAME": "", "HOME": "/nonexistent"}
        with running(watch_dir, environ, home, prefix=prefix) as collector:
            publish(watch_dir, 3)
            wait_until(lambda: not list(watch_dir.glob("core*")), 60, "every dump to be uploaded")
            wait_until(lambda: collector.metric(UPLOADED) == 3, 10)
            assert collector.stop() == 0
            told = " ".join(str(e["event"]) for e in collector.log() if e["level"] == "warning")
    assert "host name" in told
    assert "no temporary directory" in told
    assert {key.partition("/")[0] for key in s3.keys_in(bucket)} == {"none"}

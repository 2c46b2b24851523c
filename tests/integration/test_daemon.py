"""The daemon as a process, real inotify, a real S3 server."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from tests.support import s3
from tests.support.collector import (
    COMMAND,
    IMPATIENT,
    command_of,
    descendants,
    flood,
    running,
    wait_until,
)
from tests.support.slow import slow_proxy


def put_dump(directory, name, content=b"\x7fELF core of " + bytes(1000)):
    """Publish a dump as the helper does: whole, by rename."""
    partial = directory / (name + ".partial")
    partial.write_bytes(gzip.compress(content + name.encode(), 1))
    partial.rename(directory / name)


def names(start, count):
    return [f"core-app-{1_700_000_000 + n}-{n}-11.gz" for n in range(start, start + count)]


def uploaded(collector):
    return collector.metric('core_dump_uploads_total{result="uploaded"}')


def dumps_in(client):
    return {k for k in s3.keys_in(client) if not k.endswith(".json")}


def test_dumps_from_before_the_start_and_after_it_all_arrive_once(seaweed, bucket, watch_dir, tmp_path):
    before, after = names(0, 200), names(200, 200)
    for name in before:
        put_dump(watch_dir, name)
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        for name in after:
            put_dump(watch_dir, name)
        wait_until(lambda: not list(watch_dir.glob("core*")), 60, "empty directory")
        wait_until(lambda: uploaded(collector) == 400, 10, "400 counted")
        assert collector.metric("core_dump_backlog_files") == 0
        assert collector.metric("core_dump_inflight_uploads") == 0
        assert collector.metric('core_dump_files_skipped_total{reason="vanished"}') == 0
        assert collector.metric('core_dump_dumps_total{signal="SIGSEGV"}') == 400
        stored = s3.keys_in(bucket)
        assert collector.metric("core_dump_upload_bytes_total") == sum(
            size for key, size in stored.items() if key.endswith(".gz")
        )
        assert collector.stop() == 0
    assert set(stored) == {f"node-1/{n}{end}" for n in before + after for end in ("", ".json")}
    content = gzip.decompress(s3.body_of(bucket, f"node-1/{after[-1]}"))
    assert content.endswith(after[-1].encode())
    assert collector.startup_file.read_text() == "dead\n"


def test_worker_killed_in_mid_upload_costs_nothing(seaweed, bucket, watch_dir, tmp_path):
    with slow_proxy(seaweed.endpoint) as endpoint:
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint}
        with running(watch_dir, environ, tmp_path, "--workers", "1") as collector:
            content = os.urandom(40 * 1024 * 1024)
            put_dump(watch_dir, "core-big-1700000000-1-6.gz", content)
            wait_until(lambda: collector.metric("core_dump_inflight_uploads") == 1, 20)
            wait_until(collector.workers, 20, "a worker")
            os.kill(collector.workers()[0], signal.SIGKILL)
            wait_until(lambda: collector.metric("core_dump_pool_rebuilds_total") == 1, 20)
            assert (watch_dir / "core-big-1700000000-1-6.gz").exists()
            wait_until(lambda: not list(watch_dir.glob("core*")), 60)
            wait_until(lambda: uploaded(collector) == 1, 10)
            assert collector.metric('core_dump_retries_total{reason="worker_died"}') == 1
    assert dumps_in(bucket) == {"node-1/core-big-1700000000-1-6.gz"}
    assert gzip.decompress(s3.body_of(bucket, "node-1/core-big-1700000000-1-6.gz"))[: len(content)] == content
    assert s3.unfinished_multiparts(bucket) == []


@contextlib.contextmanager
def killing_whoever_opens(path, collector):
    """Do as the OOM killer to the worker that has a file open, again and again; yield the pids."""
    killed, done = set(), threading.Event()

    def kill():
        while not done.wait(0.005):
            for pid in collector.workers():
                with contextlib.suppress(OSError):
                    if any(os.readlink(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir()):
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def test_file_that_kills_its_worker_each_time_stays_and_holds_up_no_other(
    seaweed, bucket, watch_dir, tmp_path
):
    poison = watch_dir / "core-poison-1700000000-1-6.gz"
    with (
        slow_proxy(seaweed.endpoint) as endpoint,
        running(
            watch_dir, seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint}, tmp_path, "--retry-seconds", "1"
        ) as collector,
    ):
        with killing_whoever_opens(poison, collector) as killed:
            put_dump(watch_dir, poison.name, os.urandom(40 * 1024 * 1024))
            wait_until(lambda: len(killed) >= 2, 30, "two kills")
            for name in names(0, 20):
                put_dump(watch_dir, name)
            wait_until(lambda: list(watch_dir.glob("core*")) == [poison], 60, "all others to go")
        assert collector.metric('core_dump_retries_total{reason="worker_died"}') >= len(killed) >= 2
        wait_until(lambda: not poison.exists(), 60, "the file that kills nobody any more")
    assert dumps_in(bucket) == {f"node-1/{name}" for name in [*names(0, 20), poison.name]}


def test_sigterm_in_mid_upload_ends_in_time_and_the_next_start_finishes(seaweed, bucket, watch_dir, tmp_path):
    put_dump(watch_dir, "core-big-1700000000-1-6.gz", os.urandom(60 * 1024 * 1024))
    with slow_proxy(seaweed.endpoint) as endpoint:
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint, "SHUTDOWN_SECONDS": "0.5"}
        with running(watch_dir, environ, tmp_path) as collector:
            wait_until(lambda: collector.metric("core_dump_inflight_uploads") == 1, 20)
            assert collector.stop(seconds=8) == 0
            assert collector.startup_file.read_text() == "dead\n"
        assert (watch_dir / "core-big-1700000000-1-6.gz").exists()
        with running(watch_dir, environ, tmp_path):
            wait_until(lambda: not list(watch_dir.glob("core*")), 60)
    assert dumps_in(bucket) == {"node-1/core-big-1700000000-1-6.gz"}
    assert s3.unfinished_multiparts(bucket) == []


def test_collector_killed_leaves_no_orphan_and_the_next_start_finishes(seaweed, bucket, watch_dir, tmp_path):
    for name in names(0, 50):
        put_dump(watch_dir, name, os.urandom(200_000))
    put_dump(watch_dir, "core-big-1700000000-1-6.gz", os.urandom(60 * 1024 * 1024))
    with slow_proxy(seaweed.endpoint) as endpoint:
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint}
        with running(watch_dir, environ, tmp_path) as collector:
            wait_until(lambda: uploaded(collector) >= 5, 30)
            family = descendants(collector.process.pid)
            assert family
            collector.kill()
            wait_until(lambda: not any("forkserver" in command_of(pid) for pid in family), 10, "no orphans")
        with running(watch_dir, environ, tmp_path):
            wait_until(lambda: not list(watch_dir.glob("core*")), 60)
    assert dumps_in(bucket) == {f"node-1/{n}" for n in [*names(0, 50), "core-big-1700000000-1-6.gz"]}
    assert s3.unfinished_multiparts(bucket) == []


def test_raw_core_is_compressed_once_its_writer_is_done(seaweed, bucket, watch_dir, tmp_path):
    content = b"\x7fELF" + os.urandom(3_000_000) + bytes(5_000_000)
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        with (watch_dir / "core-raw-1700000000-9-11").open("wb") as writer:
            writer.write(content[:1000])
            writer.flush()
            os.rename(watch_dir / "core-raw-1700000000-9-11", watch_dir / "core-raw-1700000000-8-11")
            busy = 'core_dump_files_skipped_total{reason="busy"}'
            wait_until(lambda: collector.metric(busy) >= 1, 20, "the open file to be seen")
            assert dumps_in(bucket) == set()
            writer.write(content[1000:])
        wait_until(lambda: not list(watch_dir.glob("core*")), 30)
        wait_until(lambda: uploaded(collector) == 1, 10)
    assert dumps_in(bucket) == {"node-1/core-raw-1700000000-8-11.gz"}
    assert gzip.decompress(s3.body_of(bucket, "node-1/core-raw-1700000000-8-11.gz")) == content


def test_raw_core_goes_as_it_is_when_asked(seaweed, bucket, watch_dir, tmp_path):
    with running(watch_dir, seaweed.environ(), tmp_path, "--compress-raw", "false"):
        (watch_dir / "core-raw-1700000000-9-11").write_bytes(b"\x7fELF raw")
        wait_until(lambda: not list(watch_dir.glob("core*")), 30)
    assert s3.body_of(bucket, "node-1/core-raw-1700000000-9-11") == b"\x7fELF raw"


def test_abandoned_partial_is_salvaged_and_flagged_whatever_its_time(seaweed, bucket, watch_dir, tmp_path):
    whole = gzip.compress(os.urandom(500_000), 1)
    partial = watch_dir / "core-cut-1700000000-5-11.gz.partial"
    partial.write_bytes(whole[:300_000])
    os.utime(partial, (1_700_000_000, 1_700_000_000))
    after_a_jump = watch_dir / "core-jump-1700000000-6-11.gz.partial"
    after_a_jump.write_bytes(whole[:300_000])
    os.utime(after_a_jump, (32_503_680_000, 32_503_680_000))  # the year 3000
    with running(watch_dir, seaweed.environ(), tmp_path, program=IMPATIENT) as collector:
        wait_until(lambda: not list(watch_dir.glob("core*")), 30)
        wait_until(lambda: uploaded(collector) == 2, 10)
        assert collector.metric("core_dump_partials_salvaged_total") == 2
        assert collector.metric("core_dump_dumps_truncated_total") == 2
    sidecar = json.loads(s3.body_of(bucket, "node-1/core-cut-1700000000-5-11.gz.json"))
    assert (sidecar["state"], sidecar["truncated"]) == ("truncated", "salvaged")
    assert len(gzip.decompress(s3.body_of(bucket, "node-1/core-cut-1700000000-5-11.gz"))) > 200_000


def test_files_that_are_not_ours_are_left_alone(seaweed, bucket, watch_dir, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("do not upload")
    (watch_dir / "core-link-1-1-11").symlink_to(secret)
    os.link(secret, watch_dir / "core-hard-1-1-11")
    os.mkfifo(watch_dir / "core-fifo-1-1-11")
    (watch_dir / "core-folder-1-1-11").mkdir()
    (watch_dir / "notes.txt").write_text("not a core")
    left = sorted(os.listdir(watch_dir))
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        put_dump(watch_dir, names(0, 1)[0])
        wait_until(lambda: uploaded(collector) == 1, 20)
        refused = 'core_dump_files_skipped_total{reason="refused"}'
        wait_until(lambda: collector.metric(refused) >= 3, 20)
    assert sorted(os.listdir(watch_dir)) == left
    assert dumps_in(bucket) == {f"node-1/{names(0, 1)[0]}"}


def test_lost_events_are_made_up_for_by_a_scan(seaweed, bucket, watch_dir, tmp_path):
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        collector.process.send_signal(signal.SIGSTOP)
        flood(watch_dir)
        for name in names(0, 60):
            put_dump(watch_dir, name)
        collector.process.send_signal(signal.SIGCONT)
        wait_until(lambda: not list(watch_dir.glob("core*")), 30)
        assert collector.metric("core_dump_inotify_overflows_total") >= 1
    assert len(dumps_in(bucket)) == 60


def test_directory_that_is_replaced_is_watched_again_and_alarmed(seaweed, bucket, watch_dir, tmp_path):
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        shutil.rmtree(watch_dir)
        wait_until(lambda: collector.metric("core_dump_watch_directory_watched") == 0, 15)
        watch_dir.mkdir(mode=0o700)
        wait_until(lambda: collector.metric("core_dump_watch_directory_watched") == 1, 15)
        put_dump(watch_dir, names(0, 1)[0])
        wait_until(lambda: uploaded(collector) == 1, 15)
        assert collector.metric("core_dump_watch_losses_total") == 1
        assert collector.get("/readyz") == "ok\n"


def test_unreachable_store_delays_but_loses_nothing(seaweed, bucket, watch_dir, tmp_path):
    port = s3.free_ports(1)[0]
    environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}", "RETRY_SECONDS": "1"}
    with running(watch_dir, environ, tmp_path) as collector:
        put_dump(watch_dir, names(0, 1)[0])
        network = 'core_dump_retries_total{reason="network"}'
        wait_until(lambda: collector.metric(network) >= 2, 30)
        assert list(watch_dir.glob("core*"))
        assert collector.get("/livez") == "ok\n", "a restart would not help"


def test_backlog_does_not_knock_on_a_closed_door_and_goes_once_it_opens(seaweed, bucket, watch_dir, tmp_path):
    (tmp_path / "haproxy").mkdir()
    with s3.haproxy(tmp_path / "haproxy", seaweed) as proxy:
        proxy.stop()
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "RETRY_SECONDS": "1"}
        for name in names(0, 100):
            put_dump(watch_dir, name)
        with running(watch_dir, environ, tmp_path) as collector:
            network = 'core_dump_retries_total{reason="network"}'
            wait_until(lambda: collector.metric(network) >= 8, 30)
            assert collector.metric(network) < 50
            proxy.start()
            wait_until(
                lambda: not list(watch_dir.glob("core*")), 10, "the backlog to go, once the door is open"
            )
    assert len(dumps_in(bucket)) == 100


def run_badly(*arguments, **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BUCKET"))}
    return subprocess.run(
        [*COMMAND, *arguments], env=clean | environ, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["run", "DIR"], {}, "BUCKET_NAME is not set"),
        (["run", "DIR", "--bucket-name", "dumps", "--no-such-flag", "1"], {}, "--no-such-flag"),
        (["run", "/no/such/dir", "--bucket-name", "dumps"], {}, "WATCH_DIR=/no/such/dir"),
        (["run", "/etc/passwd", "--bucket-name", "dumps"], {}, "WATCH_DIR=/etc/passwd"),
        (["run", "DIR"], {"BUCKET_NAME": "dumps", "METRICS_PORT": "99999"}, "METRICS_PORT='99999'"),
        (
            ["run", "DIR"],
            {"BUCKET_NAME": "dumps", "METRICS_PORT": "tcp://10.0.0.1:80"},
            "enableServiceLinks: false",
        ),
        (["run", "DIR"], {"BUCKET_NAME": "dumps", "STARTUP_FILE": "/no/such/dir/x"}, "STARTUP_FILE="),
        (["explode"], {}, "explode"),
    ],
)
def test_bad_configuration_is_one_clear_line_and_exit_2(watch_dir, arguments, environ, said):
    arguments = [str(watch_dir) if a == "DIR" else a for a in arguments]
    ended = run_badly(*arguments, METRICS_ADDRESS="127.0.0.1", **({"METRICS_PORT": "0"} | environ))
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_command_without_its_words_is_two_lines_and_help_shows_every_default():
    ended = run_badly("run")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 2
    shown = " ".join(run_badly("run", "--help").stdout.split())
    assert "--workers VALUE Number of processes that upload, 1 to 64. [4]" in shown
    assert "--fingerprint VALUE" in shown


def test_port_that_is_taken_is_one_clear_line_and_exit_2(watch_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environ = {"BUCKET_NAME": "dumps", "METRICS_ADDRESS": "127.0.0.1", "METRICS_PORT": port}
        ended = run_badly("run", str(watch_dir), **environ)
    assert ended.returncode == 2
    assert f"METRICS_PORT={port}" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_fresh_dump_goes_up_before_the_old_ones_that_wait(seaweed, bucket, watch_dir, tmp_path):
    old = names(0, 600)
    for name in old:
        put_dump(watch_dir, name, b"old")
        os.utime(watch_dir / name, (1_700_000_000, 1_700_000_000))
    fresh = "core-fresh-1800000000-1-11.gz"
    with (
        slow_proxy(seaweed.endpoint, 20_000) as endpoint,
        running(watch_dir, seaweed.environ() | {"AWS_ENDPOINT_URL_S3": endpoint}, tmp_path) as collector,
    ):
        put_dump(watch_dir, fresh)
        wait_until(lambda: not (watch_dir / fresh).exists(), 60, "the fresh dump to go")
        left = len(list(watch_dir.glob("core-app-*")))
        collector.kill()
    assert left > 300

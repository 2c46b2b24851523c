"""The main job, whole: a process crashes, its core goes through kernel, helper, collector and store."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess

import pytest
from tests.kernel.conftest import backtrace
from tests.support import s3
from tests.support.collector import running, wait_until

NAMES = [b"", b"a b", b"a/b", b"$(touch zq)", b";id", b"a\nb", b"\xff\xfe", b"-rf", b"..", b"plain"]


def ours(node, bucket):
    """Return the keys of this test's crashes."""
    return [key for key in s3.keys_in(bucket) if node.is_ours(key.rpartition("/")[2].removesuffix(".json"))]


@pytest.fixture
def collected(node, seaweed, bucket, tmp_path):
    """A node with helper and collector; call `arrived(n)` to get the keys once n dumps are in the bucket."""
    with running(node.watch_dir, seaweed.environ(), tmp_path):

        def arrived(count):
            def all_there():
                return len(ours(node, bucket)) >= 2 * count and node.names() == []

            wait_until(all_there, 60, f"{count} uploads")
            keys = ours(node, bucket)
            assert len(keys) == 2 * count, "a dump and its metadata object each, nothing else"
            return sorted(key for key in keys if key.endswith(".gz"))

        yield arrived


def sidecar_of(bucket, key):
    return json.loads(s3.body_of(bucket, key + ".json"))


def core_of(bucket, key):
    return gzip.decompress(s3.body_of(bucket, key))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGQUIT", "SIGBUS"])
def test_crash_is_in_the_bucket_whole_and_gdb_reads_it(node, bucket, collected, tmp_path, name):
    number = int(signal.Signals[name])
    with node.installed():
        pid = node.crash(number, megabytes=5, threads=2)
    (key,) = collected(1)
    assert key.endswith(f"-{pid}-{number}.gz")
    core, told = core_of(bucket, key), sidecar_of(bucket, key)
    assert told["state"] == "complete"
    assert (told["pid"], told["signal"], told["threads"]) == (pid, number, 3)
    assert told["bytes"] == told["expected_bytes"] == len(core)
    assert told["size_bytes"] == len(s3.body_of(bucket, key))
    assert told["exe"] == str(node.program)
    assert told["sensitive"] is False
    (tmp_path / "core").write_bytes(core)
    trace = backtrace(node.program, tmp_path / "core")
    assert "die_here" in trace
    assert trace.count("wait_for_ever") >= 2


def test_hostile_names_yield_one_object_each_and_no_other_file(node, bucket, collected):
    before = {directory: set(os.listdir(directory)) for directory in ("/", "/tmp", os.getcwd())}
    with node.installed():
        pids = [node.crash(name=name) for name in NAMES]
    keys = collected(len(NAMES))
    assert sorted(sidecar_of(bucket, key)["pid"] for key in keys) == sorted(pids)
    assert all(sidecar_of(bucket, key)["state"] == "complete" for key in keys)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-/") for key in keys)
    for directory, names in before.items():
        new = set(os.listdir(directory)) - names
        assert not {name for name in new if "zq" in name or name.startswith("core")}, directory


def test_process_in_namespaces_of_its_own_is_told_by_both_its_pids(node, bucket, collected):
    script = 'printf inner >/proc/sys/kernel/hostname; "$@"; :'
    inside = ("unshare", "--pid", "--mount", "--uts", "--fork", "sh", "-c", script, "sh")
    with node.installed():
        inner_pid = node.crash(before=inside)
    (key,) = collected(1)
    told = sidecar_of(bucket, key)
    assert (told["ns_pid"], told["hostname"], told["state"]) == (inner_pid, "inner", "complete")
    assert told["pid"] > inner_pid


def test_dump_cut_short_by_sigkill_is_never_called_whole(node, bucket, collected):
    with node.installed(COMPRESSOR="gzip", BUFFER_BYTES=0):
        command = [node.program, "11", b"cut".hex(), "300", "random", "0"]
        with node.start(*command, name=b"cut", stdout=subprocess.PIPE) as process:
            pid = int(process.stdout.readline())
            partial = None

            def under_way():
                nonlocal partial
                partial = next(iter(node.watch_dir.glob("*.partial")), None)
                return partial is not None and partial.stat().st_size > 1_000_000

            wait_until(under_way, 30, "a dump half written")
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        node.settle()
    (key,) = collected(1)
    told, core = sidecar_of(bucket, key), core_of(bucket, key)
    assert (told["pid"], told["state"], told["truncated"]) == (pid, "truncated", "killed")
    assert len(core) == told["bytes"] < told["expected_bytes"]
    metadata = bucket.head_object(Bucket=s3.BUCKET, Key=key)["Metadata"]
    assert metadata["state"] == "truncated"


def test_uncompressed_dump_stays_uncompressed_into_the_bucket(node, seaweed, bucket, tmp_path):
    """The recipe of docs/operations.md: COMPRESSOR=none on the node, COMPRESS_RAW=false for the collector."""
    environ = seaweed.environ() | {"COMPRESS_RAW": "false"}
    with running(node.watch_dir, environ, tmp_path), node.installed(COMPRESSOR="none"):
        pid = node.crash(megabytes=9)  # large enough for a vital part in front, which raw dumps do not get
        wait_until(lambda: len(ours(node, bucket)) == 2 and node.names() == [], 60, "the upload")
    key, metadata = sorted(ours(node, bucket))
    assert metadata == key + ".json"
    assert key.endswith(f"-{pid}-11")
    core, told = s3.body_of(bucket, key), sidecar_of(bucket, key)
    assert core[:4] == b"\x7fELF"
    assert (told["state"], told["compressor"]) == ("complete", "none")
    assert told["bytes"] == told["expected_bytes"] == told["size_bytes"] == len(core)
    (tmp_path / "core").write_bytes(core)
    assert "die_here" in backtrace(node.program, tmp_path / "core")

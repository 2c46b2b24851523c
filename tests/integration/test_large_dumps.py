"""LARGE_GIB=10: large and many dumps within bounded memory, and a thin uplink. Takes minutes, and disk twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from pathlib import Path

import pytest
from tests.support import s3
from tests.support.collector import descendants, running, wait_until
from tests.support.slow import thin_link

GIB = 1 << 30
LARGE = int(os.environ.get("LARGE_GIB", "0"))
LIMIT = 128 << 20
MOST_RESIDENT = 160 << 20
MEMORY = Path("/sys/fs/cgroup/memory")
pytestmark = [
    pytest.mark.skipif(not LARGE, reason="takes minutes and twice the disk: LARGE_GIB=10"),
    pytest.mark.timeout(1800),
]


def write_gzip(path, size):
    """Write a whole gzip file of about this size that no compressor makes smaller; return its SHA-256."""
    block, digest, written = bytearray(os.urandom(16 << 20)), hashlib.sha256(), 0
    packer = zlib.compressobj(0, zlib.DEFLATED, 31)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        while written < size:
            block[:8] = written.to_bytes(8, "big")
            data = packer.compress(block)
            digest.update(data)
            written += file.write(data)
        data = packer.flush()
        digest.update(data)
        file.write(data)
    partial.rename(path)
    return digest.hexdigest()


def digest_of(client, key):
    digest = hashlib.sha256()
    with contextlib.closing(client.get_object(Bucket=s3.BUCKET, Key=key)["Body"]) as body:
        for piece in body.iter_chunks(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def bytes_stored(client):
    """Return how much of the upload under way the store has."""
    uploads = client.list_multipart_uploads(Bucket=s3.BUCKET).get("Uploads", [])
    pages = client.get_paginator("list_parts")
    return sum(
        part["Size"]
        for upload in uploads
        for page in pages.paginate(Bucket=s3.BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
        for part in page.get("Parts", [])
    )


@contextlib.contextmanager
def memory_limit():
    """Make a memory cgroup, of version 1."""
    if not (MEMORY / "memory.limit_in_bytes").exists():
        pytest.skip("no memory cgroup of version 1")
    group = MEMORY / f"core-dump-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 20)
        group.rmdir()


@contextlib.contextmanager
def confined(group, watch_dir, environ, tmp_path, *flags):
    """Run a collector in a cgroup: moved there before it has loaded anything."""
    with running(watch_dir, environ, tmp_path, *flags, wait=False) as collector:
        (group / "cgroup.procs").write_text(str(collector.process.pid))
        collector.wait_ready()
        yield collector


def peak_resident(collector):
    """Return the largest resident size that any of its processes ever had, in bytes."""
    sizes = [0]
    for pid in [collector.process.pid, *descendants(collector.process.pid)]:
        with contextlib.suppress(OSError, StopIteration), open(f"/proc/{pid}/status") as status:
            sizes.append(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) << 10)
    return max(sizes)


def test_dump_sigkilled_half_way_under_a_memory_limit_arrives_whole(
    seaweed, bucket, watch_dir, tmp_path, record_property
):
    dump = watch_dir / "core-large-1700000000-1-6.gz"
    digest, size = write_gzip(dump, LARGE * GIB), dump.stat().st_size
    began = time.monotonic()
    with memory_limit() as group:
        with confined(group, watch_dir, seaweed.environ(), tmp_path, "--workers", "1") as collector:
            wait_until(lambda: bytes_stored(bucket) > size // 2, 900, "half of it to be stored")
            collector.kill()
        assert dump.exists()
        kept = bytes_stored(bucket)
        with confined(group, watch_dir, seaweed.environ(), tmp_path, "--workers", "1") as collector:
            wait_until(lambda: not dump.exists(), 900, "the rest to be stored")
            wait_until(lambda: collector.metric('core_dump_uploads_total{result="uploaded"}') == 1, 10)
            assert collector.metric("core_dump_pool_rebuilds_total") == 0
            rebuilt = peak_resident(collector)
        oom = (group / "memory.oom_control").read_text()
        record_property(
            "memory.max_usage_in_bytes", (group / "memory.max_usage_in_bytes").read_text().strip()
        )
    record_property("bytes", size)
    record_property("bytes_kept_of_the_first_attempt", kept)
    record_property("seconds", round(time.monotonic() - began))
    record_property("peak_resident", rebuilt)
    assert "oom_kill 0" in oom
    assert kept > size // 2
    assert digest_of(bucket, f"node-1/{dump.name}") == digest
    assert s3.unfinished_multiparts(bucket) == []


def test_thousands_of_small_dumps_and_a_large_one_fit_into_128_mib_with_the_default_workers(
    seaweed, bucket, watch_dir, tmp_path, record_property
):
    write_gzip(watch_dir / "core-large-1700000000-1-6.gz", GIB)
    for number in range(2000):
        path = watch_dir / f"core-small-{1_700_000_001 + number}-{number}-11.gz"
        path.write_bytes(b"\x1f\x8b" + os.urandom(64 << 10))
    with memory_limit() as group:
        with confined(group, watch_dir, seaweed.environ(), tmp_path) as collector:
            wait_until(lambda: not list(watch_dir.glob("core*")), 900, "all to be stored")
            assert collector.metric("core_dump_pool_rebuilds_total") == 0
        oom = (group / "memory.oom_control").read_text()
        record_property("most_bytes", (group / "memory.max_usage_in_bytes").read_text().strip())
    assert "oom_kill 0" in oom


def test_two_dumps_pass_an_uplink_of_40_kilobytes_a_second_once_each(
    seaweed, bucket, watch_dir, tmp_path, record_property
):
    rate, size = 40_000, 1_600_000
    contents = {f"core-slow{number}-1700000001-{number}-11.gz": os.urandom(size - 2) for number in range(2)}
    with thin_link(seaweed.endpoint, rate) as (through, link):
        environ = seaweed.environ() | {"AWS_ENDPOINT_URL_S3": through}
        with running(watch_dir, environ, tmp_path) as collector:
            began = time.monotonic()
            for name, content in contents.items():
                partial = watch_dir / f"{name}.partial"
                partial.write_bytes(b"\x1f\x8b" + content)
                partial.rename(watch_dir / name)
            wait_until(lambda: not list(watch_dir.glob("core*")), 210, "both to be stored")
            record_property("seconds", round(time.monotonic() - began))
            events = {event["event"] for event in collector.log()}
    record_property("bytes_sent", link.moved_bytes)
    assert not events & {"will try again", "a worker process died; another takes its place"}
    assert link.moved_bytes < 2 * size + 40_000, "headers and metadata objects only come on top"
    for name, content in contents.items():
        assert s3.body_of(bucket, f"node-1/{name}") == b"\x1f\x8b" + content


@pytest.mark.parametrize("kind", ["raw sparse core", "gzip"])
def test_memory_is_flat_while_a_large_dump_is_sent(
    seaweed, bucket, watch_dir, tmp_path, kind, record_property
):
    if kind == "gzip":
        dump = watch_dir / "core-large-1700000000-1-6.gz"
        write_gzip(dump, LARGE * GIB * 2 // 5)
    else:
        dump = watch_dir / "core-large-1700000000-1-6"
        with dump.open("wb") as file:
            file.write(b"\x7fELF")
            for number in range(LARGE):
                file.seek(number * GIB * 4 // 5)
                file.write(os.urandom(8 << 20))
            file.truncate(LARGE * GIB * 4 // 5)
    peak, began = 0, time.monotonic()
    with running(watch_dir, seaweed.environ(), tmp_path) as collector:
        while dump.exists():
            peak = max(peak, peak_resident(collector))
            time.sleep(0.2)
            assert time.monotonic() - began < 900
    record_property("peak_resident", peak)
    record_property("seconds", round(time.monotonic() - began))
    assert 0 < peak < MOST_RESIDENT

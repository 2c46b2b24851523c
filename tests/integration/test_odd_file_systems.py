"""Watch directories on file systems that lack something: what is lost is metadata or time, never truth."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess

import pytest
from tests.support import s3
from tests.support.uploads import KEY, NAME, connected, send

from core_dump_collector.jobs import Outcome, Sighting
from core_dump_collector.node import dumpfile

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts, changes owners: needs root: sudo make test"
)
SOMEBODY = 12345


@contextlib.contextmanager
def mounted(kind, directory):
    subprocess.run(["mount", "-t", kind, "none", directory], check=True)
    directory.chmod(0o700)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("ending", ["cut off", "whole"])
def test_abandoned_partial_without_attributes_is_mended_and_said_to_be_salvaged(
    seaweed, bucket, watch_dir, ending
):
    content = os.urandom(300_000)
    packed = gzip.compress(content, 1)
    with mounted("ramfs", watch_dir), connected(seaweed.environ()):
        partial = watch_dir / f"{NAME}.partial"
        partial.write_bytes(packed[:200_000] if ending == "cut off" else packed)
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(partial, "user.coredump.pid", b"1")
        assert dumpfile.salvage(str(watch_dir), partial.name) == NAME
        assert send(watch_dir / NAME).outcome == Outcome.UPLOADED
        assert not (watch_dir / NAME).exists()
    sidecar = json.loads(s3.body_of(bucket, f"{KEY}.json"))
    assert (sidecar["state"], sidecar["truncated"]) == ("truncated", "salvaged")
    mended = gzip.decompress(s3.body_of(bucket, KEY))
    assert content.startswith(mended)
    assert len(mended) > 150_000


def test_whole_dump_without_attributes_is_not_said_to_be_salvaged(seaweed, bucket, watch_dir):
    with mounted("ramfs", watch_dir), connected(seaweed.environ()):
        (watch_dir / NAME).write_bytes(gzip.compress(b"core"))
        assert send(watch_dir / NAME).outcome == Outcome.UPLOADED
    assert json.loads(s3.body_of(bucket, f"{KEY}.json"))["state"] == "complete"


@pytest.mark.parametrize("written_at", [0, 1_700_000_000, 32_503_680_000], ids=["1970", "2023", "3000"])
@pytest.mark.parametrize(("quiet_seconds", "outcome"), [(50, Outcome.BUSY), (70, Outcome.UPLOADED)])
def test_without_a_lease_a_minute_without_writes_makes_a_dump_ready(
    seaweed, bucket, watch_dir, quiet_seconds, outcome, written_at
):
    """A lease on another user's file takes CAP_LEASE; NFS has none either."""
    dump = watch_dir / "core-app-1700000000-42-11"
    dump.write_bytes(b"\x7fELF core")
    dump.chmod(0o644)
    os.utime(dump, (written_at, written_at))
    sighting = Sighting(dump.stat().st_size, dump.stat().st_mtime_ns, quiet_seconds)
    os.chown(watch_dir, SOMEBODY, -1)
    with connected(seaweed.environ()):
        for parent in watch_dir.parents[:-2]:  # all below /tmp: one more where tests run in two processes
            parent.chmod(parent.stat().st_mode | 0o011)
        os.seteuid(SOMEBODY)
        try:
            assert send(dump, sighting).outcome == outcome
        finally:
            os.seteuid(0)
    assert dump.exists() == (outcome == Outcome.BUSY)
    assert (f"{KEY}" in s3.keys_in(bucket)) == (outcome == Outcome.UPLOADED)

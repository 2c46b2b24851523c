"""The helper takes the dump whatever lies in its directory, and follows, overwrites and trusts none of it."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys

import pytest
from tests.support import kernel

CORE = os.urandom(100_000)
NAME = "core-app-1700000000-42-11"


@pytest.fixture
def config(tmp_path, watch_dir):
    """Return a function that writes a helper.conf for `watch_dir`."""

    def write(**settings):
        given = {"WATCH_DIR": watch_dir, "COMPRESSOR": "gzip", "KEEP_FREE_PERCENT": 0} | settings
        return kernel.write_config(tmp_path / "helper.conf", given)

    return write


def start(config, *, pid=42, limit=None, pidfd=""):
    """Run the helper as the kernel does, and return what it logged."""
    arguments = [
        f"-C{config}",
        f"-P{pid}",
        f"-p{pid}",
        "-i",
        "-u0",
        "-g0",
        "-s11",
        "-t1700000000",
        "-c0",
        "-d1",
    ]
    command = [sys.executable, "-IS", kernel.HELPER, *arguments, f"-F{pidfd}", "-hnode", "--", "app"]
    before = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))) if limit else None
    done = subprocess.run(
        command, input=CORE, stderr=subprocess.PIPE, check=False, timeout=60, preexec_fn=before
    )
    return done.stderr.decode()


def dumps(directory):
    return sorted(p.name for p in directory.iterdir() if p.is_file() and not p.is_symlink())


def assert_taken(directory, name=f"{NAME}.gz"):
    assert gzip.decompress((directory / name).read_bytes()) == CORE
    assert (directory / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["lock", "slots", "slot-7"])
def test_state_that_cannot_be_written_costs_no_dump(config, watch_dir, name):
    (watch_dir / ".helper").mkdir(mode=0o700)
    (watch_dir / ".helper" / name).mkdir()
    log = start(config())
    assert ("cannot count rate_limit" if name == "lock" else "MAX_CONCURRENT is off") in log
    assert_taken(watch_dir)


def test_more_slots_than_descriptors_cost_no_dump(config, watch_dir):
    log = start(config(MAX_CONCURRENT=200), limit=100)
    assert "MAX_CONCURRENT is off" in log
    assert_taken(watch_dir)


@pytest.mark.parametrize("pidfd", ["3", "77", "99999999999999999999"])
def test_pidfd_that_is_not_there_costs_no_dump(config, watch_dir, pidfd):
    start(config(), pidfd=pidfd)
    assert_taken(watch_dir)


def test_damaged_record_costs_no_dump(config, watch_dir):
    start(config(RATE_LIMIT="5/600"))
    record = next(path for path in (watch_dir / ".helper").iterdir() if len(path.name) == 24)
    record.write_text("kept=" + "9" * 5000 + "\n")
    start(config(RATE_LIMIT="5/600"))
    assert_taken(watch_dir, f"{NAME}-1.gz")


def test_arguments_cannot_forge_a_log_line(config, watch_dir):
    command = [
        sys.executable,
        "-IS",
        kernel.HELPER,
        f"-C{config()}",
        "-P1\n2",
        "-h\nx",
        "--",
        "a\nFORGED\x1b[2J",
    ]
    done = subprocess.run(command, input=CORE, stderr=subprocess.PIPE, check=False, timeout=60)
    lines = done.stderr.decode().splitlines()
    assert all(line.startswith("core-dump-helper[") for line in lines)
    assert b"\x1b" not in done.stderr
    assert len(dumps(watch_dir)) == 1

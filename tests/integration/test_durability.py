"""A dump survives a power failure: its bytes reach the disk before its name does, and the name before anything else.

strace shows the order of the system calls, whatever the code around them looks like.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
import uuid

import pytest
from tests.cli.conftest import Cli
from tests.helper.conftest import Station
from tests.support.cores import simple

CALLS = "fsync,rename,renameat,renameat2,link,linkat"
NAME = "core-app-1700000000-7-11.gz"

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt-get install strace")


def traced(log, command, **how):
    """Run a command under strace; return its steps: `fsync NAME` and `name OLD NEW`, directories as `.`."""
    words = ["strace", "-f", "-qq", "-y", "-e", f"trace={CALLS}", "-o", str(log), *map(str, command)]
    subprocess.run(words, check=True, capture_output=True, timeout=60, **how)
    steps = []
    for line in log.read_text().splitlines():
        if "__pycache__" in line:  # Python's own
            continue
        if found := re.search(r"fsync\(\d+<([^>]+)>\) += 0$", line):
            steps.append(f"fsync {'.' if os.path.isdir(found[1]) else os.path.basename(found[1])}")
        elif found := re.search(r"(?:rename|link)\w*\(.*?\"([^\"]+)\".*?\"([^\"]+)\".*\) += 0$", line):
            steps.append("name " + " ".join(os.path.basename(name) for name in found.groups()))
    return steps


@pytest.mark.parametrize("compressor", ["gzip", "pigz", "none"])
def test_helper_syncs_the_dump_then_names_it_then_syncs_the_directory(tmp_path, watch_dir, compressor):
    station = Station(tmp_path, watch_dir, {"COMPRESSOR": compressor})
    command = station.command()
    steps = traced(tmp_path / "trace", command, input=simple(bytes(100_000)), env={}, cwd="/")
    name = NAME.removesuffix(".gz") if compressor == "none" else NAME
    assert steps == [f"fsync {name}.partial", f"name {name}.partial {name}", "fsync ."]


def test_salvaged_dump_is_named_and_its_directory_synced(tmp_path, watch_dir):
    (watch_dir / f"{NAME}.partial").write_bytes(gzip.compress(b"core")[:-3])
    code = (
        "import sys; from core_dump_collector.node.dumpfile import salvage; "
        "assert salvage(sys.argv[1], sys.argv[2] + '.partial') == sys.argv[2]"
    )
    steps = traced(tmp_path / "trace", [sys.executable, "-c", code, watch_dir, NAME])
    assert steps == [f"name {NAME}.partial {NAME}", "fsync ."]


@pytest.fixture
def fetched(seaweed, tmp_path):
    """Return the steps of `core-dumps get`; names that carry a mark are shortened."""

    cli = Cli(seaweed, f"t-{uuid.uuid4().hex[:8]}", tmp_path)

    def run(*arguments):
        cli.put(f"node-1/{NAME}", gzip.compress(simple(bytes(100_000))), {"bytes": 100_120})
        command = [sys.executable, "-m", "core_dumps.cli", "get", "7", *arguments]
        steps = traced(tmp_path / "trace", command, env=cli.variables(), cwd=tmp_path)
        return [re.sub(r"\.(\w+)\.[0-9a-f]{12}\.", r".\1.", step) for step in steps]

    return run


def test_fetched_core_is_synced_before_it_has_its_name(fetched):
    assert fetched("-o", "out") == ["fsync .out.core", "name .out.core out", "fsync ."]


def test_fetched_object_is_synced_before_it_replaces_a_file(fetched, tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    steps = fetched("-o", "out", "--keep-compressed", "--force")
    assert steps == ["fsync .out.download", "name .out.download out", "fsync ."]

"""bottlerocket/: its TOML, its bootstrap script, and both ways on this machine's kernel, in namespaces."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest
from tests.support import collector, deploy, kernel, s3

FOLDER = deploy.ROOT / "bottlerocket"
PREPARE = FOLDER / "bootstrap/prepare.sh"
WATCH_DIR = Path("/var/core_dumps")
WAYS = ["file", "dd", "socket"]
APPLICATION_UID = 1234
CONTAINER = """
set -e
mount -t tmpfs none /mnt
mkdir /mnt/dumps
[ ! -d /var/core_dumps ] || mount --bind /var/core_dumps /mnt/dumps
mount -t tmpfs none /var
if [ "$1" = mounted ]; then mkdir /var/core_dumps; mount --move /mnt/dumps /var/core_dumps; fi
shift
ulimit -c unlimited
setpriv --reuid 1234 --regid 1234 --clear-groups "$@" || :
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners, needs root: sudo make test")


def rendered(way):
    return tomllib.loads(deploy.succeed(FOLDER / "render.py", way))["settings"]


def pattern_of(way):
    return rendered(way)["kernel"]["sysctl"]["kernel.core_pattern"]


@pytest.mark.parametrize("way", WAYS)
def test_rendered_toml_holds_only_what_the_node_knows(way):
    settings = rendered(way)
    (bootstrap,) = settings["bootstrap-containers"].values()
    assert set(settings) == {"kernel", "bootstrap-containers"}
    assert set(bootstrap) == {"mode", "essential", "user-data"}
    assert (bootstrap["mode"], bootstrap["essential"]) == ("always", False), "a node boots without"
    script = base64.b64decode(bootstrap["user-data"], validate=True).decode()
    assert script.startswith(f"#!/bin/sh\nset -- {way}\n")


@pytest.mark.parametrize("way", WAYS)
def test_pattern_fits_and_needs_no_quoting(way):
    pattern = pattern_of(way)
    assert len(pattern.encode()) <= deploy.PATTERN_LIMIT
    assert not set(pattern) & set("\"'\\{}")


def test_every_pattern_in_the_repository_fits_into_the_kernels_limit():
    found = {}
    for path in [*deploy.ROOT.glob("*/*"), *deploy.ROOT.glob("*/*/*"), *deploy.ROOT.glob("*.md")]:
        if path.is_file() and path.suffix in {".conf", ".toml", ".md", ".yaml", ".sh"}:
            for match in re.finditer(r'core_pattern"? ?= ?"?([|/@][^"\n`]+)', path.read_text()):
                found[f"{path}: {match[1]}"] = len(match[1].encode())
    assert len(found) >= 3
    assert {where: size for where, size in found.items() if size > deploy.PATTERN_LIMIT} == {}


def test_socket_of_the_pattern_lies_where_the_pod_listens():
    pattern = pattern_of("socket")
    overlay = (deploy.ROOT / "kubernetes/overlays/bottlerocket-socket/receiver.yaml").read_text()
    assert pattern.startswith("@@/")
    assert f"--listen, {pattern[2:]}," in overlay
    assert f"path: {os.path.dirname(pattern[2:])}\n" in overlay


def prepare(tmp_path, way):
    """Run the bootstrap script as the node's user data holds it."""
    script = tmp_path / "user-data"
    script.write_bytes(base64.b64decode(rendered(way)["bootstrap-containers"]["core-dumps"]["user-data"]))
    return deploy.succeed("sh", script, env={"CORE_DUMP_ROOT": str(tmp_path), "PATH": os.environ["PATH"]})


def access(path):
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


@needs_root
@pytest.mark.parametrize(("way", "mode"), [("file", 0o1733), ("dd", 0o700), ("socket", 0o700)])
@pytest.mark.parametrize("wrong", [0o777, 0o2770, 0o6755, 0o1777, 0])
def test_bootstrap_script_makes_the_directory_and_repairs_it(tmp_path, way, mode, wrong):
    (tmp_path / "var").mkdir()
    directory = tmp_path / ("var/core-dump-listener" if way == "socket" else "var/core_dumps")
    assert "repaired" not in prepare(tmp_path, way)
    assert access(directory) == (0, 0, mode)
    os.chown(directory, 1234, 5678)
    directory.chmod(wrong)
    assert f"it had {wrong:o} 1234 5678" in prepare(tmp_path, way)
    assert access(directory) == (0, 0, mode)
    assert "repaired" not in prepare(tmp_path, way)


@needs_root
def test_bootstrap_script_makes_the_directory_below_a_setgid_parent(tmp_path):
    (tmp_path / "var").mkdir()
    os.chown(tmp_path / "var", 0, 5678)
    (tmp_path / "var").chmod(0o2775)
    prepare(tmp_path, "dd")
    assert access(tmp_path / "var/core_dumps") == (0, 0, 0o700)


@needs_root
def test_bootstrap_script_moves_a_file_away_that_has_the_name(tmp_path):
    (tmp_path / "var").mkdir()
    (tmp_path / "var/core_dumps").write_text("mine")
    assert "moved a file away" in prepare(tmp_path, "dd")
    assert access(tmp_path / "var/core_dumps") == (0, 0, 0o700)
    (moved,) = (tmp_path / "var").glob("core_dumps.moved-*")
    assert moved.read_text() == "mine"


@needs_root
def test_bootstrap_script_lets_the_kernel_write_stacks_first_where_it_can(tmp_path):
    (tmp_path / "var").mkdir()
    prepare(tmp_path, "dd")
    sort = tmp_path / "proc/sys/kernel/core_sort_vma"
    assert not sort.exists(), "an older kernel has none"
    sort.parent.mkdir(parents=True)
    sort.write_text("0\n")
    assert "cannot" not in prepare(tmp_path, "dd")
    assert sort.read_text() == "1\n"
    sort.unlink()
    sort.mkdir()
    said = prepare(tmp_path, "dd")
    assert "cannot set kernel.core_sort_vma" in said
    assert "is ready for dd" in said


@pytest.mark.parametrize("way", WAYS)
def test_settings_name_no_sysctl_that_an_older_kernel_refuses(way):
    assert set(rendered(way)["kernel"]["sysctl"]) == {"kernel.core_pattern"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("none", "must be socket, dd or file"),
        ("var missing", "not a bootstrap container?"),
        ("link", "is a symbolic link"),
    ],
)
def test_bootstrap_script_fails_loudly(tmp_path, damage, said):
    if damage != "var missing":
        (tmp_path / "var").mkdir()
    if damage == "link":
        (tmp_path / "var/core_dumps").symlink_to("/tmp")
    way = "pipe" if damage == "none" else "dd"
    environ = {"CORE_DUMP_ROOT": str(tmp_path), "PATH": os.environ["PATH"]}
    done = deploy.run("sh", PREPARE, way, env=environ)
    assert (done.returncode, said in done.stderr) == (1, True)


def test_bootstrap_script_passes_shellcheck():
    deploy.succeed(deploy.tool("shellcheck"), PREPARE)


def test_bootstrap_image_passes_hadolint():
    deploy.succeed(deploy.tool("hadolint"), deploy.ROOT / "bottlerocket/bootstrap/Dockerfile")


@pytest.fixture
def node():
    """Give this machine the directory and the pattern of one way, as a Bottlerocket node gets them."""
    if not kernel.can_crash():
        pytest.skip("sets kernel.core_pattern, needs root: sudo make test")

    @contextlib.contextmanager
    def prepared(way):
        sort = kernel.SORT_VMA.exists() or None  # what the script sets
        with kernel.core_pattern(pattern_of(way), sort_vma=sort):  # alone on this machine from here on
            if WATCH_DIR.exists():
                pytest.skip(f"{WATCH_DIR} exists: this machine uses what the test would make")
            try:
                deploy.succeed(PREPARE, way, env={"CORE_DUMP_ROOT": "/", "PATH": os.environ["PATH"]})
                yield
            finally:
                shutil.rmtree(WATCH_DIR, ignore_errors=True)

    return prepared


@pytest.fixture
def program():
    """A program that anybody may run, outside /var."""
    with tempfile.TemporaryDirectory(prefix="cdh-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield kernel.build(kernel.CRASHER, Path(directory) / "crash", "-pthread")


def start_in_container(program, *, mounted=True):
    """Crash an unprivileged process in mounts and pids of its own."""
    how = "mounted" if mounted else "bare"
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", CONTAINER, "sh", how]
    command += [program, "11", b"crash".hex(), "1", "mixed", "0"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(*processes):
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert b"mount" not in said, said


def dumps():
    return sorted(WATCH_DIR.glob("core-crash-*"))


def capabilities(*names):
    """Run the collector as root with these capabilities only, as its pod has them."""
    kept = ",".join(["-all", *("+" + name for name in names)])
    return ["setpriv", f"--bounding-set={kept}", "--inh-caps=-all", *collector.COMMAND]


def collect(monkeypatch, seaweed, bucket, scratch, count, *names):
    """Upload what lies in the directory; return the sidecars of the dumps by key."""
    monkeypatch.setattr(collector, "COMMAND", capabilities(*names))
    with collector.running(WATCH_DIR, seaweed.environ(), scratch) as daemon:
        collector.wait_until(
            lambda: daemon.metric('core_dump_uploads_total{result="uploaded"}') == count, 60, "uploads"
        )
        assert daemon.stop() == 0
    assert list(WATCH_DIR.glob("core*")) == []
    keys = [key for key in s3.keys_in(bucket) if key.endswith(".gz")]
    return {key: json.loads(s3.body_of(bucket, key + ".json")) for key in keys}


def test_file_way_keeps_the_dumps_of_containers_that_crash_in_one_second(
    node, program, monkeypatch, seaweed, bucket, tmp_path
):
    with node("file"):
        finish(*[start_in_container(program) for _ in range(3)])
        assert len(dumps()) == 3, "one name each: %P is the host's pid"
        assert {(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in dumps()} == {
            (APPLICATION_UID, 0o600)
        }
        sidecars = collect(monkeypatch, seaweed, bucket, tmp_path, 3, "dac_override", "lease")
    assert len(sidecars) == 3
    assert {sidecar["signal"] for sidecar in sidecars.values()} == {11}


def test_file_way_loses_the_dump_of_a_container_without_the_mount(node, program):
    with node("file"):
        finish(start_in_container(program, mounted=False))
        assert dumps() == []


def test_dd_way_takes_dumps_of_containers_without_any_mount(
    node, program, monkeypatch, seaweed, bucket, tmp_path
):
    with node("dd"):
        finish(*[start_in_container(program, mounted=False) for _ in range(3)])
        collector.wait_until(lambda: len(dumps()) == 3, 30, "three dumps")
        assert {path.stat().st_uid for path in dumps()} == {0}
        sidecars = collect(monkeypatch, seaweed, bucket, tmp_path, 3)
    assert len(sidecars) == 3
    for key in sidecars:
        core = s3.body_of(bucket, key)
        assert (
            subprocess.run(["gzip", "-dc"], input=core, capture_output=True, check=True).stdout[:4]
            == b"\x7fELF"
        )

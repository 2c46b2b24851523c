"""configure-host: what it refuses before it touches a host, and what it leaves there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile

import pytest
from tests.support import deploy

from core_dump_collector.errors import ConfigError
from core_dump_collector.node import host

STATE = "var/lib/core-dump-handler"


@pytest.fixture
def root(tmp_path):
    """A host's root as far as configure-host looks at it before it enters."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").touch()
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/core_pattern").touch()
    return tmp_path


def configure(root, result=0, seen=None, monkeypatch=None, **options):
    def run(_, command):
        if seen is not None:
            seen.append((command, sorted(os.listdir(root / STATE))))
        return result

    monkeypatch.setattr(host, "_run_inside", run)
    return host.configure(str(root), source=str(deploy.ROOT), **options)


def test_host_without_proc_is_refused_before_anything_is_written(root):
    (root / "proc/sys/kernel/core_pattern").unlink()
    with pytest.raises(ConfigError, match="/proc does not show the host's kernel"):
        host.configure(str(root), source=str(deploy.ROOT))
    assert not (root / "var").exists()


def test_copy_on_the_host_holds_everything_that_is_installed_and_goes(root, monkeypatch):
    seen = []
    assert configure(root, 1, seen, monkeypatch, options=["--force"]) == 1
    ((command, (copy,)),) = seen
    assert command == ["/bin/sh", f"/{STATE}/{copy}/sysctl/install.sh", "--host", "--force"]
    assert set(host.FOLDERS) == {path.split("/")[0] for path in deploy.PACKAGES}
    assert not (root / STATE).exists()


def test_copy_of_a_killed_run_is_removed_and_one_in_use_is_kept(root, monkeypatch):
    for name in ("install-killed/sysctl", "install-in-use/sysctl"):
        (root / STATE / name).mkdir(parents=True)
    lock = os.open(root / STATE / "install-in-use", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert configure(root, 0, None, monkeypatch, restore=True) == 0
    finally:
        os.close(lock)
    assert os.listdir(root / STATE) == ["install-in-use"]


@pytest.mark.parametrize(("module", "name"), [(os, "listdir"), (fcntl, "flock"), (tempfile, "mkdtemp")])
def test_run_succeeds_when_another_removes_the_directory_at_any_step(root, monkeypatch, module, name):
    (root / STATE / "install-killed/sysctl").mkdir(parents=True)
    act, removed = getattr(module, name), []

    def act_and_remove(*arguments, **options):
        result = act(*arguments, **options)
        if not removed:
            removed.append(name)
            shutil.rmtree(root / STATE)
        return result

    monkeypatch.setattr(module, name, act_and_remove)
    seen = []
    assert configure(root, 0, seen, monkeypatch) == 0
    assert (len(removed), len(seen)) == (1, 1)
    assert not (root / STATE).exists()


def test_image_carries_what_is_copied_and_its_build_may_read_every_source():
    lines = (deploy.ROOT / "collector/Dockerfile").read_text().splitlines()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY ") and "--from" not in line]
    assert {(name, f"{host.SOURCE}/{name}") for name in host.FOLDERS} <= {tuple(words) for words in copied}
    allowed = {
        line[1:] for line in (deploy.ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = {source for *found, _ in copied for source in found}
    assert {source if source in allowed else source.split("/")[0] for source in sources} == allowed

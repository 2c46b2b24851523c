"""REASSERT: the core pattern is given back, three times an hour at most, and never where nobody asked for it."""

from __future__ import annotations

import os
import time

import pytest
from tests.support import deploy

from core_dump_setup import kernel, reassert, systemd
from core_dump_setup.errors import SetupError
from core_dump_setup.files import Tree
from core_dump_setup.release import HELPER

OURS = "|" + HELPER + " -P%P -- %e"
FOREIGN = "|/bin/true %P"


class Host:
    """A host whose kernel is two files."""

    def __init__(self, root):
        self.root, self.sysctl = root, root / "sysctl"
        self.sysctl.mkdir()
        self.set(FOREIGN)
        (self.sysctl / "core_pipe_limit").write_text("16\n")
        self.state("running")

    def set(self, pattern):
        (self.sysctl / "core_pattern").write_text(pattern + "\n")

    def get(self, name="core_pattern"):
        return (self.sysctl / name).read_text().rstrip("\n")

    def state(self, word):
        """Let systemd say that it is running or stopping."""
        systemctl = self.root / "systemctl"
        systemctl.write_text(f"#!/bin/sh\necho {word}\n")
        systemctl.chmod(0o755)

    def switch(self, on):
        tree = Tree(str(self.root))
        reassert.switch(tree, on=on)
        tree.keep()

    def reassert(self):
        reassert.reassert(Tree(str(self.root)), OURS, "0")
        return self.get()


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host(tmp_path)
    monkeypatch.setattr(kernel, "SYSCTL", str(host.sysctl))
    monkeypatch.setattr(systemd, "SYSTEMCTL", str(tmp_path / "systemctl"))
    host.switch(on=True)
    return host


def test_pattern_is_given_back_with_its_limit(host, capsys):
    assert host.reassert() == OURS
    assert host.get("core_pipe_limit") == "0"
    assert FOREIGN in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["core", "|/bin/false", "@@/run/systemd/coredumpd/kernel", ""])
def test_whatever_took_it_loses_it(host, pattern):
    host.set(pattern)
    assert host.reassert() == OURS


def test_fourth_time_within_an_hour_the_other_one_keeps_it(host, monkeypatch):
    for _ in range(3):
        host.set(FOREIGN)
        assert host.reassert() == OURS
    host.set(FOREIGN)
    assert host.reassert() == FOREIGN
    later = time.time() + reassert.WITHIN_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert host.reassert() == OURS


def test_nothing_happens_while_ours_is_in_use(host):
    host.set(OURS)
    for _ in range(5):
        host.reassert()
    assert not (host.root / reassert.TIMES[1:]).exists()


@pytest.mark.parametrize("prevent", [lambda host: host.switch(on=False), lambda host: host.state("stopping")])
def test_nothing_is_given_back_after_deactivation_or_while_the_system_stops(host, prevent):
    prevent(host)
    assert host.reassert() == FOREIGN


def test_system_without_systemd_is_not_stopping(host):
    (host.root / "systemctl").unlink()
    assert host.reassert() == OURS


def test_time_is_noted_before_the_pattern_is_set(host, monkeypatch):
    def refuse(name, value):
        raise SetupError("the kernel refused it")

    monkeypatch.setattr(kernel, "set_value", refuse)
    with pytest.raises(SetupError):
        host.reassert()
    assert (host.root / reassert.TIMES[1:]).read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", []),
        (b"1000\nx\n-5\n" + b"9" * 30 + b"\n1001\n", [1000, 1001]),
        (b"5000\n", []),
        (b"2000\n", [2000]),
        (b"1001\n1002\n1003\n1004\n", [1002, 1003, 1004]),
        (b"\xff\n", []),
    ],
)
def test_damaged_and_old_times_do_not_count(data, found):
    assert reassert.recent(data, 1000.0) == found


def test_units_say_nothing_that_systemd_does_not_know(tmp_path):
    for name in reassert.UNIT_NAMES:
        text = (deploy.ROOT / "sysctl" / name).read_text()
        (tmp_path / name).write_text(
            text.replace("/usr/libexec/core-dump-handler/core-dump-setup", "/bin/true")
        )
    paths = [tmp_path / name for name in reassert.UNIT_NAMES]
    done = deploy.run(deploy.tool("systemd-analyze"), "verify", "--man=no", *paths)
    ours = [line for line in done.stderr.splitlines() if "core-dump" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="installs as root")
@pytest.mark.parametrize("wanted", ["no", "yes"])
def test_installation_starts_the_timer_at_boot_only_if_it_is_wanted(tmp_path, wanted):
    config = tmp_path / "etc/core-dump-handler/helper.conf"
    config.parent.mkdir(parents=True)
    config.write_text(f"REASSERT={wanted}\n")
    deploy.succeed(deploy.ROOT / "sysctl/install.sh", "--root", tmp_path)
    link = tmp_path / reassert.WANTED[1:]
    assert link.is_symlink() is (wanted == "yes")
    deploy.succeed(deploy.ROOT / "sysctl/uninstall.sh", "--root", tmp_path)
    assert not link.is_symlink()

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector.node import corepattern
from core_dump_collector.node.corepattern import Target, is_ours, read, target


@pytest.fixture
def contained(monkeypatch):
    monkeypatch.setattr(corepattern, "is_contained", lambda: True)


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """A helper on this node, with its configuration, that writes to `tmp_path/dumps`."""
    monkeypatch.setattr(corepattern, "is_contained", lambda: False)
    (tmp_path / "dumps").mkdir()
    program = tmp_path / "core-dump-helper"
    program.write_text("#!/bin/true\n")
    program.chmod(0o755)
    (tmp_path / "helper.conf").write_text(f"# where\nWATCH_DIR = {tmp_path}/dumps\n")
    return f"|{program} -C{tmp_path}/helper.conf -P%P -- %e"


def test_helper_that_writes_to_the_watched_directory_leads_here(helper, tmp_path):
    assert target(helper, f"{tmp_path}/dumps/") is Target.HERE


def test_helper_that_is_missing_or_cannot_run_leads_nowhere(helper, tmp_path):
    (tmp_path / "core-dump-helper").chmod(0o644)
    assert target(helper, f"{tmp_path}/dumps") is Target.NO_PROGRAM
    (tmp_path / "core-dump-helper").unlink()
    assert target(helper, f"{tmp_path}/dumps") is Target.NO_PROGRAM


def test_helper_that_writes_elsewhere_is_not_ours(helper, tmp_path):
    (tmp_path / "other").mkdir()
    assert target(helper, f"{tmp_path}/other") is Target.OTHER_DIRECTORY
    (tmp_path / "helper.conf").chmod(0o666)
    assert target(helper, f"{tmp_path}/dumps") is Target.OTHER_DIRECTORY, (
        "the helper ignores what others can change"
    )
    (tmp_path / "helper.conf").chmod(0o644)
    (tmp_path / "helper.conf").write_text("")
    assert target(helper, f"{tmp_path}/dumps") is Target.OTHER_DIRECTORY, "the default is /core_dumps"


def test_socket_of_our_listener_leads_where_the_helper_writes(helper, tmp_path, monkeypatch):
    path = tmp_path / "core-dump-listener" / "kernel"
    monkeypatch.setattr(corepattern, "CONFIG", str(tmp_path / "helper.conf"))
    assert target(f"@@{path}", f"{tmp_path}/dumps") is Target.NO_PROGRAM
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        for at in ("@", "@@"):
            assert target(f"{at}{path}", f"{tmp_path}/dumps") is Target.HERE
        assert target(f"@@{path}", str(tmp_path)) is Target.OTHER_DIRECTORY
    assert target(f"@@{tmp_path}/other/kernel", f"{tmp_path}/dumps") is Target.ELSEWHERE


def test_socket_of_a_listener_in_a_container_is_judged_by_its_name(contained):
    assert target("@@/var/core-dump-listener/kernel", "/core_dumps") is Target.HERE
    assert target("@@/run/systemd/coredumpd/kernel", "/core_dumps") is Target.ELSEWHERE


def test_process_of_this_machine_is_not_contained_and_one_in_its_own_namespaces_is():
    assert corepattern.is_contained() is False or "pid:[4026531836]" not in os.readlink("/proc/self/ns/pid")
    script = (
        "from core_dump_collector.node.corepattern import is_contained as f; import sys; sys.exit(not f())"
    )
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", script]
    if os.geteuid() == 0:
        assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(
    ("pattern", "ours"),
    [
        ("|/usr/libexec/core-dump-handler/core-dump-helper -P%P -- %e", True),
        ("/var/core_dumps/core-%e-%t-%P-%s", True),
        ("/core_dumps/core-%e-%t-%P-%s", True),
        ("|/usr/bin/dd of=/var/core_dumps/core-%e-%t-%P-%s conv=excl", True),
        ("|/usr/bin/dd of=/tmp/core-%e", False),
        ("core", False),
        ("", False),
        ("|/bin/false", False),
        ("|", False),
        ("|  ", False),
        ("/", False),
        ("|/usr/lib/systemd/systemd-coredump %P %u", False),
        ("/var/other/core", False),
        ("|/tmp/evil core-dump-helper", False),
        ("@/run/sock", False),
        ("| ", False),
        ("|\udcff", False),
    ],
)
def test_pattern_is_ours_when_it_leads_here(contained, pattern, ours):
    assert is_ours(pattern, "/core_dumps") is ours


def test_pattern_is_read_without_its_newline(tmp_path):
    (tmp_path / "p").write_text("core\n")
    assert read(str(tmp_path / "p")) == "core"
    assert read(str(tmp_path / "missing")) == ""


@given(st.text(max_size=127) | st.text(max_size=126).map("|".__add__), st.text(max_size=20))
def test_any_pattern_has_an_answer(pattern, directory):
    assert is_ours(pattern, directory) in {True, False}

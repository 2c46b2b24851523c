"""Frames of real crashes, small and large, in namespaces of their own and out of signal handlers."""

import subprocess

import pytest
from tests.kernel.conftest import attributes
from tests.support import kernel
from tests.support.fingerprints import SOURCES

from core_dumps.where import where


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel.build(SOURCES / "bugs.c", tmp_path_factory.mktemp("bugs") / "bugs", "-O2", "-w")


def crash(node, *command):
    """Crash a program; return where it was and its raw frames."""
    subprocess.run(command, check=False, timeout=60, stderr=subprocess.DEVNULL)
    node.settle()
    (dump,) = node.watch_dir.glob("core-bugs-*")
    found = attributes(dump)
    dump.unlink()
    frames = found.get("frames", b"").decode()
    return where(frames), frames


def test_where_is_the_programs_own_function_whatever_the_size_and_the_namespaces(node, program):
    with node.installed():
        small, frames = crash(node, program, "0", "0")
        large, _ = crash(node, program, "0", "20")
        inside, _ = crash(node, "unshare", "--user", "--mount", "--map-root-user", program, "0", "0")
        handled, _ = crash(node, program, "12", "0")
        nothing, _ = crash(node, program, "11", "0")
    assert frames.startswith("~libc.so.6+0x")
    assert small.startswith("length (bugs+0x")
    assert small.endswith(" < parse < main")
    assert small == large
    assert inside.split(" < ")[0].split("(")[-1].startswith("bugs+0x")
    assert handled.startswith("store (bugs+0x")
    assert nothing.startswith("? < call_nothing")

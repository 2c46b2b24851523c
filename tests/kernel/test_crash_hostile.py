"""Containers that lay traps for whoever handles their crash, and file systems with quotas: real crashes."""

import contextlib
import ctypes
import os
import shutil
import stat
import struct
import subprocess
import sys
import time

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.support import kernel
from tests.torture.crashes import compile_crasher

from core_dump_collector.node import dumpfile

OPEN, ACCESS, MODIFY, CREATE, DELETE = 0x20, 0x1, 0x2, 0x100, 0x200
TRAPS = ("usr/bin/pigz", "usr/bin/python3", "usr/local/bin/pigz", "bin/sh", "core-dump-helper")
FILES = (
    "etc/core-dump-handler/helper.conf",
    "etc/passwd",
    "etc/hostname",
    "usr/lib/python3/isal/__init__.py",
)


@contextlib.contextmanager
def touches(root):
    """Yield a function that returns which files below a directory were opened, read, changed or made since."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    names = {}
    for directory, _, _ in os.walk(root):
        mask = OPEN | ACCESS | MODIFY | CREATE | DELETE
        names[libc.inotify_add_watch(watch, os.fsencode(directory), mask)] = directory
    assert -1 not in names

    def read():
        found = set()
        with contextlib.suppress(BlockingIOError):
            data = os.read(watch, 1 << 16)
            while data:
                number, _, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0")
                found.add(os.path.join(names[number], os.fsdecode(name)))
                data = data[16 + length :]
        return found

    try:
        read()  # of our own walk
        yield read
    finally:
        os.close(watch)


@pytest.fixture
def jail(node):
    """The root of a container: a program that crashes, and everything that a handler might open or run."""
    root = node.directory / "jail"
    told = node.directory / "trap"
    for name in (*TRAPS, *FILES, str(node.watch_dir)[1:] + "/trap"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {told}\n" if name in TRAPS else "WATCH_DIR=/\n")
        path.chmod(0o755)
    compile_crasher(root)
    return root


def test_nothing_below_the_root_of_a_container_is_opened_or_run(node, jail):
    inside = ("unshare", "--mount", "--uts", "chroot", jail, "/crasher")
    with node.installed(COMPRESSOR="pigz"):
        command = [*inside, b"app".hex(), "1000000", "7", "11"]
        process = node.start(*command, name=b"app", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        with touches(jail) as touched:
            (jail / "etc/passwd").read_bytes()
            assert touched() == {str(jail / "etc/passwd")}, "the watch sees an access"
            process.communicate()
            node.settle()
            assert touched() == set()
    assert not (node.directory / "trap").exists()
    found = attributes(node.dump())
    assert found["exe"] == os.fsencode(jail / "crasher")
    assert found["compressor"] == b"pigz"
    assert core_of(node.dump()).startswith(b"\x7fELF")


@contextlib.contextmanager
def quota(node):
    """Put the watch directory on Btrfs with a quota, which holds for root too."""
    image = node.directory / "image"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    for command in (
        ["mkfs.btrfs", "-q", image],
        ["mount", "-o", "loop", image, node.watch_dir],
        ["btrfs", "quota", "enable", node.watch_dir],
        ["btrfs", "qgroup", "limit", "12M", "0/5", node.watch_dir],
    ):
        subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", node.watch_dir], check=True)


@pytest.mark.skipif(not shutil.which("btrfs"), reason="needs btrfs-progs")
@pytest.mark.parametrize("compressor", ["gzip", "pigz"])
def test_quota_that_is_used_up_leaves_a_flagged_dump_and_holds_nobody(node, compressor, record_property):
    with node.installed(COMPRESSOR=compressor, BUFFER_BYTES=0, DEADLINE_SECONDS=10), quota(node):
        began = time.monotonic()
        node.crash_only(megabytes=48, kind="random")
        held = time.monotonic() - began
        node.settle()
        status = node.dump().stat()
        flagged = attributes(node.dump()).get("truncated") or status.st_mode & stat.S_ISVTX
        with pytest.raises(OSError, match="quota"):
            dumpfile.salvage(str(node.watch_dir), node.dump().name)
        subprocess.run(["btrfs", "qgroup", "limit", "none", "0/5", node.watch_dir], check=True)
        salvaged = dumpfile.salvage(str(node.watch_dir), node.dump().name)
    record_property("held_seconds", round(held, 2))
    assert held < 8
    assert 0 < status.st_size < 20 << 20
    assert flagged, "there may be no room for attributes either"
    assert salvaged.endswith("-11.gz")


def test_no_descriptors_left_lets_the_process_go_at_once(node, record_property):
    launcher = node.directory / "launcher"
    with node.installed(COMPRESSOR="gzip"):
        installed = kernel.PATTERN.read_text().split()[0][1:]
        launcher.write_text(
            f"#!{sys.executable} -IS\nimport os, resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n"
            f"os.execv({installed!r}, sys.argv)\n"
        )
        launcher.chmod(0o755)
        kernel.PATTERN.write_text(f"|{launcher} {kernel.ARGUMENTS}\n")
        began = time.monotonic()
        node.crash_only(megabytes=48)
        held = time.monotonic() - began
        node.settle()
    record_property("held_seconds", round(held, 2))
    assert held < 5
    assert node.names() == []

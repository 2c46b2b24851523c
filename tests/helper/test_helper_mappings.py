"""Which pages of files are read: those of file systems that the host has mounted, and that no program serves."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from core_dump_helper import mappings
from core_dump_helper.crash import parse_arguments
from core_dump_helper.mappings import NO_FILE, Mappings, local_devices, mounted_devices, read_mounts
from core_dump_helper.memory import open_memory

PAGE = 4096
CRASH = parse_arguments([f"-P{os.getpid()}", "--", "app"])


@pytest.fixture(params=["query", "maps"])
def way(request, monkeypatch):
    """Use the query of new kernels, or the text that all kernels have."""
    if request.param == "maps":
        monkeypatch.setattr(mappings, "PROCMAP_QUERY", 0xC0686699)


@pytest.fixture
def file(tmp_path):
    """The address of three pages of a file with a hostile name, of which the second one was written."""
    (tmp_path / "a 00:00 0\nb\r0-ffffffffffffffff r--p 0 00:00 0").write_bytes(b"f" * 3 * PAGE)
    with open(tmp_path / "a 00:00 0\nb\r0-ffffffffffffffff r--p 0 00:00 0", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    assert mapped[0] == mapped[2 * PAGE] == ord("f")
    mapped[PAGE] = ord("w")
    view = ctypes.c_char.from_buffer(mapped)
    yield ctypes.addressof(view)
    del view


@pytest.fixture
def own():
    directory = os.open("/proc/self", os.O_RDONLY)
    yield directory
    os.close(directory)


def open_own():
    with open("/proc/self/auxv", "rb") as vector:
        return open_memory(CRASH, vector.read())


@pytest.mark.usefixtures("way")
def test_file_of_a_mounted_file_system_is_read(file):
    memory = open_own()
    parts = list(memory.resident(file, file + 3 * PAGE))
    assert (parts[0][0], parts[-1][1]) == (file, file + 3 * PAGE)
    assert sum(end - start for start, end in parts) == 3 * PAGE
    assert memory.refused == 0
    memory.close()


@pytest.mark.usefixtures("way")
def test_only_written_pages_are_read_of_a_file_system_that_the_host_has_not_mounted(file, monkeypatch):
    monkeypatch.setattr(mappings, "mounted_devices", lambda *_: {(1, 2)})
    memory = open_own()
    assert list(memory.resident(file, file + 3 * PAGE)) == [(file + PAGE, file + 2 * PAGE)]
    assert memory.refused == 2
    assert memory.read(file, 8) == memory.read(file + PAGE - 8, 16) == b""
    assert memory.read(file + PAGE, 1) == b"w"
    memory.close()


@pytest.mark.usefixtures("way")
def test_memory_of_no_file_and_shared_memory_is_read(monkeypatch):
    shared, private = mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared[0] = private[0] = 1
    views = [ctypes.c_char.from_buffer(each) for each in (shared, private)]
    memory = open_own()
    for view in views:
        assert memory.read(ctypes.addressof(view), 1) == b"\1"
    memory.close()
    del view, views


@pytest.mark.usefixtures("way")
def test_range_that_begins_in_a_trusted_mapping_ends_with_it(file, own, monkeypatch):
    kept = Mappings(own)
    end = kept.trusted_until(file)
    assert end == kept.trusted_until(file + PAGE) >= file + 3 * PAGE
    assert kept.trusted_until(0) in {0, 1}
    monkeypatch.setattr(mappings, "mounted_devices", lambda *_: set())
    assert Mappings(own).trusted_until(file) == 0


def test_mounts_of_fuse_are_not_trusted(monkeypatch):
    lines = b"""\
1 0 253:0 / / rw shared:1 - ext4 /dev/vda rw
2 1 0:40 / /a\\040b rw - fuse.sshfs me@host:/ rw
3 1 0:41 / /b rw - fuse file rw
4 1 8:1 / /c rw - fuseblk /dev/sda1 rw
5 1 0:42 / /run/c/rootfs rw,relatime shared:2 master:1 - overlay overlay rw,lowerdir=/x
damaged
"""
    monkeypatch.setattr(mappings, "read_file", lambda *_: lines)
    found = mounted_devices(read_mounts())
    assert {(253, 0), (0, 42)} <= found
    assert not {(0, 40), (0, 41), (8, 1), NO_FILE} & found


MOUNTS = b"""\
1 0 253:0 / / rw shared:1 - ext4 /dev/vda rw
2 1 0:42 / /run/c/rootfs rw - overlay overlay rw,lowerdir=/x
3 1 0:43 / /n rw - nfs4 server:/ rw
4 1 0:44 / /sys/fs/fuse/connections rw - fusectl fusectl rw
5 1 253:0 / /again rw - ext4 /dev/vda rw
"""


@pytest.mark.parametrize("served", ["", "fuse", "fuse.sshfs", "fuseblk"])
def test_overlay_is_local_only_where_no_program_serves_a_file_system(monkeypatch, served):
    more = f"6 1 0:45 / /f rw - {served} me@host:/ rw\n".encode() if served else b""
    monkeypatch.setattr(mappings, "read_file", lambda *_: MOUNTS + more)
    assert local_devices(read_mounts()) == {(253, 0)} | (set() if served else {(0, 42)})


@pytest.mark.usefixtures("way")
def test_mapping_of_a_local_file_is_told_from_others(file, own):
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(memory)
    kept = Mappings(own)
    assert kept.local_until(file + PAGE) >= file + 3 * PAGE
    assert kept.local_until(ctypes.addressof(view)) == kept.local_until(0) == 0
    kept.close()
    del view


def test_both_ways_name_the_same_device(file, own, monkeypatch):
    found = Mappings(own)._find(file)
    monkeypatch.setattr(mappings, "PROCMAP_QUERY", 0xC0686699)
    assert Mappings(own)._find(file) == found
    status = os.stat(sys.executable)
    assert found[1] != NO_FILE
    assert (os.major(status.st_dev), os.minor(status.st_dev)) in mounted_devices(read_mounts())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, needs root: sudo make test")
@pytest.mark.parametrize(
    ("namespaces", "trusted"), [(["--mount"], True), (["--mount", "--user", "-r"], False)]
)
def test_mount_in_another_namespace_is_trusted_if_that_took_root(tmp_path, namespaces, trusted):
    mounted = f"mount -t tmpfs none {tmp_path} && cp /bin/sleep {tmp_path} && echo ready"
    command = ["unshare", *namespaces, "sh", "-c", f"{mounted} && exec {tmp_path}/sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        lines = []
        while not lines:  # until exec
            with open(f"/proc/{other.pid}/maps") as file:
                lines = [line for line in file if line.endswith(f"{tmp_path}/sleep\n")]
        directory = os.open(f"/proc/{other.pid}", os.O_RDONLY)
        kept = Mappings(directory)
        assert bool(kept.trusted_until(int(lines[0].split("-")[0], 16))) == trusted
        kept.close()
        os.close(directory)
        other.kill()

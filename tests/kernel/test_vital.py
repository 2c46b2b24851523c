"""Large dumps through the real kernel: the vital part first, everything else behind it, nothing else changed."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.support import kernel
from tests.support.collector import wait_until
from tests.support.corepair import CoreFile, assert_same_memory

from core_dump_collector.s3 import ordering
from core_dump_format.gzip import inflate_until_damage

SOURCE = Path(__file__).parents[1] / "support" / "vital.c"
THREADS = 8


def backtraces(program, core):
    """Return gdb's backtrace of every thread; its remarks about the file itself go elsewhere."""
    command = ["gdb", "-nx", "--batch", "-ex", "thread apply all bt", program, core]
    done = subprocess.run(command, capture_output=True, timeout=100, check=True)
    return done.stdout.decode(errors="replace")


def vital_core(path):
    """Return the core in the first gzip member of a dump, after verifying its attributes."""
    found, content = attributes(path), path.read_bytes()
    member = content[: int(found["vital_bytes"])]
    assert zlib.crc32(member) == int(found["vital_crc32"])
    stream = zlib.decompressobj(31)
    core = stream.decompress(member)
    assert stream.eof
    assert stream.unused_data == b""
    return core


def assert_every_cut_gives_the_backtraces(node, program, read=backtraces):
    """Compare the backtraces of the whole dump with those of its vital part alone and of its half; return them."""
    whole, vital = core_of(node.dump()), vital_core(node.dump())
    assert whole.startswith(vital)
    core = node.directory / "core"
    core.write_bytes(whole)
    assert CoreFile(core).vital_end() == len(vital)
    told = read(program, core)
    try:
        for size in (len(whole) // 2, len(vital)):
            os.truncate(core, size)
            assert read(program, core) == told
    finally:
        core.write_bytes(whole)
    return told


@pytest.fixture
def program(node):
    return kernel.build(SOURCE, node.directory / "vital", "-pthread")


def die(node, program, *arguments):
    """Run the program to its end, and wait until its dump is published."""
    process = node.start(program, *arguments, name=b"vital")
    process.wait(timeout=60)
    wait_until(lambda: any(not name.endswith(".partial") for name in node.names()), 60, "the dump")
    node.settle()


def test_every_thread_has_its_backtrace_wherever_the_dump_is_cut(node, program):
    with node.installed():
        node.keep_copy()
        die(node, program, "24", str(THREADS))
    found = attributes(node.dump())
    assert found["vital"] == b"whole"
    assert found["bytes"] == found["expected_bytes"]
    assert "truncated" not in found
    told = assert_every_cut_gives_the_backtraces(node, program)
    assert told.count("die_here (") > 20
    assert told.count("wait_for_ever (") >= THREADS
    assert_same_memory(node.directory / "copy", node.directory / "core")


@pytest.mark.parametrize("compressor", ["pigz", "isal", "gzip", "none"])
def test_each_compressor_writes_the_same_memory(node, program, compressor):
    pytest.importorskip("isal")
    path = Path(sys.modules["isal"].__file__).parents[1]
    with node.installed(COMPRESSOR=compressor, PYTHON_PATH=path):
        node.keep_copy()
        die(node, program, "24", "2")
    found, core = attributes(node.dump()), node.directory / "core"
    content = node.dump().read_bytes() if compressor == "none" else core_of(node.dump())
    core.write_bytes(content)
    assert found["vital"] == b"whole"
    assert found["compressor"].decode() == compressor
    assert ("vital_bytes" in found) == (compressor != "none")
    assert len(content) == int(found["bytes"]) == int(found["expected_bytes"])
    assert_same_memory(node.directory / "copy", core)


@pytest.mark.parametrize("hostile", ["leader", "pages", "nowhere", "libraries"])
def test_hostile_process_is_dumped_whole(node, program, hostile):
    with node.installed(COMPRESSOR="gzip"):
        node.keep_copy()
        die(node, program, "12", "3", hostile)
    found, core = attributes(node.dump()), node.directory / "core"
    core.write_bytes(core_of(node.dump()))
    assert found["vital"] == b"whole"
    assert found["bytes"] == found["expected_bytes"]
    assert_same_memory(node.directory / "copy", core)
    vital = vital_core(node.dump())
    assert b"u" * 4096 not in vital
    if hostile != "nowhere":
        told = assert_every_cut_gives_the_backtraces(node, program)
        assert told.count("die_here (") > 20


def test_process_in_its_own_namespaces_has_its_vital_part(node, program):
    inside = ("unshare", "--pid", "--mount", "--uts", "--fork", "sh", "-c", '"$@"; :', "sh")
    with node.installed(COMPRESSOR="gzip"):
        node.expect(b"vital", 2)
        subprocess.run([*inside, program, "12", "3"], check=False, timeout=60)
        node.settle()
    assert attributes(node.dump())["vital"] == b"whole"
    assert assert_every_cut_gives_the_backtraces(node, program).count("die_here (") > 20


def test_dump_cut_by_a_limit_has_every_backtrace(node, program):
    with node.installed(COMPRESSOR="gzip", MAX_DUMP_BYTES=4 << 20):
        die(node, program, "24", str(THREADS))
    found = attributes(node.dump())
    assert (found["truncated"], found["vital"], found["bytes"]) == (b"max_dump_bytes", b"whole", b"4194304")
    core = node.directory / "core"
    core.write_bytes(core_of(node.dump()))
    told = backtraces(program, core)
    assert told.count("die_here (") > 20
    assert told.count("wait_for_ever (") >= THREADS


def test_helper_killed_half_way_leaves_a_partial_with_its_vital_part(node, program):
    with node.installed(COMPRESSOR="gzip", LEVEL=9, BUFFER_BYTES=0):
        process = node.start(program, "200", str(THREADS), name=b"vital")
        wait_until(lambda: node.names() and "vital_bytes" in attributes(node.dump()), 60, "the vital part")
        wait_until(lambda: node.dump().stat().st_size > 4 << 20, 60, "some of the rest")
        for helper in node.helpers():
            os.kill(helper, signal.SIGKILL)
        process.wait(timeout=60)
        node.settle()
    assert node.dump().name.endswith(".partial")
    assert attributes(node.dump())["vital"] == b"whole"
    vital = vital_core(node.dump())
    salvaged = b"".join(inflate_until_damage([node.dump().read_bytes()]))
    assert salvaged.startswith(vital)
    assert len(salvaged) > len(vital)
    core = node.directory / "core"
    core.write_bytes(vital)
    told = backtraces(program, core)
    assert told.count("die_here (") > 20
    assert told.count("wait_for_ever (") >= THREADS


def test_without_a_vital_part_the_core_is_byte_for_byte_the_kernels(node, program):
    with node.installed(COMPRESSOR="gzip", VITAL_BYTES=0):
        node.keep_copy()
        die(node, program, "12", "1")
    found = attributes(node.dump())
    assert found["vital"] == b"none"
    assert "vital_bytes" not in found
    assert core_of(node.dump()) == (node.directory / "copy").read_bytes()


def modules(core):
    """Return the modules that elfutils finds in a core."""
    told = subprocess.run(["eu-unstrip", "-n", "--core", core], capture_output=True, text=True, check=False)
    return sorted(line.split()[-1] for line in told.stdout.splitlines())


@pytest.mark.skipif(not kernel.SORT_VMA.exists(), reason="kernel.core_sort_vma is in Linux 6.15 and later")
def test_core_that_the_kernel_has_sorted_by_size_is_written_by_address(node, program):
    with node.installed(sort_vma=True, COMPRESSOR="gzip"):
        node.keep_copy()
        die(node, program, "12", "3")
    copy, helpers, collectors = (node.directory / name for name in ("copy", "core", "ordered"))
    addresses = [row.address for row in CoreFile(copy).loads]
    assert addresses != sorted(addresses)
    helpers.write_bytes(core_of(node.dump()))
    with copy.open("rb") as file:
        ordered = ordering.order(file.fileno(), copy.stat().st_size)
        collectors.write_bytes(gzip.decompress(b"".join(ordered.compressed())))
    assert_same_memory(copy, helpers)
    assert_same_memory(copy, collectors)
    if shutil.which("eu-unstrip"):
        found = modules(helpers)
        assert found == modules(collectors)
        assert "libc.so.6" in found
        assert len(found) > len(modules(copy)), "elfutils reads ascending addresses only"


FORKED = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static char line[4096], path[4096];
int main(void) {
    memset(malloc(20 << 20), 'x', 20 << 20);
    unsigned long start, places[2] = {0, 0};
    unsigned offset;
    FILE *maps = fopen("/proc/self/maps", "r");
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    while (fgets(line, sizeof line, maps)) {
        path[0] = 0;
        sscanf(line, "%lx-%*x %*s %x %*s %*s %s", &start, &offset, path);
        if (offset == 0 && (strstr(path, "/libc.so") || strstr(path, "forked")))
            places[!strstr(path, "forked")] = start;
    }
    printf("%lx %lx ", places[0], places[1]);
    fflush(stdout);
    for (int i = 0; i < 2; i++)
        madvise((void *)places[i], 4096, MADV_DONTNEED);
    for (int i = 0; i < 2; i++) {
        uint64_t entry = 0;
        pread(pagemap, &entry, 8, places[i] / 4096 * 8);
        write(1, entry >> 63 ? "p" : "a", 1);
    }
    kill(getpid(), SIGSEGV);
}
"""
"""A process as fork(2) leaves it: it has not touched the first pages of its program and of the C library."""


def test_first_page_of_a_library_is_vital_even_where_a_forked_process_has_not_touched_it(node):
    """It has the build ID, and the program's has the way to the loader's list."""
    (node.directory / "forked.c").write_text(FORKED)
    program = kernel.build(node.directory / "forked.c", node.directory / "forked", "-Wl,-z,now")
    with node.installed(COMPRESSOR="gzip"):
        process = node.start(program, name=b"forked", stdout=subprocess.PIPE)
        first, second, absent = process.communicate(timeout=60)[0].split()
        wait_until(node.has_dump, 60, "the dump")
    assert absent == b"aa", "as it should be"
    vital = vital_core(node.dump())
    (node.directory / "core").write_bytes(core_of(node.dump()))
    rows = {row.address: row for row in CoreFile(node.directory / "core").loads}
    for row in (rows[int(first, 16)], rows[int(second, 16)]):
        assert vital[row.offset : row.offset + 4] == b"\x7fELF"

"""Memory that is a trap for who reads it, for real: the dump is complete, and the helper waits for nobody."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital import backtraces, vital_core
from tests.support import kernel
from tests.support.cleanup import guardian
from tests.support.collector import wait_until
from tests.support.corepair import differing_segments

SUPPORT = Path(__file__).parents[1] / "support"
PAGE = 4096


@pytest.fixture
def hazards(node):
    return kernel.build(SUPPORT / "hazards.c", node.directory / "hazards", "-pthread")


@pytest.fixture
def served(node):
    """A file of a file system that the test serves, and a function that sends it a command."""
    program = kernel.build(SUPPORT / "fusefile.c", node.directory / "fusefile")
    mounted = node.directory / "served"
    mounted.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([program, mounted, str(3 * PAGE)], **pipes) as server:

        def send(word):
            server.stdin.write(word + "\n")
            server.stdin.flush()
            assert server.stdout.readline() == word + "\n"

        try:
            assert server.stdout.readline() == "mounted\n"
            yield mounted / "file", send
        finally:
            server.kill()
            subprocess.run(["umount", "-l", mounted], check=False)


def begin(node, program, *arguments):
    """Start the program; return it as soon as its traps are set."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = node.start(program, *arguments, name=b"hazards", **pipes)
    told = []
    for line in process.stdout:
        if line == "ready\n":
            return process, told
        told.append(line)
    raise AssertionError(told)


def published(node):
    return any(not name.endswith(".partial") for name in node.names())


@contextlib.contextmanager
def log_of(process):
    """Yield a list that will hold the helper's lines about a process."""
    lines = []
    yield lines
    found = subprocess.check_output(["dmesg"], text=True, errors="replace").splitlines()
    lines.extend(line for line in found if f"rocess {process.pid} " in line)


def test_traps_in_memory_leave_the_dump_complete_and_its_backtraces_first(node, hazards):
    with node.installed(COMPRESSOR="gzip"):
        node.keep_copy()
        process, told = begin(node, hazards, "9")
        process.communicate(timeout=60)
        wait_until(lambda: published(node), 60, "the dump")
        node.settle()
    found, core = attributes(node.dump()), node.directory / "core"
    core.write_bytes(core_of(node.dump()))
    assert not told, "this kernel has all of them"
    assert found["vital"] == b"whole"
    assert found["bytes"] == found["expected_bytes"]
    changed = differing_segments(node.directory / "copy", core)
    assert {row.memory for row in changed} <= {1 << 20}, "the stack that another process changes"
    vital = vital_core(node.dump())
    assert b"s" * 64 not in vital
    assert b"g" * PAGE in vital
    core.write_bytes(vital)
    assert backtraces(hazards, core).count("die_here (") >= 11


def test_pages_of_a_file_system_that_the_process_serves_are_not_read(node, hazards, served):
    file, _ = served
    with node.installed(COMPRESSOR="gzip"):
        process, told = begin(node, hazards, "9", file)
        assert told == ["read F\n"]
        with log_of(process) as log:
            process.communicate(timeout=60)
            wait_until(lambda: published(node), 60, "the dump")
            node.settle()
    found = attributes(node.dump())
    assert found["bytes"] == found["expected_bytes"]
    assert found["vital"] == b"partial"
    assert any("1 pages belong to a file system that may never answer" in line for line in log), log
    vital = vital_core(node.dump())
    assert b"F" * PAGE not in vital
    assert b"w" * PAGE in vital, "a page that was written is memory, not the file's"
    assert core_of(node.dump()).count(b"F" * PAGE) == 2


def test_file_system_that_never_answers_the_kernel_holds_the_helper_until_the_deadline_only(
    node, hazards, served
):
    file, send = served
    with node.installed(COMPRESSOR="gzip", DEADLINE_SECONDS=2):
        process, _ = begin(node, hazards, "9", file)
        send("silent")
        send("withdraw")
        process.stdin.close()
        wait_until(lambda: published(node), 60, "the dump")
        node.settle()
        assert process.poll() is None, "the kernel waits for the page"
    found = attributes(node.dump())
    assert (found["truncated"], found["vital"]) == (b"deadline", b"whole"), "the absent page is not vital"
    core = node.directory / "core"
    core.write_bytes(vital_core(node.dump()))
    assert backtraces(hazards, core).count("die_here (") >= 11


@pytest.fixture
def million_mappings():
    """Let a process have so many."""
    limit = Path("/proc/sys/vm/max_map_count")
    before = limit.read_text()
    with guardian(kernel.RESTORE, str(limit), before):
        limit.write_text("1100000\n")
        yield 1_000_000


@pytest.mark.skipif("PROGRAMS" not in os.environ, reason="makes a million mappings: make test-programs")
@pytest.mark.timeout(300)
def test_a_million_segments_cost_the_order_and_neither_the_dump_nor_memory(node, million_mappings):
    program = node.directory / "maps"
    subprocess.run(["g++", "-g", "-O1", "-w", "-o", program, SUPPORT / "maps.cpp"], check=True)
    peak = 0
    with node.installed(COMPRESSOR="gzip", BUFFER_BYTES=0):
        process = node.start(program, str(million_mappings), "0", name=b"maps")
        while process.poll() is None or node.helpers():
            for pid in node.helpers():
                with contextlib.suppress(OSError):
                    told = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()
                    peak = max(peak, int(told[0]) if told else 0)
    found = attributes(node.dump())
    assert found["vital"] == b"none"
    assert found["bytes"] == found["expected_bytes"]
    assert int(found["bytes"]) > 56 * million_mappings
    assert int(found["duration_ms"]) < 60_000
    assert 0 < peak < 512 << 10, "KiB"

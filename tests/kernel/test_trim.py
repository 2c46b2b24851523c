"""Trimmed dumps through the real kernel: every backtrace, no byte wrong, nothing missing without a word."""

import os
import subprocess

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital import SOURCE, backtraces, die, vital_core
from tests.support import kernel
from tests.support.corepair import CoreFile
from tests.support.trimmed import assert_trimmed, dropped_ranges

MIB = 1 << 20


@pytest.fixture
def program(node):
    return kernel.build(SOURCE, node.directory / "vital", "-pthread")


def unpack(node):
    core = node.directory / "core"
    core.write_bytes(core_of(node.dump()))
    return core


def assert_is_trimmed(node, reason):
    """Check the attributes of a trimmed dump; return its core."""
    found, core = attributes(node.dump()), unpack(node)
    assert (found["trimmed"], found["truncated"], found["vital"]) == (reason, b"max_dump_bytes", b"whole")
    assert found["bytes"] == found["expected_bytes"] == b"%d" % core.stat().st_size
    dropped = dropped_ranges(CoreFile(core))
    assert found["dropped_bytes"] == b"%d" % sum(end - start for start, end in dropped)
    assert core.read_bytes().startswith(vital_core(node.dump()))
    return core


def assert_same_backtraces(node, program, core):
    """Compare the backtraces of a trimmed dump, and of its vital part, with those of the kernel's own core."""
    told = backtraces(program, node.directory / "copy")
    assert backtraces(program, core) == told
    size = len(vital_core(node.dump()))
    os.truncate(core, size)
    assert backtraces(program, core) == told
    assert told.count("die_here (") > 20


def ask_gdb(program, core, *expressions):
    """Return what gdb prints for all expressions, values and errors."""
    commands = [word for text in expressions for word in ("-ex", f"print/x {text}")]
    command = ["gdb", "-nx", "--batch", *commands, program, core]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    return done.stdout + done.stderr


@pytest.mark.parametrize("megabytes", [1, 16])
def test_trimmed_dump_has_every_backtrace_and_says_what_is_missing(node, program, megabytes):
    with node.installed(COMPRESSOR="gzip", TRIM_ABOVE_BYTES=1, TRIM_BUDGET_BYTES=megabytes * MIB):
        node.keep_copy()
        die(node, program, "24", "8", "zeros")
    core = assert_is_trimmed(node, b"trim_above_bytes")
    held = assert_trimmed(node.directory / "copy", core)
    assert 0.7 * megabytes * MIB < held <= megabytes * MIB + 65536
    told = ask_gdb(program, core, "zeros[4096]@16", "heap[1 << 21]", "shared[65536]", "zeros[0]")
    assert "= {0x0 <repeats 16 times>}" in told, "untouched: zeros, as they were"
    assert told.count("Cannot access memory at address") == 2, "heap and shared memory"
    assert " = 0x7a\n" in told, "the only page of its mapping"
    assert_same_backtraces(node, program, core)


def test_limit_is_a_budget_of_the_whole_dump(node, program):
    with node.installed(COMPRESSOR="gzip", MAX_DUMP_BYTES=2 * MIB):
        node.keep_copy()
        die(node, program, "24", "8")
    core = assert_is_trimmed(node, b"max_dump_bytes")
    assert 1.7 * MIB < core.stat().st_size <= 2 * MIB
    assert_trimmed(node.directory / "copy", core)
    assert_same_backtraces(node, program, core)


@pytest.mark.parametrize("pipe_limit", [0, 4])
def test_process_whose_dump_is_trimmed_is_released_at_once_and_was_dumped(node, program, pipe_limit):
    """A core that the helper would need seconds for: its writer is slowed by the compressor."""
    settings = {"COMPRESSOR": "gzip", "LEVEL": 9, "BUFFER_BYTES": 0, "TRIM_ABOVE_BYTES": 1}
    settings |= {
        "WATCH_DIR": node.watch_dir,
        "RATE_LIMIT": 0,
        "KEEP_FREE_PERCENT": 1,
        "TRIM_BUDGET_BYTES": MIB,
    }
    with kernel.core_pattern(kernel.install_helper(node.directory, settings), pipe_limit):
        process = node.start(program, "300", "2", name=b"vital")
        _, status, _ = os.wait4(process.pid, 0)
        node.settle()
    process.returncode = status
    assert os.WIFSIGNALED(status)
    assert os.WCOREDUMP(status)
    assert_is_trimmed(node, b"trim_above_bytes")


def test_headers_and_notes_alone_are_kept_where_a_rule_says_so(node, program):
    with node.installed(COMPRESSOR="gzip", RULES=f"metadata exe={program}; whole"):
        die(node, program, "12", "3")
        core = unpack(node)
        found = attributes(node.dump())
        node.dump().unlink()
        node.crash(megabytes=0)
    assert (found["trimmed"], found["vital"]) == (b"metadata", b"none")
    assert sum(row.size for row in CoreFile(core).loads) == 0
    assert backtraces(program, core).count("\n#0 ") >= 4
    assert "trimmed" not in attributes(node.dump())


@pytest.mark.parametrize("hostile", ["leader", "pages", "nowhere", "libraries"])
def test_hostile_process_is_trimmed_without_a_wrong_byte(node, program, hostile):
    with node.installed(COMPRESSOR="gzip", TRIM_ABOVE_BYTES=1, TRIM_BUDGET_BYTES=4 * MIB):
        node.keep_copy()
        die(node, program, "12", "3", hostile)
    core = assert_is_trimmed(node, b"trim_above_bytes")
    assert_trimmed(node.directory / "copy", core)


def test_crash_loop_keeps_some_whole_then_some_vital_parts_then_counts(node, program):
    quiet = node.directory / "quiet"
    quiet.write_bytes(program.read_bytes())
    quiet.chmod(0o755)
    with node.installed(COMPRESSOR="gzip", RATE_LIMIT="2/600", VITAL_LIMIT="3/600"):
        for _ in range(8):
            process = node.start(program, "12", "1", name=b"vital")
            process.wait(timeout=60)
        node.settle()
        loop = list(node.names())
        process = node.start(quiet, "12", "1", name=b"quiet")
        process.wait(timeout=60)
        node.settle()
    (other,) = set(node.names()) - set(loop)
    assert "truncated" not in attributes(node.watch_dir / other)
    found = [attributes(node.watch_dir / name) for name in loop]
    assert sorted(each.get("trimmed", b"") for each in found) == [b"", b"", *[b"rate_limit"] * 3]
    records = [path.read_text() for path in (node.watch_dir / ".helper").iterdir() if len(path.name) == 24]
    (record,) = [text for text in records if str(program).encode().decode() in text]
    assert "\nkept=2\nsuppressed=6\nvital=3\n" in record
    trimmed = [name for name in loop if "trimmed" in attributes(node.watch_dir / name)]
    core = node.directory / "core"
    core.write_bytes(core_of(node.watch_dir / trimmed[0]))
    assert backtraces(program, core).count("die_here (") > 20
    assert core.stat().st_size < 2 * MIB

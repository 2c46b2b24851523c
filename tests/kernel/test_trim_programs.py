"""Trimmed dumps of programs that people run, at three budgets: `make test-programs`, which installs them."""

import dataclasses
import os
import re
import subprocess

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital_programs import Backtraces, assert_same
from tests.support import culprits, kernel, pystack
from tests.support.collector import wait_until
from tests.support.fetched import write_by_address
from tests.support.trimmed import assert_trimmed

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(900),
]
MIB = 1 << 20


BUDGETS = (1, 16, 64)


def with_budget(node, megabytes):
    """Return a node for a budget, or for whole dumps (0), which shares the crashes, and its configuration."""
    watch_dir = node.directory / f"w{megabytes}"
    watch_dir.mkdir(mode=0o700)
    settings = {"WATCH_DIR": watch_dir, "COMPRESSOR": "gzip", "KEEP_FREE_PERCENT": 1}
    if megabytes:
        settings |= {"RULES": "trim", "TRIM_BUDGET_BYTES": megabytes * MIB}
    config = kernel.write_config(node.directory / f"trim{megabytes}.conf", settings)
    return dataclasses.replace(node, watch_dir=watch_dir), config


def crash_into_budgets(node, crash, wanted=BUDGETS):
    """Crash a program; return its executable, the kernel's own core, and a node with the dump for each budget."""
    budgets = {megabytes: with_budget(node, megabytes) for megabytes in wanted}
    with node.installed():
        node.keep_copy(*(config for _, config in budgets.values()))
        program = culprits.crash_now(node, crash)
        for each, _ in budgets.values():
            wait_until(each.has_dump, 300, "the dump")
        node.settle()
    return program, node.directory / "copy", {megabytes: each for megabytes, (each, _) in budgets.items()}


@pytest.mark.parametrize("crash", culprits.ALL, ids=lambda crash: crash.__name__)
def test_trimmed_program_has_the_backtraces_of_the_whole_one(node, crash):
    program, whole, budgets = crash_into_budgets(node, crash)
    told = read(program, whole, crash)
    assert all(text.count("#") > 3 for text in told.values()), told
    for megabytes, each in budgets.items():
        found, core = attributes(each.dump()), node.directory / "core"
        write_by_address(core_of(each.dump()), core)
        if whole.stat().st_size <= megabytes * MIB:
            assert "trimmed" not in found, "not longer than its budget"
            continue
        assert (found["trimmed"], found["truncated"], found["vital"]) == (
            b"rule",
            b"max_dump_bytes",
            b"whole",
        )
        if crash not in culprits.SHARED:
            assert_trimmed(whole, core)
        sizes = whole.stat().st_size, core.stat().st_size, each.dump().stat().st_size
        print(f"{crash.__name__}, {megabytes} MiB: core, trimmed, compressed: {sizes}")  # noqa: T201  figures
        assert_same(read(program, core, crash), told, f"{megabytes} MiB")


def read(program, core, crash):
    """Return the output of debuggers, without gdb's errors about memory that arguments point to: it may be missing."""
    told = Backtraces(program, core, crash).read()
    missing = r"<error: Cannot access memory at address 0x[0-9a-f]+>"
    return {name: re.sub(missing, "", text) for name, text in told.items()}


def said_by(*command, given=None):
    """Return the output of a tool, without the path of the core."""
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, errors="replace", timeout=300, check=False
    )
    return done.stdout.replace(str(command[-1]), "CORE")


def goroutines(program, core):
    """Return the stacks of all goroutines as Delve shows them."""
    options = ["--allow-non-terminal-interactive=true"]
    return said_by("dlv", *options, "core", program, core, given="goroutines -t 20\nquit\n")


def test_delve_reads_a_trimmed_dump_of_enough_megabytes(node):
    program, whole, budgets = crash_into_budgets(node, culprits.golang)
    told = goroutines(program, whole)
    assert told.count("\n") > 50
    for megabytes, each in budgets.items():
        core = node.directory / "core"
        core.write_bytes(core_of(each.dump()))
        if megabytes >= 16:
            assert goroutines(program, core) == told


def test_pystack_shows_every_thread_of_a_whole_and_of_a_trimmed_dump(node):
    tool = pystack.install(node.directory)
    _, kernels, budgets = crash_into_budgets(node, culprits.python, (0, 64))
    told = pystack.stacks(tool, kernels)
    assert told.count("Traceback for thread") == 301
    for megabytes, each in budgets.items():
        assert ("trimmed" in attributes(each.dump())) == bool(megabytes)
        core = node.directory / "core"
        assert write_by_address(core_of(each.dump()), core)
        assert pystack.stacks(tool, core) == told, f"{megabytes} MiB"

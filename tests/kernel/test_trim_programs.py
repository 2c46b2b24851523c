"""Trimmed dumps of programs that people run, at three budgets: `make test-programs`, which installs them."""

import dataclasses
import os
import re
import shutil
import subprocess

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital import backtraces
from tests.support import culprits, kernel
from tests.support.collector import wait_until
from tests.support.trimmed import assert_trimmed

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(900),
]
MIB = 1 << 20
WITHOUT_NAMES = {culprits.static_binary, culprits.binary_of_32_bits}
"""Of a trimmed dump of these, elfutils 0.188 shows fewer frames than gdb; gdb shows all (docs/how-much.md)."""


def eu_stack(program, core):
    """Return elfutils' frames, without the line that says what it cannot find; none where it is not installed."""
    if not shutil.which("eu-stack"):
        return b""
    command = ["eu-stack", "--core", core, "--executable", program]
    return subprocess.run(command, capture_output=True, check=False).stdout


def with_budget(node, megabytes):
    """Return a node of its own for a budget, which shares the crashes, and its configuration."""
    watch_dir = node.directory / f"w{megabytes}"
    watch_dir.mkdir(mode=0o700)
    settings = {"WATCH_DIR": watch_dir, "COMPRESSOR": "gzip", "KEEP_FREE_PERCENT": 1}
    settings |= {"RULES": "trim", "TRIM_BUDGET_BYTES": megabytes * MIB}
    config = kernel.write_config(node.directory / f"trim{megabytes}.conf", settings)
    return dataclasses.replace(node, watch_dir=watch_dir), config


@pytest.mark.parametrize(
    "crash",
    [
        culprits.eight_threads, culprits.static_binary, culprits.binary_of_32_bits, culprits.many_mappings,
        culprits.own_namespaces, culprits.python, culprits.node_js, culprits.java, culprits.redis,
    ],
)  # fmt: skip
def test_trimmed_program_has_the_backtraces_of_the_whole_one(node, crash, record_property):
    budgets = {megabytes: with_budget(node, megabytes) for megabytes in (1, 16, 64)}
    with node.installed():
        node.keep_copy(*(config for _, config in budgets.values()))
        program = culprits.crash_now(node, crash)
        for each, _ in budgets.values():
            wait_until(each.has_dump, 300, "the dump")
        node.settle()
    whole = node.directory / "copy"
    read = without_arguments if crash in culprits.GUESSED else backtraces
    told, frames = comparable(read(program, whole)), eu_stack(program, whole)
    assert told.count("\n#") > 3
    for megabytes, (each, _) in budgets.items():
        found, core = attributes(each.dump()), node.directory / "core"
        core.write_bytes(core_of(each.dump()))
        if whole.stat().st_size <= megabytes * MIB:
            assert "trimmed" not in found, "not longer than its budget"
            continue
        assert (found["trimmed"], found["truncated"], found["vital"]) == (
            b"rule",
            b"max_dump_bytes",
            b"whole",
        )
        held = assert_trimmed(whole, core)
        sizes = whole.stat().st_size, core.stat().st_size, held, each.dump().stat().st_size
        record_property(f"bytes at {megabytes} MiB", sizes)
        assert comparable(read(program, core)) == told
        named = eu_stack(program, core)
        record_property(f"lines of eu-stack at {megabytes} MiB", (named.count(b"\n"), frames.count(b"\n")))
        assert named == frames or crash in WITHOUT_NAMES


def without_arguments(program, core):
    """Return backtraces without arguments: those of just-in-time compiled frames are guesses of gdb."""
    return re.sub(r"\(.*\)", "()", backtraces(program, core))


def comparable(told):
    """Leave out what gdb says of memory that arguments point to: of a trimmed dump it may be missing."""
    return re.sub(r"<error: Cannot access memory at address 0x[0-9a-f]+>", "", told)

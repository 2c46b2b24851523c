"""Trimmed dumps of programs that people run, at three budgets: `make test-programs`, which installs them."""

import os
import re
import shutil
import subprocess

import pytest
from tests.kernel import test_vital_programs as programs
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital import backtraces
from tests.support.collector import wait_until
from tests.support.trimmed import assert_trimmed

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(900),
]
MIB = 1 << 20


def eu_stack(program, core):
    """Return elfutils' frames, without the line that says what it cannot find."""
    command = ["eu-stack", "--core", core, "--executable", program]
    return subprocess.run(command, capture_output=True, check=False).stdout


@pytest.mark.parametrize(
    "crash",
    [
        programs.eight_threads, programs.static_binary, programs.binary_of_32_bits, programs.many_mappings,
        programs.own_namespaces, programs.python, programs.node_js, programs.java, programs.redis,
    ],
)  # fmt: skip
@pytest.mark.parametrize("budget", [1, 16, 64])
def test_trimmed_program_has_the_backtraces_of_the_whole_one(node, crash, budget, record_property):
    with node.installed(COMPRESSOR="gzip", RULES="trim", TRIM_BUDGET_BYTES=budget * MIB):
        node.keep_copy()
        program = crash(node)
        wait_until(lambda: any(not name.endswith(".partial") for name in node.names()), 300, "the dump")
        node.settle()
    found, whole, core = attributes(node.dump()), node.directory / "copy", node.directory / "core"
    core.write_bytes(core_of(node.dump()))
    if whole.stat().st_size <= budget * MIB:
        assert "trimmed" not in found, "not longer than its budget"
        return
    assert (found["trimmed"], found["truncated"], found["vital"]) == (b"rule", b"max_dump_bytes", b"whole")
    held = assert_trimmed(whole, core)
    record_property("bytes", (whole.stat().st_size, core.stat().st_size, held, node.dump().stat().st_size))
    read = programs.without_arguments if crash in programs.GUESSED else backtraces
    told = read(program, whole)
    assert told.count("\n#") > 3
    assert comparable(read(program, core)) == comparable(told)
    if shutil.which("eu-stack"):
        assert eu_stack(program, core) == eu_stack(program, whole)


def comparable(told):
    """Leave out what gdb says of memory that arguments point to: of a trimmed dump it may be missing."""
    return re.sub(r"<error: Cannot access memory at address 0x[0-9a-f]+>", "", told)

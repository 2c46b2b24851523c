"""Fingerprints of a fixed set of bugs in several languages: `make test-fingerprints`, which installs compilers."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from tests.kernel.conftest import attributes
from tests.support import fingerprints

from core_dump_collector.fingerprint import fingerprint_of_attributes
from core_dump_format.attributes import read_attributes

pytestmark = [
    pytest.mark.skipif("FINGERPRINTS" not in os.environ, reason="takes minutes: make test-fingerprints"),
    pytest.mark.timeout(1800),
]
LARGE_MIB, HUGE_MIB = 300, 2048
CUT_BYTES = 16 << 20
HUGE = {("c-fp", 0), ("c-nofp", 2), ("cpp", 2), ("rust", 1)}
"""Bugs that are tried with 2 GiB as well."""
LEAST = 0.95
found: list[fingerprints.Found] = []
"""Of all programs; the last test looks at the pairs."""


def crash(node, program, bug, mib):
    """Run one bug until its dump is published; return the dump's attributes."""
    process = subprocess.Popen(
        program.start(bug, mib, node.directory),
        env=fingerprints.ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=node.directory,
        start_new_session=True,
    )
    try:
        process.wait(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    node.settle()
    dumps = list(node.watch_dir.glob(f"core-{program.name}-*"))
    assert dumps, f"no dump of {program.name}, bug {bug}, {mib} MiB"
    raw = attributes(dumps[0])
    for dump in dumps:
        dump.unlink()
    return raw


def record(node, program, bug, mib, kind):
    """Crash one bug and remember its fingerprint."""
    raw = crash(node, program, bug, mib)
    known = fingerprint_of_attributes(read_attributes(raw))
    assert "truncated" in raw or "truncated" not in kind
    identity, frames = (known.id, known.frames) if known else ("no frames", "")
    found.append(fingerprints.Found(program.name, bug, kind, identity, frames))


@pytest.mark.parametrize("program", fingerprints.PROGRAMS, ids=lambda program: program.name)
def test_every_dump_has_a_fingerprint(node, program):
    if not program.prepare(node.directory):
        pytest.skip(f"{program.name}: its compiler or interpreter is not installed")
    config = node.directory / "helper.conf"
    with node.installed():
        for bug in range(program.bugs):
            record(node, program, bug, 0, "small")
            record(node, program, bug, LARGE_MIB, "large")
            if (program.name, bug) in HUGE:
                record(node, program, bug, HUGE_MIB, "huge")
        config.write_text(f"{config.read_text()}MAX_DUMP_BYTES={CUT_BYTES}\n")
        for bug in range(program.bugs):
            record(node, program, bug, LARGE_MIB, "large, truncated")


def test_one_bug_is_one_group_and_different_bugs_are_apart():
    table, together, apart = fingerprints.matrix(found)
    sys.stderr.write("\n".join(["", table, *fingerprints.exceptions(found), ""]))
    assert len({(each.program, each.bug) for each in found}) >= 40
    assert together >= LEAST
    assert apart >= LEAST

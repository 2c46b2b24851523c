"""Fingerprints of a fixed set of bugs in several languages: `make test-fingerprints`, which installs compilers."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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
HUGE = {("c-fp", 0), ("c-nofp", 2), ("c-static", 0), ("cpp", 2), ("rust", 1)}
HUGE |= {("go", 0), ("asan", 0), ("python3", 0), ("redis-server", 0)}
"""Bugs that are tried with 2 GiB as well."""
LEAST = 0.95
"""Part of all pairs that has to be right."""
MIN_BUGS = 40


STORE = Path(os.environ.get("FOUND", "fingerprints.jsonl"))
"""The fingerprints of all programs, also of those that an earlier run crashed: ONLY replaces those of its programs."""
ONLY = os.environ.get("FINGERPRINTS", "1").split(",")


def chosen():
    """Return the programs that are to crash."""
    return [program for program in fingerprints.PROGRAMS if ONLY == ["1"] or program.name in ONLY]


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
    """Crash one bug; return its fingerprint."""
    raw = crash(node, program, bug, mib)
    known = fingerprint_of_attributes(read_attributes(raw))
    assert "truncated" in raw or "truncated" not in kind
    identity, frames = (known.id, known.frames) if known else ("no frames", "")
    return fingerprints.Found(program.name, bug, kind, identity, frames)


def whole(node, program):
    """Yield the fingerprints of a program's bugs, with little memory and with much."""
    for bug in range(program.bugs):
        yield record(node, program, bug, 0, "small")
        yield record(node, program, bug, LARGE_MIB, "large")
        if (program.name, bug) in HUGE:
            yield record(node, program, bug, HUGE_MIB, "huge")


def truncated(node, program):
    """Yield the fingerprints of a program's bugs, of dumps that were truncated."""
    for bug in range(program.bugs):
        yield record(node, program, bug, LARGE_MIB, "large, truncated")


@pytest.mark.parametrize("program", chosen(), ids=lambda program: program.name)
def test_every_bug_of_a_program_leaves_a_fingerprint(node, program):
    """Other tests that need the core pattern have their turn between two programs."""
    if not program.prepare(node.directory):
        pytest.skip("not installed")
    config = node.directory / "helper.conf"
    with node.installed():
        found = list(whole(node, program))
        config.write_text(f"{config.read_text()}MAX_DUMP_BYTES={CUT_BYTES}\n")
        found += truncated(node, program)
    STORE.write_text("".join(stored_lines(lambda each: each.program != program.name)))
    with STORE.open("a") as file:
        file.writelines(f"{json.dumps(dataclasses.asdict(each))}\n" for each in found)


def stored_lines(wanted):
    """Return the lines of fingerprints that earlier runs have stored."""
    lines = STORE.read_text().splitlines(keepends=True) if STORE.exists() else []
    return [line for line in lines if wanted(fingerprints.Found(**json.loads(line)))]


def test_one_bug_is_one_group_and_different_bugs_are_apart():
    found = [fingerprints.Found(**json.loads(line)) for line in stored_lines(lambda _: True)]
    table, together, apart = fingerprints.matrix(found)
    sys.stderr.write("\n".join(["", table, *fingerprints.exceptions(found), ""]))
    assert ONLY != ["1"] or len({(each.program, each.bug) for each in found}) >= MIN_BUGS
    assert together >= LEAST
    assert apart >= LEAST

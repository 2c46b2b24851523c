"""Dumps of programs that people run, cut, killed and out of room: `make test-programs`, which installs them.

Each program crashes once and is held, so that more helpers can dump the same process.
"""

import contextlib
import difflib
import itertools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.kernel.conftest import Node, attributes, core_of, new_node
from tests.kernel.test_vital import backtraces, vital_core
from tests.support import culprits, heldcrash, kernel
from tests.support.collector import wait_until
from tests.support.corepair import CoreFile, differing_segments
from tests.support.fetched import write_by_address
from tests.support.heldcrash import HeldCrash

from core_dump_collector.node import dumpfile
from core_dump_format.core import read_build_ids, read_core
from core_dump_format.gzip import inflate_until_damage
from core_dump_format.stream import Seekable

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(900),
]
MOST_HELD = 2
BEYOND = re.compile(
    r"^(#\d+ +0x0+ in \?\? \(\)|#\d+ .* in __bss_start \(\)|Backtrace stopped: Cannot access memory.*)\n",
    re.MULTILINE,
)
"""Behind the last frame of a goroutine, gdb goes on into the next page; in Chromium it takes data for code."""
NOWHERE = re.compile(r"^#\d+ +0x[0-9a-f]+\n", re.MULTILINE)
"""Likewise elfutils, which shows no more of such a frame than its address."""
WORDS = re.compile(r"\(.*\)")
"""Arguments: lldb also shows the heap that they point to."""
LLDB = {culprits.eight_threads, culprits.rust, culprits.redis}


class Backtraces:
    """The output of each debugger for a core; all cores get the same path."""

    def __init__(self, program, core, crash):
        self.program, self.core, self.crash = program, core, crash

    def read(self):
        """Return the output of each debugger."""
        found = {
            "gdb": self._gdb(),
            "eu-stack": self._eu_stack(),
        }
        if self.crash in LLDB:
            batch = ["--batch", "-o", "thread backtrace all", "--core", self.core]
            told = self._print("lldb", *batch, self.program).replace(str(self.core), "CORE")
            found["lldb"] = WORDS.sub("()", told)
        return found

    def read_of(self, content):
        """Return the output for the core that these bytes are."""
        self.core.write_bytes(content)
        return self.read()

    def _gdb(self):
        told = BEYOND.sub("", backtraces(self.program, self.core))
        return WORDS.sub("()", told) if self.crash in culprits.GUESSED else told

    def _eu_stack(self):
        told = self._print("eu-stack", "--core", self.core, "-e", self.program)
        return NOWHERE.sub("", told) if self.crash is culprits.golang else told

    @staticmethod
    def _print(*command):
        return subprocess.run(command, capture_output=True, check=False).stdout.decode(errors="replace")


@dataclass
class Case:
    """A crashed program, and the dumps that helpers made of it while it was held."""

    node: Node
    held: HeldCrash
    steps: Iterator[Path]
    program: Path
    rests: dict[str, Path] = field(default_factory=dict)
    """Files with the part of the core that each fault leaves."""
    failure: Exception | None = None

    @classmethod
    def prepare(cls, node, crash):
        """Build and start a program, and install a helper for it."""
        node.directory.chmod(0o755)  # PostgreSQL does not run as root
        given = {"WATCH_DIR": node.watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 1}
        kernel.install_helper(node.directory, given | heldcrash.QUICKLY)
        steps = crash(node)
        return cls(
            node, HeldCrash(node.directory, str(node.directory / "core-dump-helper")), steps, next(steps)
        )

    def crash(self):
        """Crash it; the core pattern is ours."""
        self.held.keep()
        next(self.steps)
        wait_until(self.held.is_held, 120, "the dump")

    def finish(self):
        """Dump it again with each fault, and let it go."""
        try:
            for fault in (by_sigkill, by_out_of_memory, by_full_disk):
                rest = self.node.directory / f"{fault.__name__}.core"
                rest.write_bytes(fault(self.node, self.held))
                self.rests[fault.__name__] = rest
        except Exception as error:  # noqa: BLE001  costs this program its test
            self.failure = error
        finally:
            self.close()

    def close(self):
        """Let it go."""
        self.held.release()
        for process in self.node.started:
            process.wait(60)
        self.steps.close()


@pytest.fixture(scope="module")
def cases(request):
    """All programs that are tested: each is started, then all crash, one after the other, under one lock.

    A process that is held counts for `kernel.core_pipe_limit`, which others on this machine may set: few at a time.
    """
    wanted = {
        item.callspec.params["crash"] for item in request.session.items if item.module is request.module
    }
    with contextlib.ExitStack() as stack:
        prepared = {
            crash: Case.prepare(stack.enter_context(new_node()), crash)
            for crash in culprits.ALL
            if crash in wanted
        }
        for case in prepared.values():
            stack.callback(case.close)
        room = threading.Semaphore(MOST_HELD)
        with ThreadPoolExecutor(MOST_HELD) as pool, kernel.core_pattern("core", pipe_limit=4 * MOST_HELD):
            for case in prepared.values():
                room.acquire()
                try:
                    case.crash()
                except Exception as error:  # noqa: BLE001  likewise
                    case.failure = error
                pool.submit(case.finish).add_done_callback(lambda _: room.release())
        yield prepared


def place(node, name):
    """Return a new watch directory."""
    path = node.directory / name
    path.mkdir(mode=0o700)
    return path


def only_dump(watch_dir):
    (dump,) = watch_dir.glob("core-*")
    return dump


def salvaged(watch_dir):
    """Return the core in a partial, after the collector has published it."""
    partial = only_dump(watch_dir)
    assert partial.name.endswith(".partial")
    dumpfile.salvage(str(watch_dir), partial.name)
    dump = only_dump(watch_dir)
    found = attributes(dump)
    assert (found["vital"], found["truncated"]) == (b"whole", b"salvaged")
    return b"".join(inflate_until_damage([dump.read_bytes()]))


def by_full_disk(node, held):
    """Return the core from a disk that is full half-way through the rest of the dump."""
    whole, watch_dir = node.dump(), place(node, "full")
    vital = int(attributes(whole)["vital_bytes"])
    room = vital + (whole.stat().st_size - vital) // 2 + (200 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room},mode=700", "none", watch_dir], check=True)
    try:
        held.dump_again(watch_dir)
        found = attributes(only_dump(watch_dir))
        assert found["vital"] == b"whole"
        assert found["truncated"] in {b"disk_full", b"keep_free"}
        return core_of(only_dump(watch_dir))
    finally:
        subprocess.run(["umount", "-l", watch_dir], check=True)


def by_sigkill(node, held):
    """Return the core that the collector salvages after a helper was killed half-way."""
    watch_dir = place(node, "killed")
    assert held.dump_half(watch_dir, lambda pid: os.kill(pid, signal.SIGKILL)) == -signal.SIGKILL
    return salvaged(watch_dir)


def by_out_of_memory(node, held):
    """Return the core that the collector salvages after the kernel killed a helper for memory half-way."""
    watch_dir = place(node, "oom")
    with heldcrash.memory_cgroup(node.directory.name) as (prefix, exhaust, events):
        assert held.dump_half(watch_dir, exhaust, prefix) == -signal.SIGKILL
        assert re.search(r"^oom_kill [1-9]", events.read_text(), re.MULTILINE)
    return salvaged(watch_dir)


def described(path):
    """Return the facts that `info` shows of a core: its notes, and the build IDs of its files."""
    with path.open("rb") as file:
        source = Seekable(file.fileno())
        core = read_core(source)
        build_ids, _ = read_build_ids(core, source)
    return core.threads, core.files, core.arguments, core.signal, core.expected_bytes, build_ids


@pytest.mark.parametrize("crash", culprits.ALL, ids=lambda crash: crash.__name__)
def test_program_has_every_backtrace_whatever_happens_to_its_dump(cases, crash):
    case = cases[crash]
    if case.failure:
        raise case.failure
    dump, core = case.node.dump(), case.node.directory / "core"
    found, whole, vital = attributes(dump), core_of(dump), vital_core(dump)
    assert found["vital"] == b"whole"
    assert found["bytes"] == found["expected_bytes"] == b"%d" % len(whole)
    assert int(found["vital_bytes"]) < 10 << 20
    assert whole.startswith(vital)
    debuggers = Backtraces(case.program, core, crash)
    told = Backtraces(case.program, case.held.copy, crash).read()
    assert all(text.count("#") > 3 for text in told.values()), told
    assert write_by_address(whole, core)
    assert_same(debuggers.read(), told, "by address")
    assert_same(debuggers.read_of(whole), told, "vital part first")
    assert CoreFile(core).vital_end() == len(vital)
    differing = differing_segments(case.held.copy, core)
    assert not differing or crash in culprits.SHARED, differing
    *shown, build_ids = described(core)
    assert_same(debuggers.read_of(whole[: len(whole) // 2]), told, "half")
    assert_same(debuggers.read_of(vital), told, "vital part")
    *found_now, found_ids = described(core)
    assert found_now == shown
    assert found_ids.items() <= build_ids.items(), "of a module whose first page was in memory"
    assert 2 * len(found_ids) >= len(build_ids)
    for fault, path in case.rests.items():
        rest = path.read_bytes()
        assert len(vital) < len(rest) < len(whole)
        assert_same(debuggers.read_of(rest), told, fault)


def assert_same(found, told, what):
    """Compare the output of debuggers; show the first differences."""
    for name, text in told.items():
        lines = difflib.unified_diff(
            text.splitlines(), found[name].splitlines(), "the kernel's", what, n=0, lineterm=""
        )
        assert text == found[name], "\n".join(itertools.islice((f"{name}: {line}" for line in lines), 20))

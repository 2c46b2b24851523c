"""`make demo` shows the way of a dump, says whom it waits for, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import kernel
from tests.support.collector import command_of, descendants, wait_until

ROOT = Path(__file__).parents[2]


def demo(code):
    """Start the demo with its module changed by `code`; return the process."""
    program = f"import pathlib, demo.__main__ as demo\n{code}\ndemo.main()"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True)


@pytest.mark.parametrize("way", ["kernel", "by hand"])
def test_demo_brings_a_core_back_and_leaves_nothing(way):
    with (
        demo("" if way == "kernel" else "demo.kernel.can_crash = lambda: False") as process,
        kernel.untimed(),
    ):
        said = process.stdout.read()
    assert process.returncode == 0
    assert "fetched back: an ELF core, every byte that its headers promise" in said
    assert re.search(r"\$ core-dumps list\nTIME +NODE .*\n.* demo-node .* present\n", said)
    assert ("crashed with SIGSEGV" in said) == (way == "kernel")
    scratch = re.search(r"collector watches (\S+)/core_dumps", said)[1]
    assert not os.path.exists(scratch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_demo_names_whom_it_waits_for_and_leaves_nothing_when_killed(number, tmp_path):
    lock = tmp_path / "lock"
    with subprocess.Popen(
        ["flock", lock, "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        process = demo(f"demo.kernel.LOCK = pathlib.Path({str(lock)!r})")
        for line in process.stdout:
            if found := re.search(r"collector watches (\S+)/core_dumps", line):
                scratch = found[1]
            if f"process {other.pid} (flock) uses kernel.core_pattern; waiting" in line:
                break
        else:
            pytest.fail("it did not say whom it waits for")
        wait_until(
            lambda: any("flock" in command_of(pid) for pid in descendants(process.pid)), 10, "the wait"
        )
        started = descendants(process.pid)
        assert os.path.exists(scratch)
        process.send_signal(number)
        process.communicate(timeout=30)
        for child in descendants(other.pid):
            os.kill(child, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(scratch), 10, "the folder's removal")
    wait_until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in started), 15, "the end of all processes"
    )

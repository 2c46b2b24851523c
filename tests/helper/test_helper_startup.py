"""What the helper costs before it reads the first byte, and what it is in the meantime."""

import fcntl
import os
import subprocess
import sys

import pytest
from tests.support import kernel
from tests.support.cores import simple as elf

OS = {"os", "os.path", "posixpath", "genericpath", "stat", "_stat", "_collections_abc"}
"""What `import os` loads; with -S Python has not done so itself."""
NEEDED = OS | {
    "_signal",
    "fcntl",
    "select",
    "_struct",
    "_queue",
    "__future__",
    "time",
}
LIST = """
import sys
before = set(sys.modules)
sys.path.append({folder!r})
import core_dump_helper
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("python", kernel.pythons(), ids=lambda path: path.split("/")[-3])
def test_only_cheap_modules_are_imported(python):
    script = LIST.format(folder=str(kernel.HELPER.parent))
    command = [python, "-BIS", "-c", script]
    found = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert {name for name in found if not name.startswith("core_dump_helper")} <= NEEDED


HELD = {"cgroup", "crash", "handler", "held", "length", "settings", "system"}
"""The modules that a small process waits for."""
WATCH_IMPORTS = """
import fcntl, os, sys
class Watch:
    def find_spec(name, path, target=None):
        if name == "core_dump_helper.limits":
            names = (name.partition(".")[2] for name in sys.modules if name.startswith("core_dump_helper."))
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            print(fcntl.fcntl(10, 1032), nice, *sorted(names))  # F_GETPIPE_SZ
            sys.stdout.flush()
            os._exit(0)
sys.path.append({folder!r})
sys.meta_path.insert(0, Watch)
sys.argv[1:] = {arguments!r}
import core_dump_helper
core_dump_helper.main()
"""


@pytest.mark.parametrize(
    ("size", "others", "pipe_bytes", "nice", "imported"),
    [
        (500_000, 63, 1 << 20, 9, HELD | {"modules", "mounts"}),
        (500_000, 64, 64 << 10, 0, HELD),
        ((1 << 20) + 1, 0, 64 << 10, 0, HELD),
    ],
)
def test_small_process_is_released_before_anything_is_imported_that_can_wait(
    tmp_path, size, others, pipe_bytes, nice, imported
):
    config = kernel.write_config(tmp_path / "helper.conf", {"WATCH_DIR": tmp_path})
    for name in (".modules", ".helper"):
        (tmp_path / name).mkdir(0o700)
    core = elf(bytes(size))
    arguments = [
        f"-C{config}",
        f"-P{os.getpid()}",
        f"-u{os.getuid()}",
        f"-g{os.getgid()}",
        "-s11",
        "--",
        "app",
    ]
    script = WATCH_IMPORTS.format(folder=str(kernel.HELPER.parent), arguments=arguments)
    command = [sys.executable, "-BIS", "-c", script]
    with (
        (tmp_path / ".helper/released").open("w") as released,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as helper,
    ):
        if others:
            fcntl.lockf(released, fcntl.LOCK_EX, others)
        helper.stdin.write(core[: 60 << 10])  # as much as fits
        helper.stdin.flush()
        found_bytes, found_nice, *names = helper.stdout.read().decode().split()
        helper.stdin.close()
    assert (int(found_bytes), set(names)) == (pipe_bytes, imported)
    assert int(found_nice) - os.getpriority(os.PRIO_PROCESS, 0) == nice


def cpu_seconds(command):
    """Return how much CPU time a run takes: others on this machine hardly change it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={}) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_compiled_helper_starts_in_less_than_twice_the_time_of_python_itself(tmp_path):
    kernel.install_helper(tmp_path, {})
    launcher = [sys.executable, "-IS", tmp_path / "core-dump-helper", "--version"]
    subprocess.run(launcher, check=True, capture_output=True)
    assert list(tmp_path.glob("core_dump_helper/__pycache__/*.pyc"))
    bare = [sys.executable, "-IS", "-c", ""]
    pairs = [(cpu_seconds(launcher), cpu_seconds(bare)) for _ in range(15)]
    assert min(ours for ours, _ in pairs) < 2 * min(pythons for _, pythons in pairs)


@pytest.mark.skipif(os.geteuid() != 0, reason="asks for what root gets: sudo make test")
def test_process_cannot_be_dumped_and_leads_the_way_when_memory_is_short():
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import ctypes, os\n"
        "from core_dump_helper.system import secure_process\n"
        "core = secure_process()\n"
        "dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "score = open('/proc/self/oom_score_adj').read().strip()\n"
        "mask = os.umask(0)\n"
        "data = os.read(core, 4)\n"
        "print(dumpable, score, mask, data, os.readlink('/proc/self/fd/0'), os.getegid())"
    )
    command = [sys.executable, "-IS", "-c", script, str(kernel.HELPER.parent)]
    done = subprocess.run(command, input=b"core", stdout=subprocess.PIPE, check=True)
    with open("/proc/sys/fs/suid_dumpable") as setting:
        dumpable = setting.read().strip()
    assert done.stdout.decode().split() == [dumpable, "500", "63", "b'core'", "/dev/null", "0"]

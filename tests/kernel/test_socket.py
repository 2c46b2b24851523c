"""Dumps that the kernel sends over a socket: the values of the pipe's arguments, and faults."""

import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import isal
import pytest
from tests.kernel.conftest import attributes, core_of
from tests.support import kernel, listener, memorycgroup
from tests.support.collector import running, wait_until

MODES = Path("/proc/sys/kernel/core_modes")
pytestmark = pytest.mark.skipif(
    not MODES.exists() or "socket" not in MODES.read_text().split(), reason="needs Linux 6.16"
)
QUICKLY = {"COMPRESSOR": "isal", "PYTHON_PATH": Path(isal.__file__).parents[1]}
MOST_RESIDENT = 12 << 20
slowly = pytest.mark.skipif(not os.environ.get("SOCKET"), reason="minutes: make test-socket")
SWAPS = 1000 if os.environ.get("SOCKET") else 50


def status_of(pid, field):
    """Return the words of a line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.split()[1:]
    return []


def score(pid):
    """Return how readily the kernel kills a process when memory runs out; that of a process that is gone is -1000."""
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except OSError:
        return -1000


def open_files(node):
    """Return how many descriptors the listener has; it closes those of a child after the child has ended."""
    return len(os.listdir(f"/proc/{node.listener.pid}/fd"))


def start_many(node, count, *, name=b"storm", megabytes=0, kind="mixed"):
    """Start processes that crash at once."""
    command = [node.program, "6", name.hex(), str(megabytes), kind, "0"]
    return [node.start(*command, name=name, stdout=subprocess.DEVNULL) for _ in range(count)]


def assert_whole(node, count):
    """Check that there are so many dumps and that each is whole."""
    assert len(node.names()) == count
    for name in node.names():
        found = attributes(node.watch_dir / name)
        assert "truncated" not in found
        assert found["bytes"] == found["expected_bytes"]


@pytest.mark.parametrize("transport", ["@", "@@"])
def test_everything_that_the_pipe_tells_of_a_crash_is_known(node, transport):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))}
    script = 'printf "a b" >/proc/sys/kernel/hostname; "$@"; :'
    inside = ("unshare", "--pid", "--mount", "--uts", "--fork", "sh", "-c", script, "sh")
    user = ("setpriv", "--reuid=65534", "--regid=65533", "--clear-groups")
    os.chmod(node.directory, 0o755)
    began = int(time.time())
    with node.installed(transport=transport, **QUICKLY):
        pid = node.crash(6, name=b"the culprit", threads=3, before=(*inside, *user), **limit)
    found = attributes(node.dump())
    assert core_of(node.dump()).startswith(b"\x7fELF")
    told = {name: found.get(name, b"").decode() for name in found}
    assert (told["uid"], told["gid"], told["signal"], told["rlimit"]) == ("65534", "65533", "6", "4096")
    assert (told["thread"], told["comm"], told["threads"]) == ("the culprit", "crash", "4")
    assert (told["ns_pid"], told["hostname"], told["dumpable"]) == (str(pid), "a b", "1")
    assert int(told["tid"]) > int(told["pid"]) > pid
    assert told["exe"] == str(node.program)
    assert began <= int(told["timestamp"]) <= time.time()
    assert "sensitive" not in told
    assert "truncated" not in told
    assert node.dump().name.endswith(f"-{pid}-6.gz")


def test_listener_is_small_and_leaves_no_core_and_is_not_killed_first(node):
    with node.installed(transport="@@", **QUICKLY):
        node.crash()
        first, node.listener = node.listener, listener.start(node.directory, node.socket)
        first.terminate()  # it has compiled its modules, which takes memory for a moment
        assert first.wait(30) == 0
        node.crash(name=b"second")
        pid = node.listener.pid
        resident = int(status_of(pid, "VmRSS")[0]) * 1024
        assert resident <= MOST_RESIDENT
        children = start_many(node, 1, megabytes=200, kind="random")
        wait_until(
            lambda: any(score(child) > score(pid) for child in node.helpers()), 10, "a child to kill first"
        )
        children[0].wait(60)
        node.listener.send_signal(signal.SIGSEGV)
        assert node.listener.wait(10) == -signal.SIGSEGV, "it does not wait for itself"


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("", ()),
        ("sys_ptrace", ("signal", "exe")),
        ("dac_read_search", ("vital",)),
        ("checkpoint_restore", ("frames",)),
    ],
)
def test_each_capability_of_the_receiver_is_needed(node, missing, lost):
    os.chmod(node.directory, 0o755)
    kept = [name for name in ("sys_ptrace", "dac_read_search", "checkpoint_restore") if name != missing]
    bound = [
        "setpriv",
        "--bounding-set",
        ",".join(["-all", *(f"+{name}" for name in kept)]),
        "--no-new-privs",
    ]
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with node.installed(transport="@@", how={"prefix": bound}, **QUICKLY):
        node.crash(6, megabytes=12, threads=2, before=user)
    found = attributes(node.dump())
    found = {name: value for name, value in found.items() if (name, value) != ("vital", b"none")}
    assert not found.keys() & set(lost)
    assert {"signal", "exe", "vital", "frames"} - found.keys() <= {
        *lost,
        *(["vital", "frames"] if lost else []),
    }
    assert "truncated" not in found


def test_connection_of_a_stranger_is_closed_at_once_and_costs_no_child(node):
    with node.installed(transport="@@", **QUICKLY):
        for sent in (b"", bytes.fromhex("10000000100000000f00000000000000"), b"\x7fELF" + bytes(1 << 16)):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(node.socket))
                try:
                    stranger.sendall(sent)
                    assert stranger.recv(16) == b""
                except (BrokenPipeError, ConnectionResetError):
                    pass
        assert node.names() == []
        descriptors = open_files(node)
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(node.socket))
        node.crash()
        wait_until(
            lambda: open_files(node) == descriptors, 10, "the listener to close its children's descriptors"
        )
    assert_whole(node, 1)


def test_program_that_a_handler_started_is_not_dumped(node):
    with node.installed(transport="@@", **QUICKLY):
        node.crash(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)))
        assert node.names() == []


def test_child_that_is_killed_lets_the_process_go_and_leaves_what_it_wrote(node):
    with node.installed(transport="@@", **QUICKLY | {"BUFFER_BYTES": 0}):
        crashing = start_many(node, 1, megabytes=300, kind="random")
        wait_until(lambda: any((node.watch_dir / name).stat().st_size > 1 << 20 for name in node.names()))
        for pid in node.helpers():
            os.kill(pid, signal.SIGKILL)
        assert crashing[0].wait(10) == -signal.SIGABRT
        assert [name.endswith(".partial") for name in node.names()] == [True]
        node.crash(name=b"next")
        assert len(node.names()) == 2


@pytest.mark.parametrize("count", [64, pytest.param(500, marks=slowly)])
def test_many_crashes_at_once_are_as_many_dumps(node, count, record_property):
    with node.installed(transport="@@", **QUICKLY):
        began = time.monotonic()
        crashing = start_many(node, count)
        assert {process.wait(120) for process in crashing} == {-6}
        record_property("released_seconds", round(time.monotonic() - began, 2))
        node.settle()
        wait_until(lambda: open_files(node) < 12, 10, "the listener to close its children's descriptors")
    assert_whole(node, count)


def test_storm_of_one_user_does_not_hold_up_another(node):
    os.chmod(node.directory, 0o755)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with node.installed(transport="@@", MAX_CONCURRENT=4, **QUICKLY | {"BUFFER_BYTES": 0}):
        crashing = start_many(node, 6, megabytes=300, kind="random")
        wait_until(lambda: len(node.names()) >= 2, 30, "dumps of the storm")
        node.crash_only(name=b"quiet", before=user)
        assert any(process.poll() is None for process in crashing), "the storm is not over"
        for process in crashing:
            process.kill()
            process.wait()
    assert any("quiet" in name for name in node.names())


def test_crashes_beyond_the_backlog_and_without_a_listener_are_counted_as_lost(
    node, seaweed, bucket, tmp_path
):
    few = ("unshare", "--net", "sh", "-c", 'echo 4 >/proc/sys/net/core/somaxconn; exec "$@"', "sh")
    environ = seaweed.environ() | {"KERNEL_LOG": "auto"}
    with (
        node.installed(transport="@@", how={"prefix": few}, **QUICKLY),
        running(node.watch_dir, environ, tmp_path) as collector,
    ):
        wait_until(lambda: collector.metric("core_dump_kernel_log_watched") == 1, 10, "the log")
        node.listener.send_signal(signal.SIGSTOP)
        crashing = start_many(node, 9, name=b"loss-full")
        wait_until(lambda: sum(process.poll() is not None for process in crashing) == 4, 30, "the lost ones")
        node.listener.send_signal(signal.SIGCONT)
        assert {process.wait(60) for process in crashing} == {-6}
        dropped = 'core_dump_kernel_dropped_total{reason="%s"}'
        wait_until(lambda: collector.metric(dropped % "socket_full") >= 4, 30, "the count")
        node.listener.kill()
        node.listener.wait()
        node.crash_only(name=b"loss-none")
        wait_until(lambda: collector.metric(dropped % "no_listener") >= 1, 30, "the count")
        node.socket.unlink()
        node.crash_only(name=b"loss-gone")
        wait_until(lambda: collector.metric(dropped % "socket_missing") >= 1, 30, "the count")


class Storm:
    """Threads that crash processes without a pause, and count them."""

    def __init__(self, node, threads=3):
        self.node, self.counts, self.lock = node, Counter(), threading.Lock()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.crash) for _ in range(threads)]

    def crash(self):
        while not self.stop.is_set():
            done = subprocess.run(
                [self.node.program, "6", b"storm".hex(), "0", "z", "0"], stdout=subprocess.PIPE, check=False
            )
            with self.lock:
                self.counts[done.returncode] += 1
                self.node.expect(b"storm", int(done.stdout))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.timeout(1800)
def test_listeners_that_replace_each_other_under_constant_crashing_lose_nothing(node, record_property):
    with node.installed(transport="@@", DEADLINE_SECONDS=600, **QUICKLY):
        old = []
        current = node.listener
        with Storm(node) as storm:
            for _ in range(SWAPS):
                new = listener.start(node.directory, node.socket)
                current.send_signal(signal.SIGTERM)
                old.append(current)
                current = new
                if len(old) > 8:
                    assert old.pop(0).wait(60) == 0
        for process in old:
            assert process.wait(60) == 0
        current.send_signal(signal.SIGTERM)
        node.socket.unlink()
        assert current.wait(60) == 0
        node.settle()
    record_property("crashes", sum(storm.counts.values()))
    assert storm.counts.keys() == {-6}
    assert_whole(node, storm.counts[-6])


def test_descriptor_that_systemd_keeps_survives_its_listener(node):
    """As with systemd.socket(5), the socket is open all the time while the service restarts."""
    node.socket.parent.mkdir(mode=0o700)
    kernel.install_helper(
        node.directory, {"WATCH_DIR": node.watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 1}
    )
    with socket.socket(socket.AF_UNIX) as kept, kernel.core_pattern(f"@@{node.socket}"):
        kept.bind(str(node.socket))
        kept.listen(4096)
        script = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True)\n"
        script += "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
        command = ["python3", "-c", script, str(kept.fileno()), node.directory / "core-dump-helper"]
        crashing = start_many(node, 5)
        for turn in range(3):
            process = subprocess.Popen([*command, "--listen", node.socket], pass_fds=[kept.fileno()])
            wait_until(lambda turn=turn: len(node.names()) >= 5 * (turn + 1), 30, "the dumps")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            crashing += start_many(node, 5)
            assert all(each.poll() is None for each in crashing[-5:]), "they wait for the next listener"
        for each in crashing[-5:]:
            each.kill()
        assert {each.wait(30) for each in crashing[:-5]} == {-6}


def test_dump_beyond_the_share_of_a_storm_keeps_its_vital_part(node):
    settings = QUICKLY | {"BUFFER_BYTES": 0, "MAX_CONCURRENT": 1, "VITAL_LIMIT": "20/600"}
    with node.installed(transport="@@", **settings):
        crashing = start_many(node, 3, megabytes=400, kind="random")
        wait_until(lambda: any("truncated" in attributes(node.watch_dir / name) for name in node.names()
                               if not name.endswith(".partial")), 60, "a trimmed dump")  # fmt: skip
        for process in crashing:
            process.kill()
    trimmed = [attributes(node.watch_dir / name).get("trimmed") for name in node.names()]
    assert b"no_slot" in trimmed


@slowly
@pytest.mark.timeout(600)
def test_ten_large_crashes_in_a_small_cgroup_kill_nobody(node, record_property):
    with memorycgroup.memory_cgroup("cdh-socket", 1 << 30) as (group, killed):
        before = killed.read_text()
        prefix = ("sh", "-c", f'echo $$ >{group}/cgroup.procs; exec "$@"', "sh")
        settings = QUICKLY | {"DEADLINE_SECONDS": 500}
        with node.installed(transport="@@", how={"prefix": prefix}, **settings):
            crashing = []
            for _ in range(10):
                crashing += start_many(node, 1, megabytes=1024)
            assert {process.wait(500) for process in crashing} == {-6}
            node.settle()
            assert node.listener.poll() is None
        assert killed.read_text() == before
        with open(group / "memory.max_usage_in_bytes") as file:
            record_property("most_megabytes", int(file.read()) >> 20)
    assert_whole(node, 10)

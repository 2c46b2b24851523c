"""The socket: accepted peers, answered requests, turns of connections, and safe paths."""

from __future__ import annotations

import _socket
import errno
import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cores import simple as elf

from core_dump_helper import ownmemory, request, socketpath
from core_dump_helper.crash import parse_arguments
from core_dump_helper.handler import Handler
from core_dump_helper.limits import VITAL_SLOTS
from core_dump_helper.listener import Listener, SocketHandler
from core_dump_helper.peer import Peer, _as_e
from core_dump_helper.request import ask_for_core
from core_dump_helper.system import Refused
from core_dump_helper.turns import LATE, NORMAL, Turns, Waiting

REQUEST = struct.pack("=IIQ", 16, 16, 15)
KERNEL_WAIT = struct.pack("=IIQ", 16, 0, 1 | 8)
ACCEPTED = bytes(4)


def answer_to(sent, mark=ACCEPTED):
    """Play the kernel: send a request, then a mark; return the answer and how the receiver ended."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent + mark)
        theirs.shutdown(socket.SHUT_WR)
        try:
            ask_for_core(ours)
            end = ""
        except Refused as refused:
            end = str(refused)
        theirs.setblocking(False)
        try:
            return theirs.recv(4096), end
        except BlockingIOError:
            return b"", end


def test_request_is_answered_by_asking_for_the_core_and_for_the_process_to_be_held():
    assert answer_to(REQUEST) == (KERNEL_WAIT, "")


def test_longer_request_of_a_later_kernel_is_read_to_its_end():
    assert answer_to(struct.pack("=IIQ", 40, 24, 0xFF) + bytes(24)) == (KERNEL_WAIT, "")


def test_features_that_the_kernel_does_not_offer_are_not_asked_for():
    assert answer_to(struct.pack("=IIQ", 16, 16, 7)) == (struct.pack("=IIQ", 16, 0, 1), "")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack("=IIQ", 15, 16, 15), "request has 15 bytes"),
        (struct.pack("=IIQ", 4097, 16, 15), "request has 4097 bytes"),
        (struct.pack("=IIQ", 16, 15, 15), "takes 15"),
        (struct.pack("=IIQ", 16, 16, 14), "offers no core"),
        (REQUEST[:15], "killed before"),
        (b"", "killed before"),
    ],
)
def test_request_that_does_not_fit_is_not_answered(sent, reason):
    answer, end = answer_to(sent, b"")
    assert answer == b""
    assert reason in end


def test_answer_that_the_kernel_rejects_leaves_no_dump():
    assert "rejects the answer to its request: 3" in answer_to(REQUEST, struct.pack("=I", 3))[1]


def test_core_that_comes_without_a_request_is_left_to_the_reader():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\x7fELF core")
        ask_for_core(ours)
        assert ours.recv(100) == b"\x7fELF core"


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=64)
    | st.builds(lambda head, rest: head + rest, st.just(REQUEST), st.binary(max_size=40))
)
def test_any_bytes_are_refused_or_answered_with_sixteen_bytes(sent):
    answer, end = answer_to(sent, b"")
    assert len(answer) in (0, 16)
    assert end or answer or sent.startswith(b"\x7fELF")


def test_silent_peer_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setattr(request, "SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"\x10")
        with pytest.raises(Refused, match="sent nothing"):
            ask_for_core(ours)


def test_process_that_dumps_no_core_is_no_peer(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "k"))
        listening.listen()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(tmp_path / "k"))
            connection, _ = listening.accept()
            before = len(os.listdir("/proc/self/fd"))
            with connection, pytest.raises(Refused):  # kernels before 6.16 cannot tell
                Peer(connection)
            assert len(os.listdir("/proc/self/fd")) == before - 1, "no descriptor stays open"


def test_name_is_written_as_the_kernel_writes_it():
    assert [_as_e(name) for name in ("", ".", "..", "a/b", "...")] == ["!", "!", "!.", "a!b", "..."]


# From the request to the dump


class Kernel:
    """Plays the kernel for one crash, whose process is this one."""

    def __init__(self, station):
        command = [str(word) for word in station.command()]
        crash = parse_arguments(command[1:])
        self.stream, theirs = socket.socketpair()
        self.turn, released = os.pipe()
        self.child = os.fork()
        if not self.child:
            self.stream.close()
            peer = SimpleNamespace(crash=lambda config: crash)
            connection = _socket.socket(fileno=theirs.detach())
            waiting = SimpleNamespace(connection=connection, peer=peer, since=time.monotonic())
            crash.config = str(station.directory / "helper.conf")
            os._exit(SocketHandler(waiting, crash.config, ownmemory.OwnMemory(), released).handle())
        theirs.close()
        os.close(released)

    def send(self, core):
        """Send a core, as far as the helper reads it."""
        self.stream.sendall(REQUEST)
        assert self.stream.recv(16, socket.MSG_WAITALL) == KERNEL_WAIT
        self.stream.sendall(ACCEPTED + core)
        self.stream.shutdown(socket.SHUT_WR)

    def wait_until_released(self):
        """Wait until the helper lets the process go, and tells the listener."""
        assert self.stream.recv(1) == b""

    def end(self):
        """Return the exit code of the helper's child."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        assert os.read(self.turn, 2) == b"."
        os.close(self.turn)
        self.stream.close()
        return code


@pytest.mark.parametrize("size", [4096, 300_000, (1 << 20) - 4096, (1 << 20) + 1, 3 << 20, 9 << 20])
def test_core_of_any_size_that_comes_over_a_socket_is_whole(station, size):
    core = elf(os.urandom(size))
    kernel = Kernel(station)
    kernel.send(core)
    kernel.wait_until_released()
    assert kernel.end() == 0
    assert station.core() == core
    assert station.attributes()["bytes"] == station.attributes()["expected_bytes"]
    assert "truncated" not in station.attributes()


def test_small_core_that_ends_early_is_flagged_killed(station):
    kernel = Kernel(station)
    kernel.send(elf(b"small" * 1000)[:-100])
    kernel.wait_until_released()
    assert kernel.end() == 0
    assert station.attributes()["truncated"] == "killed"


# Where the socket may lie


@pytest.fixture
def private(tmp_path):
    (tmp_path / "s").mkdir(mode=0o755)
    return tmp_path / "s"


def test_directory_of_this_user_becomes_private(private):
    os.close(socketpath.open_directory(str(private / "k")))
    assert private.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_directory_that_others_can_write_to_is_refused(private, mode):
    private.chmod(mode)
    with pytest.raises(socketpath.PathError, match=f"others than root can change {private}"):
        socketpath.open_directory(str(private / "k"))


def test_directory_whose_parent_others_can_write_to_is_refused(private):
    private.parent.chmod(0o777)
    with pytest.raises(socketpath.PathError, match="others than root can change"):
        socketpath.open_directory(str(private / "k"))
    private.parent.chmod(0o1777)
    if os.geteuid() == 0:
        os.close(socketpath.open_directory(str(private / "k")))


def test_symbolic_link_on_the_path_is_refused_because_the_kernel_does_not_follow_it(private):
    (private.parent / "link").symlink_to(private)
    with pytest.raises(socketpath.PathError, match="is a symbolic link"):
        socketpath.open_directory(str(private.parent / "link" / "k"))


@pytest.mark.parametrize(
    "path",
    ["", "k", "s/k", "/k", "/run//k", "/run/s/", "/run/./k", "/run/../k", "/run/s/%p", "/run/a b/k", "/run/s/\n",
     "/run/s/" + "k" * 99, "/run/\udcff/k"],
)  # fmt: skip
def test_path_that_the_kernel_cannot_use_is_refused(path):
    with pytest.raises(socketpath.PathError):
        socketpath.open_directory(path)


def test_new_socket_takes_the_name_of_the_old_one_in_one_step(private):
    path = str(private / "k")
    directory = socketpath.open_directory(path)
    inodes, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            inodes.add(os.stat(path).st_ino)

    listening = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    socketpath.bind(listening[0], path, directory)
    watcher = threading.Thread(target=look)
    watcher.start()
    for each in listening[1:]:
        socketpath.bind(each, path, directory)
    stop.set()
    watcher.join()
    assert os.listdir(private) == ["k"], "and it was there all the time"
    for each in listening:
        each.close()
    os.close(directory)


@pytest.mark.parametrize("arguments", [[], ["relative"], ["/run/s/%p"], ["-C/etc/x"]])
def test_unusable_path_is_one_line_and_exit_code_two(arguments):
    program = Path(__file__).parents[2] / "helper" / "core-dump-helper"
    done = subprocess.run([program, "--listen", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("core-dump-helper --listen: ")


# Whose turn it is


class Quiet:
    def close(self):
        pass


def turns(most=8, waiting=(), processes=64, **how):
    found = Turns()
    found.set_limits(most, processes, 300, **{"has_vital": True} | how)
    found.waiting = [Waiting(Quiet(), Quiet(), origin, 0.0) for origin in waiting]
    return found


def start(found, now):
    """Start every child whose turn it is; return the origins and kinds in order."""
    started = []
    for waiting, child in found.ready(now):
        found.children[len(found.children) + 100] = child
        started.append((waiting.origin, child.kind))
    return started


def test_origin_gets_half_of_the_children_and_the_next_one_still_finds_some():
    found = turns(8, [b"noisy"] * 100 + [b"quiet"] * 3)
    started = start(found, 0.1)
    assert started == [(b"noisy", NORMAL)] * 4 + [(b"quiet", NORMAL)] * 2
    assert len(found.waiting) == 97


def test_crash_that_waits_for_long_gets_a_late_child():
    found = turns(2, [b"a"] * 100)
    assert start(found, 0.1) == [(b"a", NORMAL)]
    assert start(found, 0.6) == [(b"a", LATE)] * (VITAL_SLOTS // 2)


def test_no_late_children_exist_where_no_vital_part_is_kept():
    found = turns(2, [b"a"] * 100, has_vital=False)
    assert start(found, 299) == [(b"a", NORMAL)]


def test_crash_beyond_the_deadline_gets_a_child_that_refuses_it():
    found = turns(1, [b"a"] * 3, processes=2, has_vital=False)
    assert start(found, 1)
    assert start(found, 300) == [(b"a", LATE)], "no more than two may exist"


def test_child_whose_process_is_released_makes_room():
    found = turns(2, [b"a"] * 3, has_vital=False)
    start(found, 0.1)
    next(iter(found.children.values())).has_turn = False
    assert start(found, 0.1) == [(b"a", NORMAL)]


def test_children_of_one_origin_that_wait_for_slots_leave_room_for_others():
    found = turns(8, [b"noisy"] * 100, processes=16, has_vital=False)
    for _ in range(20):
        start(found, 0.1)
        for child in found.children.values():
            child.has_turn = False
    assert len(found.children) == 8
    found.waiting.append(Waiting(Quiet(), Quiet(), b"quiet", 0.0))
    assert start(found, 0.1) == [(b"quiet", NORMAL)]


def test_connections_of_one_origin_leave_room_for_those_of_others():
    found = turns(2, processes=4, has_vital=False)
    for _ in range(100):
        found.add(Waiting(Quiet(), Quiet(), b"noisy", 1000.0), 64)
    patient = [waiting for waiting in found.waiting if waiting.since == 1000.0]
    assert len(patient) == 32, "half of the table; further ones are refused"
    found.waiting = patient
    found.add(Waiting(Quiet(), Quiet(), b"quiet", 1000.0), 64)
    assert (b"quiet", NORMAL) in start(found, 1000.1)


# When something fails


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as connections:
        connections.bind(str(tmp_path / "k"))
        connections.listen()
        found = Listener(connections, str(tmp_path / "k"), "/nowhere", ownmemory.OwnMemory(), is_kept=True)
        yield found
        for descriptor in found._wakeup:
            os.close(descriptor)


def refuse(*_):
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("call", ["pipe2", "fork"])
def test_crash_waits_while_no_child_can_be_started(listener, monkeypatch, call):
    listener._turns = turns(8, [b"a", b"b"])
    first = listener._turns.waiting[0]
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, refuse)
    listener._start_children()
    assert listener._turns.waiting[0] is first
    assert (len(listener._turns.waiting), listener._turns.children) == (2, {})
    assert os.listdir("/proc/self/fd") == before


def test_score_that_cannot_be_changed_costs_no_dump(tmp_path, monkeypatch):
    memory = ownmemory.OwnMemory()
    for path in (tmp_path / "none", tmp_path):  # as if /proc were read-only
        monkeypatch.setattr(ownmemory, "OOM_SCORE_PATH", str(path))
        memory.sacrifice()


def test_dump_is_finished_though_its_listener_was_killed(monkeypatch):
    ended, released = os.pipe()
    os.close(ended)
    handler = object.__new__(SocketHandler)
    handler._released, handler.held = released, SimpleNamespace(was_let_go=False)
    finished = []
    monkeypatch.setattr(Handler, "record_result", lambda *given: finished.append(given))
    handler.record_result(-1, None, "", 0)
    os.close(released)
    assert finished


# Memory


def test_limit_of_the_cgroup_bounds_the_children_and_what_each_may_read(tmp_path, monkeypatch):
    group = tmp_path / "pod" / "receiver"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{256 << 20}\n")
    (tmp_path / "pod" / "memory.max").write_text("max\n")
    monkeypatch.setattr(ownmemory, "CGROUPS", str(tmp_path))
    read = ownmemory._read
    own = "0::/pod/receiver/\n"
    monkeypatch.setattr(ownmemory, "_read", lambda path: own if path == "/proc/self/cgroup" else read(path))
    memory = ownmemory.OwnMemory()
    assert (memory.limit_bytes, memory.directory) == (256 << 20, str(group))
    most = memory.most_children(0)
    assert (most + VITAL_SLOTS) * ownmemory.CHILD_BYTES == 128 << 20
    assert memory.vital_bytes() * (most + VITAL_SLOTS) * ownmemory.VITAL_FACTOR <= 128 << 20
    assert memory.most_children(2) == 2


def test_no_limit_of_the_cgroup_leaves_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(ownmemory, "CGROUPS", str(tmp_path))
    memory = ownmemory.OwnMemory()
    assert memory.most_children(8) == 8
    assert memory.most_children(0) == 256

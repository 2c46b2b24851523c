"""Reading the kernel log: both interfaces, lost records, forged lines, and where a restarted collector goes on."""

import os
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest
from prometheus_client import CollectorRegistry, Counter

from core_dump_collector.jobs import Outcome, UploadResult
from core_dump_collector.losses import kernellog, position, watcher
from core_dump_collector.losses.counters import LossMetrics
from core_dump_collector.losses.kernellog import Batch, DeviceReader, Line, SyscallReader
from core_dump_collector.losses.position import Position
from core_dump_collector.losses.watcher import KernelLog
from core_dump_collector.observation import Observer
from core_dump_collector.results import Results


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(watcher, "SCRAPED_SECONDS", 0)


DROP = b"coredump: 12(app): over core_pipe_limit, skipping core dump"


def test_records_of_the_device_are_numbered_and_unescaped(tmp_path):
    parse = DeviceReader._parse
    line = parse(DeviceReader, rb"28,1803,1129252718,-;a\x0ab" + b"\n SUBSYSTEM=x\n")
    assert line == Line(1129252718, 3, b"a\nb", 1803)
    assert parse(DeviceReader, b"6,1,5,-,caller=T12;x\n") == Line(5, 0, b"x", 1)
    assert parse(DeviceReader, b"nonsense") is None
    (tmp_path / "file").write_bytes(b"6,1,5,-;x\n")
    with pytest.raises(OSError, match="No such device"):
        DeviceReader(str(tmp_path / "file"))


def test_lines_of_one_record_are_joined_so_that_none_can_be_forged():
    text = (
        b"cut off\n<6>[    1.000001] x\n<6>[    1.000001] " + DROP + b"\n<6>[    1.000001] y[1,2+3]\n"
        b"<4>[    1.000002][  T12] one\n<12>[12345.678901] of a user\n"
    )
    assert SyscallReader.split(text) == [
        Line(1_000_001, 0, b"x\n" + DROP + b"\ny[1,2+3]"),
        Line(1_000_002, 0, b"one"),
        Line(12_345_678_901, 1, b"of a user"),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="reads the log of this machine")
@pytest.mark.parametrize("opened", [lambda: DeviceReader(kernellog.DEVICE), SyscallReader])
def test_new_record_is_read_once(opened):
    reader = opened()
    mark = f"kernel-log-test {os.getpid()} {time.monotonic_ns()}"
    while reader.read().lines:
        pass
    with open(kernellog.DEVICE, "wb", buffering=0) as device:
        device.write(f"<28>{mark}\n<28>".encode())
        device.write(b"<31>end\n")  # a record is readable once it is complete
    assert [line.facility for line in reader.read().lines if mark.encode() in line.text] == [3]
    assert not [line for line in reader.read().lines if mark.encode() in line.text]
    reader.close()


CAPABILITIES = """
import sys
from core_dump_collector.losses import kernellog
try:
    print(kernellog.open_reader(sys.argv[1]).name)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="drops capabilities")
@pytest.mark.parametrize(
    ("capabilities", "device", "found"),
    [
        ("-all,+syslog", "/nonexistent", "syslog(2)"),
        ("-all,+syslog", kernellog.DEVICE, kernellog.DEVICE),
        ("-all", "/nonexistent", "Operation not permitted"),
        ("-all", kernellog.DEVICE, "Operation not permitted"),
    ],
)
def test_cap_syslog_alone_reads_the_log_where_it_is_restricted(capabilities, device, found):
    with open("/proc/sys/kernel/dmesg_restrict") as file:
        if file.read().strip() != "1":
            pytest.skip("kernel.dmesg_restrict is 0: everybody may read the log")
    command = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]
    done = subprocess.run(
        [*command, sys.executable, "-c", CAPABILITIES, device], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == found, done.stderr


class Script:
    """A kernel log whose records a test writes."""

    name = "a test"

    def __init__(self, lines=()):
        self.lines, self.lost = list(lines), 0

    def read(self):
        lines, self.lines = tuple(self.lines), []
        lost, self.lost = self.lost, 0
        return Batch(lines, lost)

    def close(self):
        pass


class Denied:
    def __call__(self):
        raise PermissionError(1, "Operation not permitted")


class Watched:
    """A watch on a scripted log."""

    def __init__(self, directory, lines=(), opener=None):
        self.registry = CollectorRegistry()
        self.metrics = LossMetrics(self.registry)
        self.script = Script(lines)
        self.log = KernelLog(
            str(directory),
            self.metrics,
            Observer(Counter("failures", "Failures.", ["what"], registry=CollectorRegistry())),
            sees_node=True,
            open_reader=opener or (lambda: self.script),
        )
        self.log.follow()

    def write(self, *texts, facility=0, sequence=-1):
        now = time.monotonic_ns() // 1000
        self.script.lines += [Line(now + i, facility, text, sequence) for i, text in enumerate(texts)]
        self.log.follow()

    def value(self, name, **labels):
        return self.registry.get_sample_value(name, labels)

    def documents(self):
        while (document := self.log.next_document(time.time(), time.monotonic())) is not None:
            yield document.name, dict(document.facts)
            self.log.finish(document.name, time.monotonic(), stored=True)


def dropped(watched, reason="pipe_limit"):
    return watched.value("core_dump_kernel_dropped_total", reason=reason)


def test_unreadable_log_is_not_watched_and_shows_no_zero(tmp_path):
    watched = Watched(tmp_path, opener=Denied())
    assert watched.value("core_dump_kernel_log_watched") == 0
    assert dropped(watched) is None
    assert watched.value("core_dump_oom_kills_total") is None
    assert "CAP_SYSLOG" in watched.log.obstacle


def test_loss_is_counted_and_recorded_with_name_and_pid(tmp_path):
    watched = Watched(tmp_path)
    watched.write(DROP)
    assert dropped(watched) == 1
    assert watched.value("core_dump_crashes_seen_total", outcome="kernel") == 1
    [(name, facts)] = watched.documents()
    assert name.startswith(".kernel-log/storm-")
    assert (facts["comm"], facts["pid"], facts["reason"], facts["suppressed"]) == ("app", 12, "pipe_limit", 1)
    assert abs(facts["timestamp"] - time.time()) < 5


def test_many_losses_of_one_name_are_two_records(tmp_path):
    watched = Watched(tmp_path)
    watched.write(*[DROP] * 50)
    assert dropped(watched) == 50
    assert len(list(watched.documents())) == 1
    [(_, facts)] = [
        (document.name, dict(document.facts))
        for document in [watched.log.next_document(time.time() + watcher.GRACE_SECONDS * 2, time.monotonic())]
    ]
    assert facts["suppressed"] == 49


def test_restart_counts_nothing_twice_and_nothing_too_few(tmp_path):
    before = Watched(tmp_path)
    before.write(DROP)
    list(before.documents())
    before.log.close()
    now = time.monotonic_ns() // 1000
    old = Line(position.load(str(tmp_path)).read, 0, DROP)
    after = Watched(tmp_path, [old, Line(now, 0, DROP), Line(now + 1, 0, DROP)])
    assert dropped(after) == 2
    assert after.value("core_dump_kernel_log_lost_total") == 0


def test_record_that_was_not_stored_before_a_restart_is_stored_after_it_and_not_counted(tmp_path):
    before = Watched(tmp_path)
    before.write(DROP)
    before.log._saver.end()
    line = Line(position.load(str(tmp_path)).read, 0, DROP)
    name = before.log.next_document(time.time(), time.monotonic()).name
    after = Watched(tmp_path, [line])
    assert dropped(after) == 0
    assert [found.rpartition("-")[0] for found, _ in after.documents()] == [name.rpartition("-")[0]]


def test_losses_of_the_time_without_a_collector_are_counted_after_a_scrape_has_seen_zeros(
    tmp_path, monkeypatch
):
    Watched(tmp_path).log.close()
    monkeypatch.setattr(watcher, "SCRAPED_SECONDS", 3600)
    after = Watched(tmp_path, [Line(time.monotonic_ns() // 1000, 0, DROP)])
    assert dropped(after) == 0
    after.log._read_due = 0
    after.log.follow()
    assert dropped(after) == 1


@pytest.mark.parametrize("sequence", [-1, 7])
def test_first_start_begins_at_the_end_of_the_log_and_another_boot_at_its_start(tmp_path, sequence):
    line = Line(1000, 0, DROP, sequence)
    first = Watched(tmp_path, [line])
    assert (dropped(first), list(first.documents())) == (0, [])
    first.log.close()
    position.save(str(tmp_path), Position("abc-1", 7, 1, 2, 3))
    assert dropped(Watched(tmp_path, [line])) == 1


def test_records_overwritten_while_no_collector_ran_are_counted(tmp_path):
    now = time.monotonic_ns() // 1000
    position.save(str(tmp_path), Position(kernellog.boot_id(), 100, now - 9, now - 9, now - 9))
    watched = Watched(tmp_path, [Line(now, 0, b"x", 150), Line(now + 1, 0, b"y", 151)])
    assert watched.value("core_dump_kernel_log_lost_total") == 49
    watched.script.lost = 3
    watched.log.follow()
    assert watched.value("core_dump_kernel_log_lost_total") == 52


@pytest.mark.parametrize("value", [b"", b"1 x", b"1 b 1 2 3 " + b"9" * 30, b"\xff" * 50, b"2 b -1 1 2 3"])
def test_damaged_position_is_none(tmp_path, value):
    os.setxattr(tmp_path, position.ATTRIBUTE, value)
    assert position.load(str(tmp_path)) is None


@pytest.mark.parametrize(
    "numbers", [(-1, 9**18, 9**18, 0), (-1, 5, 4, 0), (-1, 0, 0, 9**18), (5, 1, 9**18, 1)]
)
def test_position_that_cannot_be_hides_no_loss(tmp_path, numbers):
    position.save(str(tmp_path), Position(kernellog.boot_id(), *numbers))
    watched = Watched(tmp_path)
    watched.write(DROP)
    assert dropped(watched) == 1


@pytest.mark.parametrize(
    ("mode", "believed"), [(0o700, True), (0o1777, True), (0o777, False), (0o770, False)]
)
def test_position_is_believed_where_nobody_else_can_have_forged_it(tmp_path, mode, believed):
    position.save(str(tmp_path), Position("b00", read=1))
    tmp_path.chmod(mode)
    assert (position.load(str(tmp_path)) is not None) is believed


def test_missing_helper_is_told_from_one_that_cannot_be_executed(tmp_path):
    (tmp_path / "helper").write_text("")
    watched = Watched(tmp_path)
    watched.write(
        b"coredump: 1(a): |%s/gone -P1 pipe failed" % os.fsencode(tmp_path),
        b"coredump: 2(b): |%s/helper -P2 pipe failed" % os.fsencode(tmp_path),
    )
    assert (dropped(watched, "helper_missing"), dropped(watched, "helper_not_started")) == (1, 1)


def test_fault_is_explained_by_a_dump_that_waits_and_lost_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "GRACE_SECONDS", 0.0)
    (tmp_path / f"core-a b-{int(time.time())}-7-11").write_bytes(b"")
    watched = Watched(tmp_path)
    fault = b"[12]: segfault at 8 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 6 in x[1,2+3]"
    watched.write(b"a b" + fault, b"other" + fault)
    watched.log.follow()
    assert watched.value("core_dump_crashes_seen_total", outcome="no_trace") == 1
    assert [facts["comm"] for _, facts in watched.documents()] == ["other"]


def test_many_dumps_that_wait_for_the_store_hide_no_dump_of_a_new_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "GRACE_SECONDS", 0.0)
    crashed = int(time.time())
    waiting = [f"core-old-{crashed - 9000 + n}-7-11.gz" for n in range(5000)]
    monkeypatch.setattr(watcher, "_names", lambda _: [f"core-new-{crashed}-7-11.gz", *waiting])
    watched = Watched(tmp_path)
    watched.write(b"new[12]: segfault at 8 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 6 in x[1,2+3]")
    watched.log.follow()
    assert watched.value("core_dump_crashes_seen_total", outcome="no_trace") == 0


@pytest.mark.parametrize("outcome", [Outcome.QUARANTINED, Outcome.DISCARDED])
def test_dump_that_never_reaches_the_bucket_is_counted_as_that_alone(tmp_path, monkeypatch, outcome):
    monkeypatch.setattr(watcher, "GRACE_SECONDS", 0.0)
    watched = Watched(tmp_path)
    others = [MagicMock() for _ in range(5)]
    results = Results(str(tmp_path), *others, kernel_log=watched.log, metrics=MagicMock())
    results.apply(UploadResult(f"core-app-{int(time.time())}-7-11", outcome))
    watched.write(b"app[12]: segfault at 8 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 6 in x[1,2+3]")
    watched.log.follow()
    assert watched.value("core_dump_crashes_seen_total", outcome="no_trace") == 0


def test_oom_kills_and_suppressed_faults_are_no_crashes(tmp_path):
    watched = Watched(tmp_path)
    watched.write(b"Out of memory: Killed process 4 (hog) total-vm:1kB, anon-rss:1kB")
    watched.write(b"show_signal_msg: 13 callbacks suppressed")
    assert watched.value("core_dump_oom_kills_total") == 1
    assert watched.value("core_dump_faults_suppressed_total") == 13
    assert watched.value("core_dump_crashes_seen_total", outcome="no_trace") == 0


def test_empty_partial_of_a_killed_helper_is_a_loss(tmp_path):
    watched = Watched(tmp_path)
    watched.log.lose_partial(f"core-app-{int(time.time())}-7-6.gz.partial")
    assert watched.value("core_dump_helper_failures_total", reason="killed") == 1


def test_names_chosen_at_random_fill_no_bucket(tmp_path):
    watched = Watched(tmp_path)
    watched.write(*[b"coredump: 1(x%d): over core_pipe_limit, skipping core dump" % n for n in range(1000)])
    assert dropped(watched) == 1000
    found = list(watched.documents())
    assert len(found) == 201
    assert found[-1][1]["comm"] == "*"


def test_long_log_is_read_in_pieces_by_syslog(monkeypatch):
    text = b"".join(b"<6>[%5d.000000] line %d\n" % (n, n) for n in range(12))
    reader = SyscallReader.__new__(SyscallReader)
    reader._last, reader._before = None, b""
    reader._buffer = type("Buffer", (), {"raw": text, "__len__": lambda _: len(text)})()
    reader._call = lambda *_: len(reader._buffer.raw)
    monkeypatch.setattr(kernellog, "MOST_LINES", 5)
    found = [[int(line.text.split()[1]) for line in reader.read().lines] for _ in range(4)]
    assert found == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], []]
    reader._buffer.raw = text[text.index(b"<6>[   11") :] + b"<6>[   12.000000] line 12\n"
    assert [line.text for line in reader.read().lines] == [b"line 12"]
    reader._buffer.raw = b"<6>[   99.000000] line 99\n"
    assert (reader.read().lost, reader.read().lost) == (1, 0)


def test_file_system_that_hangs_holds_up_neither_reading_nor_the_end(tmp_path, monkeypatch):
    entered, released = threading.Event(), threading.Event()

    def hang(directory, place):
        entered.set()
        released.wait(30)

    monkeypatch.setattr(position, "save", hang)
    monkeypatch.setattr(position, "_END_SECONDS", 0.1)
    watched = Watched(tmp_path)
    watched.write(DROP)
    assert entered.wait(10)
    watched.write(DROP)
    assert dropped(watched) == 2
    watched.log.close()
    released.set()


def test_newest_position_is_saved_at_the_end(tmp_path):
    watched = Watched(tmp_path)
    for _ in range(50):
        watched.write(DROP)
    newest = watched.log._position.read
    watched.log.close()
    assert position.load(str(tmp_path)).read == newest

"""Files are opened without being fooled, salvaged only when abandoned, and deleted only when they are the ones read."""

import contextlib
import fcntl
import gzip
import os
import stat
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core_dump_collector.node import dumpfile
from core_dump_collector.node.dumpfile import DumpFile, Unfit, UnfitError

NAME = "core-app-1700000000-42-11.gz"
PARTIAL = NAME + ".partial"


def refusal(directory, name):
    with pytest.raises(UnfitError) as raised, DumpFile(str(directory), name):
        pass
    return raised.value.why


def make_symlink(path):
    path.with_name("secret").write_bytes(b"secret")
    path.symlink_to("secret")


def make_hard_link(path):
    path.with_name("secret").write_bytes(b"secret")
    path.hardlink_to(path.with_name("secret"))


def make_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


def make_device(path):
    if os.geteuid() != 0:
        pytest.skip("making a device needs root")
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero would be read for ever


STRANGE = {
    "symlink": make_symlink,
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "symlink to a directory": lambda path: path.symlink_to("/etc"),
    "hard link": make_hard_link,
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "device": make_device,
    "directory": os.mkdir,
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_lone_regular_file_is_refused_without_waiting(watch_dir, make):
    make(watch_dir / NAME)
    assert refusal(watch_dir, NAME) is Unfit.REFUSED


@pytest.mark.parametrize("name", ["", ".", "..", "../etc/passwd", "a/b", "/etc/passwd", "a\0b"])
def test_a_name_that_is_a_path_is_refused(watch_dir, name):
    assert refusal(watch_dir, name) is Unfit.REFUSED


@pytest.mark.parametrize("name", ["core\nx", "core" + "a" * 251, "core\udcff\udc80", "core -rf $(x)"])
def test_hostile_names_are_opened_as_any_other(watch_dir, name):
    (watch_dir / name).write_bytes(b"dump")
    with DumpFile(str(watch_dir), name) as dump:
        assert os.pread(dump.fd, 10, 0) == b"dump"
        assert dump.unlink()
    assert not list(watch_dir.iterdir())


def test_a_file_that_is_gone_has_vanished(watch_dir):
    assert refusal(watch_dir, NAME) is Unfit.VANISHED
    assert refusal(watch_dir / "gone", NAME) is Unfit.VANISHED


def test_a_file_open_for_writing_is_busy_until_it_is_closed(watch_dir):
    with (watch_dir / NAME).open("wb") as writer:
        writer.write(b"half")
        assert refusal(watch_dir, NAME) is Unfit.BUSY
    with DumpFile(str(watch_dir), NAME) as dump:
        assert dump.size_bytes == 4


def test_a_reader_does_not_make_a_file_busy(watch_dir):
    (watch_dir / NAME).write_bytes(b"dump")
    with (watch_dir / NAME).open("rb"), DumpFile(str(watch_dir), NAME) as dump:
        assert dump.is_unchanged()


MEET_A_WRITER = """
import os, sys
from core_dump_collector.node import dumpfile
fd = os.open(sys.argv[1], os.O_RDONLY)
dumpfile._take_lease(fd)
try:
    os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
except BlockingIOError:
    print("survived the breaking of its lease")
"""


def test_a_writer_that_meets_our_lease_does_not_end_the_process(watch_dir):
    (watch_dir / NAME).write_bytes(b"dump")
    command = [sys.executable, "-c", MEET_A_WRITER, watch_dir / NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "survived the breaking of its lease\n"), done.stderr


def test_writers_that_come_all_the_time_are_not_held_up(watch_dir):
    (watch_dir / NAME).write_bytes(b"dump")
    stop = threading.Event()

    def write_all_the_time():
        while not stop.is_set():
            os.close(os.open(watch_dir / NAME, os.O_WRONLY))

    writer = threading.Thread(target=write_all_the_time)
    writer.start()
    try:
        for _ in range(300):
            with contextlib.suppress(UnfitError), DumpFile(str(watch_dir), NAME):
                pass
    finally:
        stop.set()
        writer.join(5)
    assert not writer.is_alive()


def test_a_file_that_grows_is_seen_to_have_changed(watch_dir):
    (watch_dir / NAME).write_bytes(b"dump")
    with DumpFile(str(watch_dir), NAME) as dump:
        with (watch_dir / NAME).open("ab") as writer:
            assert not dump.is_unchanged()
            writer.write(b"more")
        assert not dump.is_unchanged()


def test_a_file_swapped_for_another_is_not_deleted(watch_dir):
    (watch_dir / NAME).write_bytes(b"old")
    with DumpFile(str(watch_dir), NAME) as dump:
        (watch_dir / "new").write_bytes(b"new")
        (watch_dir / "new").rename(watch_dir / NAME)
        assert not dump.unlink()
        with pytest.raises(UnfitError):
            dump.quarantine()
    assert (watch_dir / NAME).read_bytes() == b"new"


def test_a_file_swapped_for_a_symlink_leaves_its_target_alone(watch_dir, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (watch_dir / NAME).write_bytes(b"old")
    with DumpFile(str(watch_dir), NAME) as dump:
        (watch_dir / NAME).unlink()
        (watch_dir / NAME).symlink_to(target)
        assert not dump.unlink()
    assert target.read_bytes() == b"precious"


def test_a_file_deleted_by_somebody_else_is_no_error(watch_dir):
    (watch_dir / NAME).write_bytes(b"old")
    with DumpFile(str(watch_dir), NAME) as dump:
        (watch_dir / NAME).unlink()
        assert not dump.unlink()


def test_the_quarantine_keeps_every_file_that_had_the_same_name(watch_dir):
    for content in (b"1", b"2", b"3"):
        (watch_dir / NAME).write_bytes(content)
        with DumpFile(str(watch_dir), NAME) as dump:
            dump.quarantine()
    kept = {path.name: path.read_bytes() for path in (watch_dir / "quarantine").iterdir()}
    assert kept == {NAME: b"1", NAME.replace(".gz", "-1.gz"): b"2", NAME.replace(".gz", "-2.gz"): b"3"}
    assert (watch_dir / "quarantine").stat().st_mode & 0o777 == 0o700


def test_a_quarantine_that_is_a_symlink_is_not_followed(watch_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (watch_dir / "quarantine").symlink_to(elsewhere)
    (watch_dir / NAME).write_bytes(b"1")
    with DumpFile(str(watch_dir), NAME) as dump, pytest.raises(OSError, match="directory"):
        dump.quarantine()
    assert (watch_dir / NAME).exists()
    assert not list(elsewhere.iterdir())


def test_descriptors_are_closed_whatever_happens(watch_dir):
    (watch_dir / NAME).write_bytes(b"dump")
    os.mkfifo(watch_dir / "core-fifo")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with DumpFile(str(watch_dir), NAME):
            pass
        refusal(watch_dir, "core-fifo")
        refusal(watch_dir, "core-gone")
        assert dumpfile.salvage(str(watch_dir), "core-gone.partial") is None
    assert len(os.listdir("/proc/self/fd")) == before


# Salvage


class TestAbandonedPartial:
    def test_is_published_and_flagged(self, watch_dir):
        (watch_dir / PARTIAL).write_bytes(gzip.compress(b"dump")[:-4])
        assert dumpfile.salvage(str(watch_dir), PARTIAL) == NAME
        assert os.listdir(watch_dir) == [NAME]
        assert os.getxattr(watch_dir / NAME, "user.coredump.truncated") == b"salvaged"
        assert os.getxattr(watch_dir / NAME, dumpfile.SALVAGED) == b"1"

    def test_keeps_the_reason_that_the_helper_gave(self, watch_dir):
        (watch_dir / PARTIAL).write_bytes(b"x")
        os.setxattr(watch_dir / PARTIAL, "user.coredump.truncated", b"disk_full")
        dumpfile.salvage(str(watch_dir), PARTIAL)
        assert os.getxattr(watch_dir / NAME, "user.coredump.truncated") == b"disk_full"

    def test_never_replaces_a_dump_of_its_name(self, watch_dir):
        (watch_dir / NAME).write_bytes(b"whole")
        (watch_dir / PARTIAL).write_bytes(b"half")
        assert dumpfile.salvage(str(watch_dir), PARTIAL) == NAME.replace(".gz", "-1.gz")
        assert (watch_dir / NAME).read_bytes() == b"whole"

    def test_is_removed_when_nothing_is_in_it(self, watch_dir):
        (watch_dir / PARTIAL).touch()
        assert dumpfile.salvage(str(watch_dir), PARTIAL) == ""
        assert not list(watch_dir.iterdir())

    def test_is_left_alone_while_its_helper_holds_the_lock(self, watch_dir):
        with (watch_dir / PARTIAL).open("wb") as helper:
            fcntl.flock(helper, fcntl.LOCK_EX)
            assert dumpfile.salvage(str(watch_dir), PARTIAL) is None
            assert (watch_dir / PARTIAL).exists()

    def test_published_by_its_helper_before_it_was_locked_is_not_touched(self, watch_dir, monkeypatch):
        (watch_dir / PARTIAL).write_bytes(b"whole")

        def helper_is_faster(descriptor, operation, lock=fcntl.flock):
            os.rename(watch_dir / PARTIAL, watch_dir / NAME)
            (watch_dir / PARTIAL).write_bytes(b"of another crash")
            lock(descriptor, operation)

        monkeypatch.setattr(dumpfile.fcntl, "flock", helper_is_faster)
        assert dumpfile.salvage(str(watch_dir), PARTIAL) is None
        assert (watch_dir / NAME).read_bytes() == b"whole"
        assert (watch_dir / PARTIAL).read_bytes() == b"of another crash"
        assert os.listxattr(watch_dir / NAME) == os.listxattr(watch_dir / PARTIAL) == []

    @pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
    def test_is_left_alone_when_it_is_no_lone_regular_file(self, watch_dir, make):
        make(watch_dir / PARTIAL)
        before = sorted(os.listdir(watch_dir))
        assert dumpfile.salvage(str(watch_dir), PARTIAL) is None
        assert sorted(os.listdir(watch_dir)) == before

    @pytest.mark.parametrize("taken", [0, 2])
    def test_that_was_published_and_kept_its_old_name_too_loses_it(self, watch_dir, taken):
        """The collector was killed between link and unlink, where the file system cannot rename without replacing."""
        names = [NAME, *(NAME.replace(".gz", f"-{n}.gz") for n in (1, 2))]
        for name in names[:taken]:
            (watch_dir / name).write_bytes(b"another")
        (watch_dir / PARTIAL).write_bytes(b"half")
        (watch_dir / names[taken]).hardlink_to(watch_dir / PARTIAL)
        assert dumpfile.salvage(str(watch_dir), PARTIAL) == names[taken]
        assert sorted(os.listdir(watch_dir)) == sorted(names[: taken + 1])
        assert (watch_dir / names[taken]).read_bytes() == b"half"
        with DumpFile(str(watch_dir), names[taken]) as dump:
            assert dump.size_bytes == 4

    def test_whose_new_name_is_opened_first_loses_its_old_name(self, watch_dir):
        (watch_dir / PARTIAL).write_bytes(b"half")
        (watch_dir / NAME).hardlink_to(watch_dir / PARTIAL)
        with DumpFile(str(watch_dir), NAME) as dump:
            assert dump.size_bytes == 4
        assert os.listdir(watch_dir) == [NAME]

    def test_in_quarantine_that_kept_its_old_name_too_loses_it(self, watch_dir):
        (watch_dir / "quarantine").mkdir(0o700)
        (watch_dir / NAME).write_bytes(b"refused")
        (watch_dir / "quarantine" / NAME).hardlink_to(watch_dir / NAME)
        assert refusal(watch_dir, NAME) is Unfit.VANISHED
        assert os.listdir(watch_dir) == ["quarantine"]
        assert (watch_dir / "quarantine" / NAME).read_bytes() == b"refused"

    @pytest.mark.parametrize("third", [False, True])
    def test_keeps_its_name_where_the_other_names_are_not_ours(self, watch_dir, third):
        (watch_dir / PARTIAL).write_bytes(b"half")
        (watch_dir / "other").hardlink_to(watch_dir / PARTIAL)
        if third:
            (watch_dir / NAME).hardlink_to(watch_dir / PARTIAL)
        before = sorted(os.listdir(watch_dir))
        assert dumpfile.salvage(str(watch_dir), PARTIAL) is None
        assert sorted(os.listdir(watch_dir)) == before

    def test_name_that_no_partial_could_have_is_opened(self, watch_dir):
        name = "core-" + "a" * 250
        (watch_dir / name).write_bytes(b"dump")
        with DumpFile(str(watch_dir), name) as dump:
            assert dump.size_bytes == 4

    def test_in_a_directory_that_is_gone_is_no_error(self, watch_dir):
        assert dumpfile.salvage(str(watch_dir / "gone"), PARTIAL) is None


@given(st.lists(st.sampled_from(["write", "swap", "delete", "truncate", "touch"]), min_size=1, max_size=6))
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_only_the_very_file_that_was_read_is_ever_deleted(tmp_path, acts):
    path = tmp_path / NAME
    path.write_bytes(b"dump")
    with DumpFile(str(tmp_path), NAME) as dump:
        for act in acts:
            if act == "swap":
                (tmp_path / "new").write_bytes(b"new")
                (tmp_path / "new").rename(path)
            elif path.exists():
                {
                    "write": lambda: path.write_bytes(b"longer than before"),
                    "delete": path.unlink,
                    "truncate": lambda: os.truncate(path, 0),
                    "touch": lambda: os.utime(path, ns=(0, 0)),
                }[act]()
        there = path.exists() and path.stat().st_ino == dump.identity.inode
        another = path.exists() and not there
        assert dump.unlink() == there
        assert path.exists() == another
        path.unlink(missing_ok=True)

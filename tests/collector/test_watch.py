import os
import shutil
import struct
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from inotify_simple import parse_events
from tests.support.collector import flood

from core_dump_collector.node.watch import Watch

FILE_NAME = st.binary(min_size=1, max_size=100).filter(
    lambda name: not {0, 47} & set(name) and name not in {b".", b".."}
)


def read_all(watch, *, until, seconds=10):
    """Read until a condition on the changes holds; fails after some seconds."""
    names, overflow, lost = [], False, False
    while not until(names, overflow, lost):
        assert wait([watch], seconds), f"no more events: {names} {overflow} {lost}"
        changes = watch.read()
        names += changes.names
        overflow |= changes.overflow
        lost |= changes.lost
    return names, overflow, lost


def test_rename_into_place_and_close_after_writing_are_seen_and_nothing_else(tmp_path):
    with Watch(str(tmp_path)) as watch:
        (tmp_path / "core-a.gz.partial").write_bytes(b"x")
        os.rename(tmp_path / "core-a.gz.partial", tmp_path / "core-a.gz")
        (tmp_path / "core-a.gz").read_bytes()
        (tmp_path / "folder").mkdir()
        (tmp_path / "core-b").write_bytes(b"y")
        names, _, _ = read_all(watch, until=lambda n, *_: "core-b" in n)
    assert names == ["core-a.gz.partial", "core-a.gz", "core-b"]


def test_undecodable_name_comes_back_as_the_same_bytes(tmp_path):
    with Watch(str(tmp_path)) as watch:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/core-\xff\n")).write_bytes(b"x")
        names, _, _ = read_all(watch, until=lambda n, *_: n)
    assert os.fsencode(names[0]) == b"core-\xff\n"


def test_overflow_is_reported(tmp_path):
    with Watch(str(tmp_path)) as watch:
        flood(tmp_path)
        (tmp_path / "core-last").write_bytes(b"")
        names, overflow, _ = read_all(watch, until=lambda _, o, __: o)
    assert overflow
    assert "core-last" not in names


def test_replaced_directory_is_noticed_and_can_be_watched_again(tmp_path):
    directory = tmp_path / "dumps"
    directory.mkdir()
    with Watch(str(directory)) as watch:
        shutil.rmtree(directory)
        read_all(watch, until=lambda _, __, lost: lost)
        directory.mkdir()
        assert not watch.is_current()
        watch.arm()
        assert watch.is_current()
        (directory / "core-new").write_bytes(b"")
        names, _, _ = read_all(watch, until=lambda n, *_: n)
    assert names == ["core-new"]


def test_missing_directory_and_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Watch(str(tmp_path / "missing")).arm()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Watch(str(tmp_path / "file")).arm()


class FromKernel:
    """An inotify descriptor with these bytes in it."""

    def __init__(self, events):
        self.data = b"".join(
            struct.pack("iIII", wd, mask, 0, len(name) + 1) + name + b"\0" for wd, mask, name in events
        )

    def read(self, timeout):
        return parse_events(self.data)


EVENT = st.tuples(
    st.integers(-1, 2**31 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=255).map(lambda b: b.replace(b"\0", b"")),
)


@given(st.lists(EVENT, max_size=8))
def test_whatever_bits_the_kernel_combines_are_read(events):
    watch = Watch("/")
    watch._inotify = FromKernel(events)
    changes = watch.read()
    moved = [n for _, mask, n in events if n and mask & 0x80 and not mask & 0x40000000]
    assert set(moved) <= {os.fsencode(name) for name in changes.names}
    assert changes.overflow == any(mask & 0x4000 for _, mask, _ in events)


def test_descriptor_that_somebody_closed_is_a_lost_watch(tmp_path):
    with Watch(str(tmp_path)) as watch:
        watch._inotify.close()
        assert watch.read().lost
        assert not watch.is_current()


@limits(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FILE_NAME, unique=True, max_size=8))
def test_any_file_name_comes_out_of_inotify_as_it_went_in(tmp_path, names):
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    with Watch(str(directory)) as watch:
        for name in names:
            descriptor = os.open(os.fsencode(directory) + b"/" + name, os.O_CREAT | os.O_WRONLY)
            os.close(descriptor)
        seen = watch.read().names if names else []
    assert [os.fsencode(name) for name in seen] == names

"""When a pass over modules starts: spread over time, after dumps, and not to a store that is down."""

from __future__ import annotations

import errno
import multiprocessing
from unittest import mock

import pytest
from tests.support import modules as support

from core_dump_collector import config, modules
from core_dump_collector.metrics import Metrics
from core_dump_collector.moduleevents import Event, Kind
from core_dump_collector.modules import (
    BUSY_SECONDS,
    CLEAN_PAUSE_SECONDS,
    FIRST_PAUSE_SECONDS,
    POLL_SECONDS,
    ModuleUploads,
)
from core_dump_collector.node import modulefiles
from core_dump_collector.observation import Observer
from core_dump_format.modules import COLLECTOR_MARK, DIRECTORY

NAME = "core-app-1700000000-42-11.gz"


class Uploads(ModuleUploads):
    """Notes what would be started."""

    def _start(self, now, *, lists, modules):
        self.started.append((now, lists, modules))
        self._sent = self._modules if modules else self._lists if lists else None
        self._clean_due = now + CLEAN_PAUSE_SECONDS


@pytest.fixture
def uploads(watch_dir, monkeypatch):
    monkeypatch.setattr(modules.random, "uniform", lambda low, high: (low + high) / 2)
    metrics = Metrics()
    settings = config.load({"bucket_name": "dumps", "module_delay_seconds": "300"})
    made = Uploads(str(watch_dir), settings, metrics, Observer(metrics.unobserved))
    made.started = []
    made._clean_due = 10**9
    return made


def advance(uploads, seconds, **changes):
    """Let the time go by, and return what was started."""
    uploads.started.clear()
    now = uploads.due
    end = now + seconds
    while now <= end:
        uploads.advance(now, **{"reachable": True, "busy": False} | changes)
        now = max(now + 0.01, uploads.due)
    return uploads.started


def test_mark_tells_helpers_that_modules_are_taken_and_stays_young(uploads, watch_dir):
    advance(uploads, 0)
    mark = watch_dir / DIRECTORY / COLLECTOR_MARK
    support.age(mark, 7200)
    before = mark.stat().st_mtime
    advance(uploads, 700)
    assert mark.stat().st_mtime > before
    assert (watch_dir / DIRECTORY).stat().st_mode & 0o7777 == 0o700


def test_modules_are_sent_after_a_random_delay(uploads, watch_dir):
    support.put_module(watch_dir, b"library")
    first = uploads.due
    (now, *what) = advance(uploads, 160)[0]
    assert what == [False, True]
    assert 150 - 1e-6 <= now - first <= 150 + POLL_SECONDS, "the difference of two floats"


def test_lists_of_stored_dumps_are_not_delayed(uploads, watch_dir):
    support.put_list(watch_dir, NAME)
    assert advance(uploads, 2 * POLL_SECONDS) == [], "the dump is not stored yet"
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", "key"))
    assert {(lists, sent) for _, lists, sent in advance(uploads, 2 * POLL_SECONDS)} == {(True, False)}


def test_modules_give_way_to_dumps_for_a_while(uploads, watch_dir):
    support.put_module(watch_dir, b"library")
    assert advance(uploads, 200, busy=True) == []
    assert advance(uploads, BUSY_SECONDS, busy=True)


def test_nothing_is_sent_to_a_store_that_is_down(uploads, watch_dir):
    support.put_module(watch_dir, b"library")
    assert advance(uploads, 5000, reachable=False) == []
    uploads._clean_due = 0
    assert {(lists, sent) for _, lists, sent in advance(uploads, 60, reachable=False)} == {(False, False)}


def test_failed_pass_is_repeated_after_a_pause_whenever_it_says_so(uploads, watch_dir):
    """Its event and its end may be seen at different times."""
    support.put_list(watch_dir, NAME)
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", "key"))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with sender:
        uploads._process, uploads._pipe = mock.Mock(exitcode=0, is_alive=lambda: True), receiver
        uploads._sent = uploads._lists
        sender.send(Event(Kind.FAILED, "network"))
        uploads.advance(uploads.due, reachable=True, busy=False)
        uploads._process.is_alive = lambda: False
        uploads.advance(uploads.due, reachable=True, busy=False)
    assert advance(uploads, FIRST_PAUSE_SECONDS / 2) == []
    assert advance(uploads, 2 * FIRST_PAUSE_SECONDS)


def test_lists_do_not_wait_for_modules_that_the_bucket_refuses(uploads, watch_dir):
    """A policy may allow the folder of the dumps alone."""
    support.put_module(watch_dir, b"library")
    assert advance(uploads, 200)[-1][1:] == (False, True)
    for _ in range(9):
        uploads._pipe = mock.Mock()
        uploads._end(uploads.due, failed=True)
    support.put_list(watch_dir, NAME)
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", "key"))
    assert {(lists, sent) for _, lists, sent in advance(uploads, 60)} == {(True, False)}


def test_lists_and_modules_are_sent_in_turns(uploads, watch_dir):
    support.put_module(watch_dir, b"library")
    support.put_list(watch_dir, NAME)
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", "key"))
    turns = [(lists, sent) for _, lists, sent in advance(uploads, 160 + 4 * POLL_SECONDS)][-4:]
    assert sorted(turns) == [(False, True)] * 2 + [(True, False)] * 2


def test_modules_that_lists_have_interrupted_are_not_delayed_again(uploads, watch_dir):
    support.put_module(watch_dir, b"library")
    assert advance(uploads, 200)[-1][1:] == (False, True)
    uploads._pipe, uploads._interrupted = mock.Mock(), True
    uploads._end(uploads.due, failed=False)
    assert advance(uploads, POLL_SECONDS)


def test_what_fills_the_disk_is_sent_even_if_there_is_no_room_for_the_mark(uploads, watch_dir, monkeypatch):
    support.put_module(watch_dir, b"library")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(modulefiles.ModuleFiles, "touch_mark", mock.Mock(side_effect=full))
    assert advance(uploads, 200)


def test_directory_that_cannot_be_used_is_told_once_and_ends_nothing(uploads, watch_dir, capsys):
    (watch_dir / DIRECTORY).symlink_to(watch_dir)
    assert advance(uploads, 3 * POLL_SECONDS) == []
    assert capsys.readouterr().out.count("cannot observe") == 1

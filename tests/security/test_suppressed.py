"""Crashes that the helper suppressed are counted, and each window of them is stored once in the bucket."""

from __future__ import annotations

import json
import os
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tests.support import s3
from tests.support.collector import running, wait_until

from core_dump_collector.node import suppressed
from core_dump_collector.node.suppressed import SuppressedCrashes

HASH = "0123456789abcdef01234567"
NOW = 1_700_000_000
DROPPED = 'core_dump_dumps_dropped_total{reason="rate_limit"}'


@pytest.fixture
def state(watch_dir):
    (watch_dir / ".helper").mkdir(mode=0o700)
    return watch_dir / ".helper"


def write(state, name=HASH, mode=0o600, **changes):
    """Write a record as the helper does: whole, by rename."""
    values = {"exe": "/bin/app", "container_id": "", "pod_uid": "", "signal": 11, "reason": "rate_limit"}
    values |= {"kept": 2, "suppressed": 3, "first": NOW, "last": NOW + 1, "seconds": 60} | changes
    draft = state / "draft"
    draft.write_text("".join(f"{key}={quote(str(value), '/')}\n" for key, value in values.items()))
    draft.chmod(mode)
    draft.rename(state / name)


def counted(crashes):
    """Return the new refusals by reason."""
    return {refusal.reason: refusal.number for refusal in crashes.take_new()}


def test_only_what_is_new_since_the_start_is_counted(watch_dir, state):
    write(state, suppressed=3)
    crashes = SuppressedCrashes(str(watch_dir))
    assert crashes.take_new() == []
    write(state, suppressed=5)
    write(state, "f" * 24, reason="keep_free", suppressed=1)
    assert counted(crashes) == {"rate_limit": 2, "keep_free": 1}
    assert crashes.take_new() == []
    write(state, first=NOW + 60, suppressed=4)
    assert counted(crashes) == {"rate_limit": 4}, "a new window counts from zero"


def test_no_state_is_nothing_refused(watch_dir):
    assert SuppressedCrashes(str(watch_dir)).take_new() == []
    assert SuppressedCrashes(str(watch_dir / "gone")).take_new() == []


def plant_link(state):
    write(state, "draft2")
    (state / "draft2").rename(state.parent / "elsewhere")
    (state / HASH).symlink_to(state.parent / "elsewhere")


def plant_hard_link(state):
    write(state)
    (state / "other").hardlink_to(state / HASH)


def open_directory(state):
    write(state)
    state.chmod(0o755)


UNTRUSTED = {
    "a link": plant_link,
    "a hard link": plant_hard_link,
    "a FIFO": lambda state: os.mkfifo(state / HASH, 0o600),
    "readable by others": lambda state: write(state, mode=0o644),
    "in a directory open to others": open_directory,
    "an unknown reason": lambda state: write(state, reason="because\nFORGED 1"),
    "huge": lambda state: write(state, exe="x" * 20_000),
    "a negative number": lambda state: write(state, suppressed=-1),
    "a number without end": lambda state: write(state, suppressed="9" * 6000),
    "of another name": lambda state: write(state, "../" + "a" * 24),
    "empty": lambda state: (state / HASH).touch(0o600),
}


@pytest.mark.parametrize("make", UNTRUSTED.values(), ids=UNTRUSTED.keys())
def test_what_others_may_have_written_or_is_damaged_is_left_out(watch_dir, state, make):
    crashes = SuppressedCrashes(str(watch_dir))
    make(state)
    assert crashes.take_new() == []
    assert crashes.next_document(NOW + 1000, 0) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, needs root")
@pytest.mark.parametrize("what", ["record", "directory", "link"])
def test_state_of_another_user_is_left_out(watch_dir, state, tmp_path, what):
    crashes = SuppressedCrashes(str(watch_dir))
    write(state)
    if what == "link":
        state.rename(tmp_path / "elsewhere")
        state.symlink_to(tmp_path / "elsewhere")
    else:
        os.chown(state / HASH if what == "record" else state, 12345, 12345)
    assert crashes.take_new() == []


def test_record_is_stored_once_when_its_window_is_over(watch_dir, state):
    write(state)
    crashes = SuppressedCrashes(str(watch_dir))
    assert crashes.next_document(NOW + 30, now=0) is None, "it goes on"
    document = crashes.next_document(NOW + 100, now=10)
    assert document.name == f".helper/storm-{HASH}-{NOW}.json"
    assert dict(document.facts)["suppressed"] == 3
    assert crashes.next_document(NOW + 100, now=10) is None, "one at a time"
    assert crashes.finish(document.name, 10, stored=False)
    assert crashes.next_document(NOW + 100, now=20) is None, "a pause after a failure"
    assert crashes.next_document(NOW + 100, now=100) == document
    assert crashes.finish(document.name, 100, stored=True)
    crashes.take_new()
    assert crashes.next_document(NOW + 100, now=200) is None
    assert not crashes.finish("core-a-1700000000-1-11.gz", 200, stored=True)


def test_window_ends_where_the_clock_has_jumped_back(watch_dir, state):
    write(state, first=NOW + 10**9)
    crashes = SuppressedCrashes(str(watch_dir))
    assert crashes.next_document(NOW, now=0) is None
    assert crashes.next_document(NOW, now=60) is None
    assert crashes.next_document(NOW, now=70).name.endswith(f"-{NOW + 10**9}.json")


def test_window_that_a_new_one_replaced_is_stored_too(watch_dir, state):
    write(state)
    crashes = SuppressedCrashes(str(watch_dir))
    write(state, first=NOW + 60, suppressed=0)
    crashes.take_new()
    assert crashes.next_document(NOW + 61, now=0).name.endswith(f"-{NOW}.json")


def test_window_in_which_nothing_was_refused_is_not_stored(watch_dir, state):
    write(state, suppressed=0)
    assert SuppressedCrashes(str(watch_dir)).next_document(NOW + 1000, now=0) is None


def test_record_reaches_the_bucket_once_across_restarts(seaweed, bucket, watch_dir, state, tmp_path):
    first = int(time.time()) - 100
    key = f"node-1/storm-{HASH}-{first}.json"
    write(state, first=first, last=first + 50, exe="/bin/a\n\x1b", container_id="c" * 64)
    for number in range(2):
        with running(watch_dir, seaweed.environ(), tmp_path) as collector:
            wait_until(lambda: any(e["event"] == "suppressed-crash record" for e in collector.log()), 30)
            if not number:
                body = s3.body_of(bucket, key)
                write(state, "e" * 24, first=int(time.time()), suppressed=7)
                wait_until(lambda: collector.metric(DROPPED) == 7, 20)
        assert s3.body_of(bucket, key) == body, "the second start did not replace it"
    told = json.loads(body)
    assert told["state"] == "suppressed"
    assert (told["exe"], told["signal"], told["container_id"]) == ("/bin/a\n\x1b", 11, "c" * 64)
    assert (told["kept"], told["suppressed"], told["first"], told["last"]) == (2, 3, first, first + 50)
    assert set(s3.keys_in(bucket)) == {key}


@limits(deadline=None)
@given(st.binary(max_size=2000))
def test_no_bytes_in_a_record_fail(text):
    record = suppressed._parse("0" * 24, text)
    assert record is None or record.reason

"""Every manner of a store, for small dumps and for multipart ones: stored once, and deleted only on proof."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import zlib
from dataclasses import asdict
from unittest import mock

import pytest
from tests.support.collector import running, wait_until
from tests.support.manners import Manners, Upload, crc32, fake_s3, md5
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, options, send, send_record, worker

from core_dump_collector import storecheck
from core_dump_collector.errors import ConfigError
from core_dump_collector.jobs import Document, Outcome, RetryReason
from core_dump_collector.s3.condition import LOOKS_BEFORE_PROBE, Condition
from core_dump_collector.s3.record import Attempt, State
from core_dump_collector.s3.store import Store
from core_dump_format.attributes import UPLOAD_RECORD
from core_dump_format.keys import DEFAULT_TEMPLATE
from core_dump_format.names import parse_name

SIZES = {"small": 1000, "multipart": 5 * MEBIBYTE + 1000}
ATTEMPTS = 4
STORED = "stored"
"""One object that holds the dump, and the file is deleted."""
UNPROVEN = "unproven"
"""One object at most, and the file stays; the message names what would help."""
NOT_STORED = "not stored"
"""The store has not got it, and the file stays."""

TABLE = {
    #                                                                         small        multipart
    "as Amazon S3": (Manners(),                                                STORED,      STORED),
    "no conditions": (Manners(conditions=False),                               STORED,      STORED),
    "conditions refused with 400": (Manners(conditions=400),                   STORED,      STORED),
    "conditions refused with 409": (Manners(conditions=409),                   NOT_STORED,  NOT_STORED),
    "conditions refused with 412": (Manners(conditions=412),                   STORED,      STORED),
    "conditions refused with 501": (Manners(conditions=501),                   STORED,      STORED),
    "no checksums": (Manners(checksums="none"),                                STORED,      STORED),
    "checksums in HEAD alone": (Manners(checksums="head"),                     STORED,      STORED),
    "foreign ETags": (Manners(etags="foreign"),                                STORED,      STORED),
    "foreign ETags, checksums in HEAD alone": (
        Manners(etags="foreign", checksums="head"),                            STORED,      STORED),
    "foreign ETags, no checksums": (
        Manners(etags="foreign", checksums="none"),                            UNPROVEN,    UNPROVEN),
    "417 to Expect": (Manners(expect=417),                                     STORED,      STORED),
    "body cut": (Manners(cut="body"),                                          STORED,      STORED),
    "response cut": (Manners(cut="response"),                                  STORED,      STORED),
    "response cut, no checksums": (Manners(cut="response", checksums="none"),  STORED,      STORED),
    "response cut, foreign ETags, no checksums": (
        Manners(cut="response", etags="foreign", checksums="none"),            UNPROVEN,    UNPROVEN),
    "HEAD refused": (Manners(head=403),                                        STORED,      STORED),
    "HEAD refused, no checksums": (Manners(head=403, checksums="none"),        STORED,      STORED),
    "HEAD refused, foreign ETags": (Manners(head=403, etags="foreign"),        STORED,      STORED),
    "HEAD refused, foreign ETags, no checksums": (
        Manners(head=403, etags="foreign", checksums="none"),                  UNPROVEN,    UNPROVEN),
    "HEAD refused with 405, nothing proven": (
        Manners(head=405, etags="foreign", checksums="none"),                  UNPROVEN,    UNPROVEN),
    "HEAD throttled, nothing proven": (
        Manners(head=429, etags="foreign", checksums="none"),                  NOT_STORED,  NOT_STORED),
    "HEAD fails, nothing proven": (
        Manners(head=503, etags="foreign", checksums="none"),                  NOT_STORED,  NOT_STORED),
    "HEAD refused, body cut": (Manners(head=403, cut="body"),                  STORED,      STORED),
    "HEAD refused, response cut": (Manners(head=403, cut="response"),          UNPROVEN,    UNPROVEN),
    "HEAD refused, no conditions": (Manners(head=403, conditions=False),       STORED,      STORED),
    "HEAD refused, conditions refused with 400": (
        Manners(head=403, conditions=400),                                     STORED,      STORED),
    "HEAD refused, conditions refused with 409": (
        Manners(head=403, conditions=409),                                     NOT_STORED,  NOT_STORED),
    "HEAD refused, conditions refused with 412": (
        Manners(head=403, conditions=412),                                     UNPROVEN,    UNPROVEN),
    "HEAD refused, conditions refused with 501": (
        Manners(head=403, conditions=501),                                     STORED,      STORED),
    "success, and nothing is stored": (
        Manners(stores="nothing", etags="foreign", checksums="none"),          NOT_STORED,  NOT_STORED),
    "success, nothing is stored, HEAD refused": (
        Manners(stores="nothing", etags="foreign", checksums="none", head=403), UNPROVEN,   UNPROVEN),
    "success, and half of it is stored": (
        Manners(stores="half", etags="foreign", checksums="none"),             NOT_STORED,  NOT_STORED),
}  # fmt: skip
CELLS = [
    pytest.param(size, row[0], row[1 + column], id=f"{name}-{size}")
    for name, row in TABLE.items()
    for column, size in enumerate(SIZES)
]


@pytest.fixture
def path(watch_dir):
    return watch_dir / NAME


def attempt(store, path, attempts=ATTEMPTS, **changes):
    """Upload until it is done, or for some attempts; return the last result."""
    with connected(store.environ()):
        for _ in range(attempts):
            result = send(path, **changes)
            if result.outcome != Outcome.RETRY:
                break
    return result


def dumps_in(store):
    """Return the dumps in the store: neither metadata objects nor the probe of the condition."""
    return {k: body for k, body in store.objects.items() if not k.endswith((".json", "/.condition"))}


@pytest.mark.parametrize(("size", "manners", "expected"), CELLS)
def test_dump_is_stored_once_and_deleted_only_on_proof(path, size, manners, expected):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    with fake_s3(manners) as store:
        result = attempt(store, path)
        assert path.exists() == (expected != STORED)
        if expected == STORED:
            assert result.outcome in {Outcome.UPLOADED, Outcome.ALREADY_STORED}
            assert dumps_in(store) == {result.key: content}
            assert f"{result.key}.json" in store.objects
        elif expected == UNPROVEN:
            assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.UNPROVEN)
            assert any(word in result.detail for word in ("s3:GetObject", "checksum"))
            assert len(dumps_in(store)) <= 1
        else:
            assert result.outcome == Outcome.RETRY
            assert len(dumps_in(store)) <= (2 if manners.stores == "half" else 1)
        assert store.uploads == {}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", [403, 405, 429, 500])
def test_dump_that_is_not_proven_is_sent_once(path, size, head):
    path.write_bytes(os.urandom(SIZES[size]))
    with fake_s3(Manners(head=head, etags="foreign", checksums="none")) as store:
        attempt(store, path, conditional="true")
        assert store.asked("PUT") == (1 if size == "small" else 2)
        assert store.asked("HEAD") >= ATTEMPTS
        store.manners = Manners(etags="foreign", checksums="head")  # the operator has allowed s3:GetObject
        assert attempt(store, path).outcome == Outcome.ALREADY_STORED
        assert len(dumps_in(store)) == 1
    assert not path.exists()


@pytest.mark.parametrize("head", [403, 200])
def test_parts_are_not_sent_again_while_their_upload_may_have_become_the_object(path, head):
    """The completion was carried out, its response was lost, and the worker was killed."""
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners(head=head)) as store:
        begin_an_upload(store, path, {})
        real = Store.complete
        with mock.patch.object(Store, "complete", lambda *a, **b: kill(real(*a, **b))), pytest.raises(Killed):
            attempt(store, path)
        result = attempt(store, path)
        assert store.asked("PUT", "partNumber") == 2
        assert path.exists() == (head == 403)
        assert result.retry_reason == (RetryReason.UNPROVEN if head == 403 else None)
        assert dumps_in(store) == {KEY: content}


@pytest.mark.parametrize(("size", "requests"), [("small", 4), ("multipart", 8)])
def test_dump_whose_keys_nobody_can_look_at_is_not_sent_again_and_again(path, size, requests):
    """412 and HEAD refused: three keys and the dump's own are tried once."""
    path.write_bytes(os.urandom(SIZES[size]))
    with fake_s3(Manners(head=403, conditions=412)) as store:
        attempt(store, path)
        assert store.asked("PUT") - store.asked("PUT", ".condition") == requests
        store.manners = Manners(conditions=412)  # the operator has allowed s3:GetObject
        assert attempt(store, path).outcome == Outcome.UPLOADED
    assert not path.exists()


def test_collector_keeps_what_is_not_proven_counts_it_and_says_what_would_help(watch_dir, tmp_path):
    nothing = Manners(head=403, etags="foreign", checksums="none")
    with (
        fake_s3(nothing) as store,
        running(watch_dir, store.environ(), tmp_path, "--retry-seconds", "1") as collector,
    ):
        (watch_dir / "x").write_bytes(os.urandom(1000))
        (watch_dir / "x").rename(watch_dir / NAME)
        unproven = 'core_dump_retries_total{reason="unproven"}'
        wait_until(lambda: collector.metric(unproven) >= 3, 30)
        told = [e["detail"] for e in collector.log() if e.get("reason") == "unproven"]
        assert all("s3:GetObject" in detail for detail in told)
        assert (watch_dir / NAME).exists()
        store.manners = Manners(etags="foreign")
        wait_until(lambda: not (watch_dir / NAME).exists(), 30)
        assert store.asked("PUT", ".gz") - store.asked("PUT", ".json") == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (408, RetryReason.NETWORK),
        (429, RetryReason.THROTTLED),
        (500, RetryReason.SERVER),
        (503, RetryReason.SERVER),
    ],
)
def test_failing_head_is_repeated_and_not_the_upload(path, status, reason):
    path.write_bytes(b"dump")
    with fake_s3(Manners(head=status, etags="foreign", checksums="none")) as store:
        result = attempt(store, path, attempts=2, conditional="true")
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, reason)
        assert (store.asked("HEAD"), store.asked("PUT")) == (8, 1)


TAKEN = {
    f"conditions={conditions} HEAD={head} {etags}": Manners(
        conditions=conditions, head=head, etags=etags, checksums="all" if etags == "md5" else "none"
    )
    for conditions, head, etags in [
        *(
            (conditions, head, "md5")
            for conditions in (True, False, 400, 409, 412, 501)
            for head in (200, 403)
        ),
        *((True, head, "foreign") for head in (200, 403)),
    ]
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("manners", TAKEN.values(), ids=TAKEN.keys())
def test_object_of_another_under_the_key_is_never_overwritten(path, size, manners):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    theirs = os.urandom(len(content))
    with fake_s3(manners) as store:
        store.objects[KEY] = theirs
        attempt(store, path)
        assert store.objects[KEY] == theirs
        assert content in dumps_in(store).values() or path.exists()
        assert not path.exists() or manners.conditions in {True, 409, 412}
        assert len(dumps_in(store)) <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", [200, 403])
def test_second_dump_of_a_name_survives_in_a_store_that_ignores_the_condition(path, size, head):
    contents = [os.urandom(SIZES[size]) for _ in range(3)]
    with fake_s3(Manners(conditions=False, head=head)) as store, connected(store.environ()):
        for content in contents:
            path.write_bytes(content)
            assert send(path).outcome == Outcome.UPLOADED
            assert not path.exists()
        assert sorted(dumps_in(store).values()) == sorted(contents)
        assert store.asked("PUT", ".condition") == (0 if head == 200 else 2), "the store is asked once"


def test_dumps_whose_checksums_are_alike_get_keys_of_their_own(watch_dir):
    """Neither conditions nor HEAD: a number of four digits would not tell these two apart."""
    first, content, number = b"", b"core 0", 0
    while zlib.crc32(content) % 9000 != zlib.crc32(first) % 9000:
        first, number = first or content, number + 1
        content = b"core %d" % number
    with fake_s3(Manners(conditions=501, head=403)) as store, connected(store.environ()):
        for pid, body in enumerate((first, content)):
            path = watch_dir / f"core-app-1700000000-{pid}-11.gz"
            path.write_bytes(body)
            assert send(path, key_template="{comm}").outcome == Outcome.UPLOADED
        assert sorted(dumps_in(store).values()) == sorted([first, content])


@pytest.mark.parametrize("conditions", [501, False])
def test_key_of_its_own_is_resumed_and_is_one_that_the_grammar_knows(path, conditions):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners(conditions=conditions, head=403)) as store:
        store.refuse_metadata_with = 403
        assert attempt(store, path).outcome == Outcome.RETRY
        store.refuse_metadata_with = 0
        result = attempt(store, path)
        assert result.outcome == Outcome.ALREADY_STORED
        assert dumps_in(store) == {result.key: content}
        assert (
            parse_name(result.key.rpartition("/")[2]).content == f"{zlib.crc32(content):08x}x{len(content):x}"
        )


def test_condition_is_relied_on_once_the_store_has_refused_to_overwrite(watch_dir):
    with fake_s3(Manners(head=403)) as store, connected(store.environ()):
        for number in range(3):
            path = watch_dir / f"core-app-1700000000-{number}-11.gz"
            path.write_bytes(b"dump %d" % number)
            assert send(path).key == f"node-1/{path.name}"
        assert (store.asked("PUT", ".condition"), store.asked("HEAD")) == (2, 1)


def send_small(watch_dir, numbers, content=None):
    """Send small dumps; return their keys."""
    keys = []
    for number in numbers:
        path = watch_dir / f"core-app-1700000000-{number}-11.gz"
        path.write_bytes(content or b"dump %d" % number)
        result = send(path)
        assert (result.outcome, path.exists()) == (Outcome.UPLOADED, False)
        keys.append(result.key)
    return keys


def test_many_small_dumps_need_one_request_each_and_one_for_the_metadata_object(watch_dir):
    with fake_s3(Manners()) as store, connected(store.environ()):
        send_small(watch_dir, range(40))
        heads, probes = store.asked("HEAD"), store.asked("PUT", ".condition")
        assert (heads, probes) == (LOOKS_BEFORE_PROBE - 1, 2), "the store is asked once"
        assert store.asked("PUT") == 2 * 40 + probes


@pytest.mark.parametrize("manners", [Manners(conditions=False), Manners(conditions=501)])
def test_many_dumps_of_one_name_survive_in_a_store_that_knows_no_condition(watch_dir, manners):
    contents = [b"dump %d" % number for number in range(LOOKS_BEFORE_PROBE + 4)]
    with fake_s3(manners) as store, connected(store.environ()):
        keys = [key for content in contents for key in send_small(watch_dir, [1], content)]
        assert [store.objects[key] for key in keys] == contents
        assert len(set(keys)) == len(keys)


def test_failing_probe_of_the_condition_costs_no_dump(watch_dir):
    with fake_s3(Manners(forbidden="node-1/.condition")) as store, connected(store.environ()):
        send_small(watch_dir, range(LOOKS_BEFORE_PROBE + 4))
        assert store.asked("PUT", ".condition") == 1, "it is tried again much later"
        assert store.asked("HEAD") == LOOKS_BEFORE_PROBE + 4


def test_large_dump_overwrites_nothing_where_only_small_requests_honour_the_condition(watch_dir, path):
    content, theirs = os.urandom(SIZES["multipart"]), b"theirs"
    with fake_s3(Manners(conditions_of_parts=False)) as store, connected(store.environ()):
        send_small(watch_dir, range(100, 100 + LOOKS_BEFORE_PROBE + 1))
        assert store.asked("PUT", ".condition") == 2
        store.objects[KEY] = theirs
        path.write_bytes(content)
        result = send(path)
        assert result.outcome == Outcome.UPLOADED
        assert (store.objects[KEY], store.objects[result.key]) == (theirs, content)


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("s3.eu-central-1.amazonaws.com", True),
        ("s3.cn-north-1.amazonaws.com.cn", True),
        ("bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com", True),
        ("amazonaws.com.example.org", False),
        ("s3.notamazonaws.com", False),
        ("127.0.0.1", False),
    ],
)
def test_condition_is_relied_on_at_once_where_the_store_is_amazons(host, trusted):
    assert Condition("auto", host).is_trusted is trusted
    assert not Condition("false", host).is_trusted


@pytest.mark.parametrize("size", SIZES)
def test_conflict_never_turns_the_condition_off(path, size):
    """Another writer's request is in progress: it may end at any time, and then the object is theirs."""
    path.write_bytes(os.urandom(SIZES[size]))
    with fake_s3(Manners(conditions=409)) as store:
        result = attempt(store, path, attempts=6)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER)
        assert "CONDITIONAL=false" in result.detail
        kept = [w for m, w, conditional in store.requests if m == "PUT" and not conditional]
        assert [w for w in kept if "partNumber" not in w] == []
        assert dumps_in(store) == {}
    assert path.exists()


@pytest.mark.parametrize("size", SIZES)
def test_same_dump_under_the_key_is_recognised_and_leaves_no_upload(path, size):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    with fake_s3(Manners()) as store:
        store.objects[KEY] = content
        assert attempt(store, path).outcome == Outcome.ALREADY_STORED
        assert (dumps_in(store), store.uploads) == ({KEY: content}, {})
    assert not path.exists()


@pytest.mark.parametrize("size", SIZES)
def test_key_that_was_taken_while_head_failed_does_not_count_as_tried(path, size):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    with fake_s3(Manners(checksums="none", head=503)) as store:
        theirs = store.objects[KEY] = os.urandom(len(content))
        assert attempt(store, path).outcome == Outcome.RETRY
        store.manners = Manners(checksums="none")
        result = attempt(store, path)
        assert result.outcome == Outcome.UPLOADED
        assert dumps_in(store) == {KEY: theirs, result.key: content}


@pytest.mark.parametrize("size", SIZES)
def test_keys_are_looked_at_where_conditions_are_switched_off(path, size):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    with fake_s3(Manners(conditions=False)) as store:
        store.objects[KEY] = b"of another"
        result = attempt(store, path, conditional="false")
        assert not any(conditional for _, _, conditional in store.requests)
        assert dumps_in(store) == {KEY: b"of another", result.key: content}


def test_a_required_condition_that_is_refused_names_the_setting(path):
    path.write_bytes(b"dump")
    with fake_s3(Manners(conditions=501)) as store:
        result = attempt(store, path, attempts=1, conditional="true")
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.FORBIDDEN)
        assert "CONDITIONAL=auto" in result.detail
        assert store.objects == {}
    assert path.exists()


def test_a_condition_that_was_refused_is_tried_again_after_a_time(watch_dir):
    now = [1000.0]
    with fake_s3(Manners(conditions=501)) as store, connected(store.environ()):
        worker().open_store().condition = Condition("auto", "", clock=lambda: now[0])
        for number, later in enumerate((0, 1, 601)):
            path = watch_dir / f"core-app-1700000000-{number}-11.gz"
            path.write_bytes(b"dump %d" % number)
            now[0] += later
            store.requests.clear()
            assert send(path).outcome == Outcome.UPLOADED
            assert any(conditional for _, _, conditional in store.requests) == (later != 1)


@pytest.mark.parametrize("status", [400, 412, 501])
@pytest.mark.parametrize("refusals", [1, 5])
def test_a_refusal_that_has_another_cause_leaves_the_condition_on(watch_dir, status, refusals):
    first, second = (watch_dir / f"core-app-1700000000-{number}-11.gz" for number in (1, 2))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    with fake_s3(Manners()) as store, connected(store.environ()):
        store.refuse_with, store.refusals = status, refusals
        assert send(first).outcome == (Outcome.UPLOADED if refusals == 1 else Outcome.RETRY)
        store.refusals = 0
        store.requests.clear()
        assert send(second).outcome == Outcome.UPLOADED
        assert all(conditional for method, _, conditional in store.requests if method == "PUT")


@pytest.mark.parametrize(
    ("manners", "reason"),
    [
        (Manners(), None),
        (Manners(conditions=501), None),
        (Manners(checksums="none", head=403), None),
        (Manners(etags="foreign", checksums="head"), None),
        (Manners(etags="foreign", checksums="none", head=403), RetryReason.UNPROVEN),
        (Manners(etags="foreign", checksums="none"), RetryReason.UNPROVEN),
        (Manners(etags="foreign", checksums="none", stores="nothing"), RetryReason.CHECKSUM),
        (Manners(etags="foreign", checksums="none", stores="half"), RetryReason.CHECKSUM),
    ],
)
def test_record_of_refused_dumps_counts_as_stored_only_on_proof(manners, reason):
    record = Document(".helper/storm-0123-1700000000.json", (("reason", "rate_limit"), ("suppressed", 3)))
    with fake_s3(manners) as store, connected(store.environ()):
        result = send_record(record)
        assert (result.stored, result.retry_reason) == (reason is None, reason)
        if result.stored:
            assert json.loads(store.objects["node-1/storm-0123-1700000000.json"])["suppressed"] == 3


def test_default_keys_are_below_one_folder_that_a_lifecycle_rule_can_name(path):
    record = Document(".helper/storm-01-1700000000.json", (("suppressed", 3), ("timestamp", 1700000000)))
    path.write_bytes(b"dump")
    default = {"key_template": DEFAULT_TEMPLATE}
    with fake_s3(Manners(head=403)) as store, connected(store.environ()):
        assert send(path, **default).key == f"dumps/2023-11-14/node-1/{path.name}"
        assert send_record(record, **default).stored
        assert all(key.startswith("dumps/") for key in store.objects)
        assert {"dumps/node-1/.condition", "dumps/2023-11-14/node-1/storm-01-1700000000.json"} < set(
            store.objects
        )


def test_dump_whose_metadata_object_is_not_proven_stays_and_is_not_sent_again(path):
    path.write_bytes(b"dump")
    with fake_s3(Manners()) as store:
        store.refuse_metadata_with = 403
        assert attempt(store, path).outcome == Outcome.RETRY
        store.refuse_metadata_with = 0
        assert attempt(store, path).outcome == Outcome.ALREADY_STORED
        assert store.asked("PUT", ".gz") - store.asked("PUT", ".json") == 1


@pytest.mark.parametrize(("size", "asks"), [("multipart", "uploads"), ("small", ".gz"), ("small", ".json")])
def test_unfitting_code_in_a_response_is_a_retry_and_never_an_internal_fault(path, size, asks):
    path.write_bytes(os.urandom(SIZES[size]))
    with fake_s3(Manners()) as store:
        store.no_such_upload = asks
        result = attempt(store, path, attempts=2)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER), result.detail
        store.no_such_upload = ""
        assert attempt(store, path).outcome in {Outcome.UPLOADED, Outcome.ALREADY_STORED}
        assert len(dumps_in(store)) == 1


def stored_without_its_metadata(store, path):
    """Leave a dump whose record says that the store has proven to have it."""
    path.write_bytes(b"dump")
    store.refuse_metadata_with = 403
    assert attempt(store, path, attempts=1).outcome == Outcome.RETRY
    store.refuse_metadata_with = 0
    assert json.loads(os.getxattr(path, UPLOAD_RECORD))["state"] == State.STORED
    assert list(dumps_in(store)) == [KEY]


@pytest.mark.parametrize(
    "changes", [{}, {"bucket_name": "others"}], ids=["another endpoint", "another bucket"]
)
def test_record_of_another_bucket_says_nothing_of_this_one(path, changes):
    with fake_s3(Manners(head=403)) as first, fake_s3(Manners(head=403)) as second:
        stored_without_its_metadata(first, path)
        store = first if changes else second
        store.objects.clear()
        assert attempt(store, path, **changes).outcome == Outcome.UPLOADED
        assert b"dump" in dumps_in(store).values()


@pytest.mark.parametrize("head", [200, 403])
def test_object_that_is_gone_is_sent_again_where_anybody_may_look(path, head):
    with fake_s3(Manners(head=head)) as store:
        stored_without_its_metadata(store, path)
        store.objects.clear()
        assert attempt(store, path).outcome == (Outcome.UPLOADED if head == 200 else Outcome.ALREADY_STORED)
        assert dumps_in(store) == ({KEY: b"dump"} if head == 200 else {})


@pytest.mark.parametrize(
    "manners", [Manners(), Manners(checksums="none", etags="foreign"), Manners(head=403)]
)
def test_record_of_an_older_release_counts_as_one_of_this_bucket(path, manners):
    with fake_s3(Manners()) as store:
        stored_without_its_metadata(store, path)
        record = json.loads(os.getxattr(path, UPLOAD_RECORD))
        assert record.pop("bucket") == "dumps"
        assert record.pop("host") == store.endpoint.removeprefix("http://")
        record.pop("moved")
        os.setxattr(path, UPLOAD_RECORD, json.dumps(record).encode())
        store.manners = manners
        assert attempt(store, path).outcome == Outcome.ALREADY_STORED
    assert not path.exists()


LIES = {
    "another length": lambda shown: {"Content_Length": str(int(shown["Content_Length"]) + 28)},
    "another checksum": lambda _: {"x_amz_checksum_crc32": "AAAAAA=="},
}


def lying(lie):
    """Return a function that changes what HEAD shows."""
    return lambda body, headers: (body, headers | (lie(headers) if "Content_Length" in headers else {}))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", ["", "response"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_store_whose_head_never_shows_the_dump_gets_two_copies_and_no_more(path, size, cut, lie):
    path.write_bytes(os.urandom(SIZES[size]))
    with fake_s3(Manners(checksums="none", etags="foreign", cut=cut)) as store:
        store.mangle = lying(lie)
        result = attempt(store, path, attempts=8)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.UNPROVEN)
        assert "another length or checksum" in result.detail
        assert len(dumps_in(store)) == 2
        sent = store.asked("PUT")
        attempt(store, path)
        assert store.asked("PUT") == sent, "only HEAD is repeated"
        store.mangle = None
        store.manners = Manners()
        assert attempt(store, path).outcome == Outcome.ALREADY_STORED
    assert not path.exists()


def test_checksum_of_the_parts_checksums_is_known_without_its_number(path):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    parts = (content[: 5 * MEBIBYTE], content[5 * MEBIBYTE :])
    composite = crc32(b"".join(zlib.crc32(part).to_bytes(4, "big") for part in parts))
    with fake_s3(Manners(checksums="none", etags="foreign")) as store:
        store.mangle = lying(lambda _: {"x_amz_checksum_crc32": composite})
        assert attempt(store, path, attempts=1, metadata=False).outcome == Outcome.UPLOADED
        assert dumps_in(store) == {KEY: content}


# The proofs of a multipart upload


def test_completion_without_a_checksum_is_no_proof_where_the_etag_is_none_either(path):
    """Parts with a checksum each do not prove the whole: the list of parts may be a lie."""
    path.write_bytes(os.urandom(SIZES["multipart"]))
    with fake_s3(Manners(checksums="parts", etags="foreign", head=403)) as store:
        assert attempt(store, path).retry_reason == RetryReason.UNPROVEN
    assert path.exists()


def test_checksum_of_the_completed_object_is_compared(path):
    """A store that assembles other bytes than were sent, and says so in its response."""
    path.write_bytes(os.urandom(SIZES["multipart"]))
    with fake_s3(Manners(stores="half", head=403)) as store:
        result = attempt(store, path)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.UNPROVEN)
        assert len(dumps_in(store)) == 1
    assert path.exists()


def test_part_that_arrives_damaged_is_sent_again_at_once(path):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners()) as store:
        store.damaged_parts = 1
        assert attempt(store, path, attempts=1).outcome == Outcome.UPLOADED
        assert store.asked("PUT", "partNumber") == 3
        assert dumps_in(store) == {KEY: content}


@pytest.mark.parametrize("checksums", ["all", "none"])
def test_part_of_an_earlier_attempt_that_differs_is_sent_again(path, checksums):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners(checksums=checksums)) as store:
        begin_an_upload(store, path, {1: bytes(5 * MEBIBYTE)})
        assert attempt(store, path).outcome == Outcome.UPLOADED
        assert store.asked("PUT", "partNumber") == 2
        assert dumps_in(store) == {KEY: content}


@pytest.mark.parametrize("checksums", ["all", "none"])
def test_part_of_an_earlier_attempt_that_is_the_same_is_not_sent_again(path, checksums):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners(checksums=checksums)) as store:
        begin_an_upload(store, path, {1: content[: 5 * MEBIBYTE]})
        assert attempt(store, path).outcome == Outcome.UPLOADED
        assert store.asked("PUT", "partNumber") == 1
        assert dumps_in(store) == {KEY: content}


def begin_an_upload(store, path, parts):
    """Leave an unfinished upload in the store, and its record on the dump."""
    upload = Upload(KEY, parts, {number: md5(body).hex() for number, body in parts.items()})
    store.uploads["earlier"] = upload
    attempt = Attempt(State.SENDING, KEY, path.stat().st_mtime_ns, 0, 0, "earlier", 5 * MEBIBYTE)
    os.setxattr(path, UPLOAD_RECORD, json.dumps(asdict(attempt)).encode())


# A collector that is killed between two steps


class Killed(BaseException):
    pass


def kill(*_):
    """End the attempt as SIGKILL would: nothing is cleaned up."""
    raise Killed


@contextlib.contextmanager
def killed_after_creation():
    """End the attempt when the store has created the upload and the record has no id yet, as SIGKILL would."""
    real = Store.create_multipart
    with mock.patch.object(Store, "create_multipart", lambda *a: kill(real(*a))), pytest.raises(Killed):
        yield


def test_upload_that_was_created_and_not_recorded_is_found_and_used(path):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners()) as store:
        with killed_after_creation():
            attempt(store, path)
        assert len(store.uploads) == 1
        assert attempt(store, path).outcome == Outcome.UPLOADED
        assert store.asked("POST", "uploads") == 1
        assert store.uploads == {}
        assert dumps_in(store) == {KEY: content}


def test_older_uploads_of_the_same_key_are_aborted(path):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners()) as store:
        store.uploads["older"] = Upload(KEY)
        store.uploads["of another"] = Upload(KEY + "-1")
        with killed_after_creation():
            attempt(store, path)
        assert attempt(store, path).outcome == Outcome.UPLOADED
        assert list(store.uploads) == ["of another"]


def test_where_uploads_may_not_be_listed_the_lifecycle_rule_is_named(path):
    path.write_bytes(os.urandom(SIZES["multipart"]))
    with fake_s3(Manners(lists=False)) as store:
        with killed_after_creation():
            attempt(store, path)
        result = attempt(store, path)
        assert result.outcome == Outcome.UPLOADED
        assert "AbortIncompleteMultipartUpload" in result.detail
        assert "s3:ListBucketMultipartUploads" in result.detail


def test_uploads_are_not_listed_for_a_dump_that_was_never_tried(path):
    path.write_bytes(os.urandom(SIZES["multipart"]))
    with fake_s3(Manners()) as store:
        assert attempt(store, path).outcome == Outcome.UPLOADED
        assert store.asked("GET") == 0


# Responses that are cut or lie


def mangling(dice):
    """Return a function that leaves out, cuts or replaces pieces of about every third response."""

    def mangle(body, headers):
        if dice.random() < 0.65:
            return body, headers
        for name in list(headers):
            if dice.random() < 0.4:
                headers[name] = dice.choice(["", "x", "-1", "\xff", "9" * 30])
                if name == "Content_Length" or dice.random() < 0.5:
                    del headers[name]
        body = re.sub(r"<(\w+)>[^<]*</\1>", mangle_element, body)
        return body[: dice.choice([0, 30, 10_000, 10_000])], headers

    def mangle_element(match):
        """Leave an element out, or replace its text."""
        junk = dice.choice(["", "x", "-1", "9" * 30, "&#9;"])
        return dice.choice([match[0], match[0], "", f"<{match[1]}>{junk}</{match[1]}>"])

    return mangle


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(12))
def test_mangled_response_is_a_retry_and_never_an_internal_fault(path, size, seed):
    content = os.urandom(SIZES[size])
    path.write_bytes(content)
    dice = random.Random(seed)
    with fake_s3(Manners(etags=dice.choice(["md5", "foreign"]))) as store:
        if size == "multipart":
            begin_an_upload(store, path, {1: content[: 5 * MEBIBYTE]})
        store.mangle = mangling(dice)
        for _ in range(6):
            result = attempt(store, path, attempts=1)
            assert result.retry_reason != RetryReason.INTERNAL, result.detail
            if not path.exists():
                break
        assert path.exists() or content in dumps_in(store).values()


@pytest.mark.parametrize("text", [None, "x", "9" * 30])
@pytest.mark.parametrize("name", ["PartNumber", "Size", "ETag", "UploadId"])
def test_list_without_a_field_is_no_answer_to_rely_on(path, name, text):
    content = os.urandom(SIZES["multipart"])
    path.write_bytes(content)
    with fake_s3(Manners()) as store:
        if name == "UploadId":
            with killed_after_creation():
                attempt(store, path)
        else:
            begin_an_upload(store, path, {1: content[: 5 * MEBIBYTE]})
        put = "" if text is None else f"<{name}>{text}</{name}>"
        store.mangle = lambda body, headers: (re.sub(f"<{name}>[^<]*</{name}>", put, body), headers)
        assert attempt(store, path).retry_reason != RetryReason.INTERNAL
        assert path.exists() or content in dumps_in(store).values()


def test_head_without_a_length_is_no_answer_to_rely_on(path):
    path.write_bytes(b"dump")
    with fake_s3(Manners(etags="foreign", checksums="head")) as store:
        store.mangle = lambda body, headers: (
            body,
            {k: v for k, v in headers.items() if k != "Content_Length"},
        )
        store.no_length = True
        result = attempt(store, path, attempts=1)
        assert (result.outcome, result.retry_reason) == (Outcome.RETRY, RetryReason.SERVER)
        assert "Content-Length" in result.detail
    assert path.exists()


# What `check` says


@pytest.mark.parametrize(
    ("manners", "changes", "said"),
    [
        (Manners(head=403, etags="foreign", checksums="none"), {}, "s3:GetObject"),
        (Manners(head=403, etags="foreign"), {"checksum": "when_required"}, "CHECKSUM=when_supported"),
        (Manners(etags="foreign", checksums="none"), {}, "HEAD shows no checksum"),
        (Manners(stores="nothing", etags="foreign", checksums="none"), {}, "does not have the document"),
    ],
)
def test_check_says_what_would_prove_an_upload(manners, changes, said):
    with fake_s3(manners) as store, connected(store.environ()), pytest.raises(ConfigError, match=said):
        storecheck.verify_store(options(**changes))


@pytest.mark.parametrize(
    ("manners", "said"),
    [
        (Manners(), "a second one under its key was refused$"),
        (Manners(conditions=False), "WARNING: the store ignores If-None-Match: keys are looked at"),
        (Manners(conditions=501), "does not know If-None-Match"),
        (Manners(lists=False), "AbortIncompleteMultipartUpload"),
        (Manners(head=403), "HEAD is refused.*s3:GetObject"),
    ],
)
def test_check_says_how_the_store_protects_objects(manners, said):
    with fake_s3(manners) as store, connected(store.environ()):
        assert re.search(said, storecheck.verify_store(options()))
        assert store.objects == {}


def test_check_says_that_a_policy_for_the_folder_of_dumps_loses_modules():
    with fake_s3(Manners(forbidden="_modules/")) as store, connected(store.environ()):
        said = storecheck.verify_store(options())
        assert "WARNING" in said
        assert "allow s3:PutObject on _modules/* too" in said
        before = store.asked("PUT", "_modules/")
        assert "WARNING" not in storecheck.verify_store(options(modules=False))
        assert store.asked("PUT", "_modules/") == before

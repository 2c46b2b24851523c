"""The files behind a crash: in the bucket once per content, listed with their dump, and no dump waits for them."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import threading

import pytest
from tests.support import cores, modules, s3
from tests.support.collector import command_of, descendants, running, wait_until
from tests.support.manners import Manners, fake_s3
from tests.support.modules import make_pass, put_list, put_module
from tests.support.uploads import KEY, NAME, connected, options, send

from core_dump_collector import modulepass
from core_dump_collector.jobs import Outcome
from core_dump_collector.moduleevents import Kind
from core_dump_collector.modulepass import MOST_WAITING_BYTES
from core_dump_collector.node import modulefiles
from core_dump_format import modules as contract

LIBRARY, PROGRAM = b"\x7fELF library" * 1000, b"\x7fELF program" * 1000
KEYS = {f"_modules/sha256/{modules.digest(content)}" for content in (LIBRARY, PROGRAM)}
MODULES = {"MODULES": "true", "MODULE_DELAY_SECONDS": "0"}
IMPATIENT = """
import sys
from core_dump_collector import modules
from core_dump_collector.cli import main
modules.POLL_SECONDS = 0.1
modules.FIRST_PAUSE_SECONDS = 0.1
sys.exit(main())
"""


def kinds(events):
    return sorted(event.kind for event in events)


@pytest.mark.parametrize("keys", [s3.ADMIN, s3.WRITER], ids=["admin", "write-only"])
def test_dump_its_list_and_its_modules_reach_the_bucket(seaweed, bucket, watch_dir, tmp_path, keys):
    rows = [modules.module(PROGRAM), modules.module(LIBRARY, b"/lib/x.so", 0x7F0000000000, "ab" * 20)]
    with running(watch_dir, seaweed.environ(keys) | MODULES, tmp_path, program=IMPATIENT) as collector:
        mark = watch_dir / contract.DIRECTORY / contract.COLLECTOR_MARK
        wait_until(mark.exists, 60, "the mark, without which no helper copies modules")
        put_module(watch_dir, PROGRAM)
        put_module(watch_dir, LIBRARY)
        written = put_list(watch_dir, NAME, *rows).read_bytes()
        (watch_dir / NAME).write_bytes(gzip.compress(b"core"))
        wanted = {KEY, f"{KEY}.json", f"{KEY}.modules.json", *KEYS}
        wait_until(lambda: set(s3.keys_in(bucket)) == wanted, 60, "all of them")
        wait_until(lambda: os.listdir(mark.parent) == [mark.name], 60, "an empty directory")
        wait_until(lambda: collector.metric('core_dump_module_lists_total{result="published"}') == 1, 60)
        wait_until(lambda: collector.metric('core_dump_modules_total{result="uploaded"}') == 2, 60)
        assert collector.metric("core_dump_module_upload_bytes_total") > 0
        wait_until(lambda: collector.metric("core_dump_modules_waiting_files") == 0, 60)
        assert collector.metric('core_dump_uploads_total{result="uploaded"}') == 1, "modules are no dumps"
    assert s3.body_of(bucket, f"{KEY}.modules.json") == written
    stored = bucket.get_object(Bucket=s3.BUCKET, Key=f"_modules/sha256/{modules.digest(LIBRARY)}")
    assert stored["ContentEncoding"] == "gzip"
    assert gzip.decompress(stored["Body"].read()) == LIBRARY


@pytest.mark.parametrize("head", [200, 403], ids=["head", "write-only"])
def test_second_node_sends_no_module_again(watch_dir, tmp_path, head):
    other = tmp_path / "other node"
    other.mkdir()
    for node in (watch_dir, other):
        put_module(node, LIBRARY)
        put_module(node, PROGRAM)
    with fake_s3(Manners(head=head)) as store, connected(store.environ()):
        assert kinds(make_pass(watch_dir)) == [Kind.UPLOADED] * 2
        before = dict(store.objects)
        assert kinds(make_pass(other)) == [Kind.PRESENT if head == 200 else Kind.UNPROVEN] * 2
        assert store.objects == before
        assert set(before) == KEYS
        assert all(conditional for method, _, conditional in store.requests if method == "PUT")
    assert not list(modules.directory(other).glob("module-*"))


@pytest.mark.parametrize("manners", [Manners(head=403), Manners()])
def test_junk_that_was_stored_first_is_not_called_this_file(watch_dir, manners):
    put_module(watch_dir, LIBRARY)
    (key,) = [key for key in KEYS if key.endswith(modules.digest(LIBRARY))]
    with fake_s3(manners) as store, connected(store.environ()):
        store.objects[key] = b"junk"
        assert kinds(make_pass(watch_dir)) == [Kind.UNPROVEN]
        assert store.objects[key] == b"junk", "nothing in the bucket is overwritten"


@pytest.mark.parametrize(
    "manners",
    [
        Manners(conditions=501),
        Manners(conditions=False),
        Manners(checksums="none"),
        Manners(head=403, conditions=501),
    ],
)
def test_module_reaches_stores_of_other_manners(watch_dir, manners):
    put_module(watch_dir, LIBRARY)
    with fake_s3(manners) as store, connected(store.environ()):
        assert kinds(make_pass(watch_dir)) == [Kind.UPLOADED]
        assert len(store.objects) == 1


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", gzip.compress(b"other"), gzip.compress(LIBRARY)[:-9]])
def test_wrong_content_under_a_name_is_never_stored(watch_dir, content):
    put_module(watch_dir, LIBRARY).write_bytes(content)
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert kinds(make_pass(watch_dir)) == [Kind.DROPPED_WRONG]
        assert store.objects == {}


def test_module_waits_for_a_store_that_does_not_take_it(watch_dir):
    path = put_module(watch_dir, LIBRARY)
    with (
        fake_s3(Manners(stores="half", checksums="none", etags="foreign")) as store,
        connected(store.environ()),
    ):
        (event,) = make_pass(watch_dir)
        assert (event.kind, event.name) == (Kind.FAILED, "checksum")
    assert path.exists()
    with connected({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", **s3.ADMIN.environ()}):
        assert [event.name for event in make_pass(watch_dir)] == ["network"]
    assert path.exists()


def test_module_that_never_gets_away_does_not_hold_the_disk(watch_dir):
    old, young = put_module(watch_dir, LIBRARY), put_module(watch_dir, PROGRAM)
    modules.age(old, contract.KNOWN_SECONDS + 60)
    assert kinds(make_pass(watch_dir, sends=False)) == [Kind.DROPPED_AGE]
    assert (old.exists(), young.exists()) == (False, True)
    put_module(watch_dir, LIBRARY)
    os.truncate(young, MOST_WAITING_BYTES + 1)
    modules.age(young, 60)
    assert kinds(make_pass(watch_dir, sends=False)) == [Kind.DROPPED_SPACE]
    assert (old.exists(), young.exists()) == (True, False)


def test_what_is_sensitive_is_withheld_with_its_dump(watch_dir):
    put_module(watch_dir, LIBRARY, sensitive=True)
    put_module(watch_dir, PROGRAM)
    listed = put_list(watch_dir, NAME, modules.module(LIBRARY), sensitive="dumpable=2")
    dump = watch_dir / NAME
    dump.write_bytes(gzip.compress(b"core"))
    os.setxattr(dump, "user.coredump.sensitive", b"dumpable=2")
    withheld = {"upload_sensitive": False}
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert send(dump, **withheld).outcome == Outcome.REFUSED
        assert kinds(make_pass(watch_dir, **withheld)) == [Kind.UPLOADED, Kind.WITHHELD]
        assert list(store.objects) == [f"_modules/sha256/{modules.digest(PROGRAM)}"]
        assert listed.exists(), "as long as the dump is there"
        modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", KEY))
        assert kinds(make_pass(watch_dir, **withheld)) == [Kind.LIST_DROPPED]
        assert f"{KEY}.modules.json" not in store.objects
        put_module(watch_dir, LIBRARY, sensitive=True)
        assert kinds(make_pass(watch_dir)) == [Kind.UPLOADED], "with UPLOAD_SENSITIVE, under the same key"
        assert set(store.objects) == KEYS


def test_dump_is_gone_before_its_list_is_written(watch_dir):
    """The helper's child needs longer than the upload: the receipt remembers the key."""
    partial = modules.directory(watch_dir) / f"{NAME}.json.partial"
    partial.write_bytes(b"")
    dump = watch_dir / NAME
    dump.write_bytes(gzip.compress(b"core"))
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert send(dump).outcome == Outcome.UPLOADED
        assert not dump.exists()
        assert make_pass(watch_dir) == []
        partial.unlink()
        put_list(watch_dir, NAME, modules.module(LIBRARY))
        assert kinds(make_pass(watch_dir)) == [Kind.LIST_PUBLISHED]
        assert f"{KEY}.modules.json" in store.objects
    assert list(modules.directory(watch_dir).iterdir()) == []


def test_dump_without_a_list_leaves_no_receipt(watch_dir):
    dump = watch_dir / NAME
    for _ in range(2):
        dump.write_bytes(gzip.compress(b"core"))
        with fake_s3(Manners()) as store, connected(store.environ()):
            assert send(dump).outcome == Outcome.UPLOADED
            assert set(store.objects) == {KEY, f"{KEY}.json"}
        assert list(modules.directory(watch_dir).iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["forged", "no json", "of another dump", "too long", "receipt", "other bucket"]
)
def test_wrong_list_is_not_published(watch_dir, damage):
    listed = put_list(watch_dir, NAME, modules.module(LIBRARY), of="other.gz" if "another" in damage else "")
    receipt = modulefiles.Receipt("other" if damage == "other bucket" else "dumps", KEY)
    assert modulefiles.note_stored(str(watch_dir), NAME, receipt)
    if damage == "forged":
        listed.write_text(listed.read_text().replace('"0x', '"../0x'))
    elif damage == "no json":
        listed.write_bytes(b"\xff" * 100)
    elif damage == "too long":
        os.truncate(listed, contract.MOST_LIST_BYTES + 1)
    elif damage == "receipt":
        (listed.parent / f"{NAME}.key").write_text('{"bucket": "dumps", "key": "a\\nb"}')
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert kinds(make_pass(watch_dir)) == [Kind.LIST_DROPPED]
        assert store.objects == {}
    assert list(listed.parent.iterdir()) == []


def test_receipt_that_a_full_disk_cuts_is_none(watch_dir, monkeypatch):
    put_list(watch_dir, NAME, modules.module(LIBRARY))
    monkeypatch.setattr(modulefiles.os, "write", lambda _fd, content: len(content) - 1)
    assert not modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", KEY))
    assert not (modules.directory(watch_dir) / f"{NAME}.key").exists()


def test_list_that_the_bucket_refuses_holds_up_no_other_and_is_removed_after_a_week(watch_dir):
    names = [NAME, *(NAME.replace("-11.", f"-{number}.") for number in range(3, 9))]
    for name in names:
        listed = put_list(watch_dir, name, modules.module(LIBRARY))
        modules.age(listed, contract.KNOWN_SECONDS + 60)  # its dump may have waited for as long
        modulefiles.note_stored(str(watch_dir), name, modulefiles.Receipt("dumps", f"node/{name}"))
    with fake_s3(Manners()) as store, connected(store.environ()):
        store.no_such_upload = f"{NAME}.modules.json"
        assert kinds(make_pass(watch_dir)) == sorted([Kind.FAILED, *[Kind.LIST_PUBLISHED] * 6])
        assert kinds(make_pass(watch_dir, modules=False)) == [Kind.FAILED]
        modules.age(modules.directory(watch_dir) / f"{NAME}.key", contract.KNOWN_SECONDS + 60)
        assert kinds(make_pass(watch_dir)) == [Kind.LIST_DROPPED]


def test_pass_ends_when_a_store_refuses_everything(watch_dir):
    for number in range(20):
        put_module(watch_dir, b"library %d" % number)
    with fake_s3(Manners()) as store, connected(store.environ()):
        store.refuse_with, store.refusals = 403, 1000
        assert kinds(make_pass(watch_dir)) == [Kind.FAILED]
        assert store.asked("PUT") == 1
        store.refuse_with = 503
        assert kinds(make_pass(watch_dir)) == [Kind.FAILED]
        assert store.asked("PUT") < 10


def test_raw_core_gets_a_list_of_its_files(watch_dir):
    shape = cores.Shape()
    files = shape.files((0x400000, 0x402000, 0, b"/app/app (deleted)"), (0x402000, 0x403000, 2, b"/app/app"))
    core = cores.build(shape, shape.status(7) + files, [(0x400000, bytes(8192), True)])
    dump = watch_dir / NAME.removesuffix(".gz")
    dump.write_bytes(core)
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert send(dump).outcome == Outcome.UPLOADED
        listed = contract.parse_list(store.objects[f"{KEY}.modules.json"])
    assert [(row.path, row.start, row.missing) for row in listed.modules] == [
        (b"/app/app (deleted)", 0x400000, "not_captured")
    ]
    assert listed.dump == dump.name


def test_store_that_refuses_lists_keeps_no_dump(watch_dir):
    dump = watch_dir / NAME.removesuffix(".gz")
    shape = cores.Shape()
    files = shape.files((0x400000, 0x402000, 0, b"/app/app"))
    dump.write_bytes(cores.build(shape, shape.status(7) + files, [(0x400000, bytes(8192), True)]))
    with fake_s3(Manners()) as store, connected(store.environ()):
        store.no_such_upload = ".modules.json"
        assert send(dump).outcome == Outcome.UPLOADED
    assert not dump.exists()


def test_directory_of_others_is_left_alone(watch_dir):
    folder = modules.directory(watch_dir)
    put_module(watch_dir, LIBRARY)
    with fake_s3(Manners()) as store, connected(store.environ()):
        folder.chmod(0o777)
        (event,) = make_pass(watch_dir, modules=False)
        assert event.kind is Kind.FAILED
        assert "not this user's alone" in event.detail
        folder.chmod(0o700)
        folder.rename(watch_dir / "elsewhere")
        folder.symlink_to(watch_dir / "elsewhere")
        assert kinds(make_pass(watch_dir, modules=False)) == [Kind.FAILED]
        assert store.objects == {}
    assert len(list((watch_dir / "elsewhere").iterdir())) == 1


def test_odd_files_are_neither_followed_nor_opened(watch_dir, tmp_path):
    folder = modules.directory(watch_dir)
    secret = tmp_path / "secret"
    secret.write_bytes(gzip.compress(LIBRARY))
    name = contract.module_name(modules.digest(LIBRARY), is_sensitive=False)
    (folder / name).symlink_to(secret)
    os.link(secret, folder / contract.module_name("ab" * 32, is_sensitive=False))
    os.mkfifo(folder / contract.module_name("cd" * 32, is_sensitive=False))
    (folder / contract.module_name("ef" * 32, is_sensitive=True)).mkdir()
    os.mkfifo(folder / f"{NAME}.json.partial")
    (folder / "of a newer release").write_bytes(b"x")
    before = sorted(path.name for path in folder.iterdir())
    with fake_s3(Manners()) as store, connected(store.environ()):
        assert make_pass(watch_dir) == []
        assert store.objects == {}
    assert sorted(path.name for path in folder.iterdir()) == before


def test_partial_file_is_removed_when_its_writer_has_ended(watch_dir):
    folder = modules.directory(watch_dir)
    partial = folder / f"{NAME}.json.partial"
    with partial.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        modules.age(partial, 3600)
        assert make_pass(watch_dir, sends=False) == []
        assert partial.exists()
    make_pass(watch_dir, sends=False)
    assert not partial.exists()


def test_list_whose_dump_is_gone_is_removed_later(watch_dir):
    listed = put_list(watch_dir, NAME, modules.module(LIBRARY))
    assert make_pass(watch_dir, sends=False) == []
    modules.age(listed, 2 * 3600)
    (watch_dir / NAME).write_bytes(b"waits")
    assert make_pass(watch_dir, sends=False) == []
    (watch_dir / NAME).unlink()
    assert kinds(make_pass(watch_dir, sends=False)) == [Kind.LIST_DROPPED]


def test_collector_that_wants_no_modules_removes_mark_and_files(watch_dir, seaweed, bucket, tmp_path):
    put_module(watch_dir, LIBRARY)
    (modules.directory(watch_dir) / contract.COLLECTOR_MARK).touch()
    (modules.directory(watch_dir) / f"{NAME}.json.partial").touch()
    with running(watch_dir, seaweed.environ(), tmp_path):
        assert list(modules.directory(watch_dir).iterdir()) == []


def test_pass_that_was_killed_is_made_again(watch_dir, tmp_path):
    put_module(watch_dir, LIBRARY)
    (watch_dir / NAME).write_bytes(b"tells that the store takes objects")
    released = threading.Event()
    with fake_s3(Manners()) as store:

        def hold(body, headers):
            if store.asked("PUT", "_modules/"):
                released.wait(30)
            return body, headers

        store.mangle = hold
        with running(watch_dir, store.environ() | MODULES, tmp_path, program=IMPATIENT) as collector:
            stored = f"_modules/sha256/{modules.digest(LIBRARY)}"
            wait_until(lambda: stored in store.objects, 60, "the module, whose response is held")
            for pid in collector.workers():
                os.kill(pid, signal.SIGKILL)
            released.set()
            present = 'core_dump_modules_total{result="present"}'
            wait_until(lambda: collector.metric(present) == 1, 60, "another pass, which finds the module")
    assert store.asked("PUT", "_modules/") == 1


def test_events_name_what_was_done(watch_dir):
    put_list(watch_dir, NAME, modules.module(LIBRARY))
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", KEY))
    receipt = json.loads((modules.directory(watch_dir) / f"{NAME}.key").read_text())
    assert receipt == {"bucket": "dumps", "key": KEY}
    with fake_s3(Manners()) as store, connected(store.environ()):
        (event,) = make_pass(watch_dir)
    assert (event.kind, event.name, event.detail) == (Kind.LIST_PUBLISHED, f"{NAME}.json", KEY)


def test_list_of_a_dump_that_is_stored_meanwhile_goes_before_further_modules(watch_dir, monkeypatch):
    for content in (LIBRARY, PROGRAM):
        put_module(watch_dir, content)
    store_module = modulepass.store_module

    def while_it_is_sent(*of):
        put_list(watch_dir, NAME, modules.module(LIBRARY))
        modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", KEY))
        return store_module(*of)

    monkeypatch.setattr(modulepass, "store_module", while_it_is_sent)
    with fake_s3(Manners()) as store, connected(store.environ()):
        events = []
        modulepass.run(str(watch_dir), options(), events.append, lists=False, modules=True)
        monkeypatch.setattr(modulepass, "store_module", store_module)
        assert kinds(events) == [Kind.INTERRUPTED, Kind.SENDING, Kind.UPLOADED]
        assert kinds(make_pass(watch_dir)) == [Kind.LIST_PUBLISHED, Kind.UPLOADED]


def test_list_that_the_bucket_refuses_does_not_interrupt_modules(watch_dir):
    for content in (LIBRARY, PROGRAM):
        put_module(watch_dir, content)
    put_list(watch_dir, NAME, modules.module(LIBRARY))
    modulefiles.note_stored(str(watch_dir), NAME, modulefiles.Receipt("dumps", KEY))
    with fake_s3(Manners()) as store, connected(store.environ()):
        events = []
        modulepass.run(str(watch_dir), options(), events.append, lists=False, modules=True)
    assert kinds(events) == [Kind.SENDING] * 2 + [Kind.UPLOADED] * 2


def ignores(pid, number):
    """Tell whether a process ignores a signal (proc_pid_status(5))."""
    with open(f"/proc/{pid}/status") as file:
        ignored = next(line.split()[1] for line in file if line.startswith("SigIgn:"))
    return bool(int(ignored, 16) >> (number - 1) & 1)


def test_workers_are_prepared_although_a_module_waits_at_the_start(seaweed, bucket, watch_dir, tmp_path):
    put_module(watch_dir, LIBRARY)
    late = MODULES | {"MODULE_DELAY_SECONDS": "3600"}
    with running(watch_dir, seaweed.environ() | late, tmp_path) as collector:
        wait_until(collector.workers, 30, "a worker")
        server = next(pid for pid in descendants(collector.process.pid) if "forkserver" in command_of(pid))
        assert ignores(server, signal.SIGTERM)

"""The vital part that a limit leaves of a crash, how often, and where; and the choices of RULES."""

import contextlib
import fcntl
import gzip
import os
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helper.test_helper_vital import large  # noqa: F401  a fixture
from tests.support.collector import wait_until
from tests.support.cores import simple as elf

from core_dump_collector.node import suppressed
from core_dump_helper import runtime
from core_dump_helper.allowance import MAX_ORIGINS, Allowance
from core_dump_helper.crash import parse_arguments
from core_dump_helper.handler import Handler
from core_dump_helper.keep import Keep
from core_dump_helper.limits import VITAL_SLOTS
from core_dump_helper.rules import choose, matches, parse_rules
from core_dump_helper.settings import Settings

CORE = elf(b"core")
GIB = 1 << 30


def keep(action="", limit="", **given):
    settings = Settings()
    vars(settings).update(given)
    decides = Keep(settings, action, limit)
    decides.memory_bytes = 2 * GIB
    return decides


@pytest.mark.parametrize(
    ("decides", "length", "reason"),
    [
        (keep(), 64 * GIB, None),
        (keep(), 64 * GIB + 1, "trim_above_bytes"),
        (keep(TRIM_ABOVE_BYTES=0), 1 << 60, None),
        (keep("whole"), 1 << 60, None),
        (keep("trim"), GIB, "rule"),
        (keep("trim"), 60 << 20, None),
        (keep("whole", "rate_limit"), GIB, "rate_limit"),
        (keep("metadata", "rate_limit"), GIB, "metadata"),
        (keep("metadata"), 1000, "metadata"),
        (keep(MAX_DUMP_BYTES=GIB), GIB, None),
        (keep(MAX_DUMP_BYTES=GIB), GIB + 1, "max_dump_bytes"),
        (keep(MAX_DUMP_BYTES=2 * GIB), 3 * GIB, None),
        (keep("whole", MAX_DUMP_BYTES=GIB), GIB + 1, "max_dump_bytes"),
        (keep(TRIM_ABOVE_BYTES=1, TRIM_BUDGET_BYTES=0), 9 << 20, "trim_above_bytes"),
        (keep(TRIM_ABOVE_BYTES=1, TRIM_BUDGET_BYTES=0), 8 << 20, None),
    ],
)
def test_length_rule_and_limit_decide_how_much_is_kept(decides, length, reason):
    trim = decides.choose(length)
    assert (trim and trim.reason) == reason
    assert not trim or trim.budget_bytes <= decides.memory_bytes // 2


@pytest.mark.parametrize("reason", ["rate_limit", "keep_free", "max_total_bytes"])
def test_limit_leaves_the_vital_part_and_counts_it(station, large, reason):  # noqa: F811
    limits = {"rate_limit": {"RATE_LIMIT": "1/600"}, "keep_free": {"KEEP_FREE_PERCENT": 99}}
    given = limits.get(reason, {"MAX_TOTAL_BYTES": 1_000_000})
    filler = station.watch_dir / "filler"
    filler.write_bytes(bytes(1_050_000))
    given |= {"VITAL_KEEP_FREE_PERCENT": 0, "TRIM_BUDGET_BYTES": 0}
    if reason == "rate_limit":
        large(**given)
        (dump,) = set(station.names()) - {filler.name}
        (station.watch_dir / dump).unlink()
    _, stack = large(**given)
    filler.unlink()
    found = station.attributes()
    assert (found["trimmed"], found["truncated"], found["vital"]) == (reason, "max_dump_bytes", "whole")
    assert stack[: 1 << 20] in station.core()
    assert len(station.core()) < 2 << 20
    (record,) = station.records()
    assert (record["reason"], record["suppressed"], record["vital"]) == (reason, "1", "1")


def test_no_more_vital_parts_than_allowed_in_a_window(station, large):  # noqa: F811
    for _ in range(4):
        logged, _ = large(RATE_LIMIT="1/600", VITAL_LIMIT="2/600")
    assert len(station.names()) == 3
    assert "no dump: rate_limit" in logged
    (record,) = station.records()
    assert (record["kept"], record["suppressed"], record["vital"]) == ("1", "3", "2")


@pytest.mark.parametrize(
    "given",
    [{"VITAL_LIMIT": 0}, {"VITAL_BYTES": 0}, {"VITAL_KEEP_FREE_PERCENT": 99, "KEEP_FREE_PERCENT": 99}],
)
def test_nothing_is_kept_where_vital_parts_are_off_or_the_disk_is_below_their_floor(station, large, given):  # noqa: F811
    logged, _ = large(**({"KEEP_FREE_PERCENT": 99} | given))
    assert station.names() == []
    assert "no dump: keep_free" in logged
    (record,) = station.records()
    assert (record["suppressed"], record["vital"]) == ("1", "0")


@pytest.mark.parametrize(
    "given", [{"IGNORE_SIGNALS": "11"}, {"RESPECT_RLIMIT": "yes"}, {"RULES": "nothing signal=SEGV"}]
)
def test_what_was_asked_not_to_be_kept_leaves_nothing(station, large, given):  # noqa: F811
    large(**given)
    assert station.names() == []
    (record,) = station.records()
    assert record["reason"] in {"ignored_signal", "rlimit", "rule"}
    (read,) = suppressed._read_records(str(station.watch_dir))
    assert read.suppressed == 1


def test_process_without_an_identity_is_refused_as_before(station):
    station.settings = {"RATE_LIMIT": "1/600"}
    who = ("-P1", "-u4242", "-s11", "-t17", "-d1")
    station.run(CORE, *who)
    assert "no dump: rate_limit" in station.run(CORE, *who), "its memory may not be read"
    assert len(station.names()) == 1


def test_small_core_is_whole_and_counts_as_kept_beyond_the_limit(station):
    station.settings = {"RATE_LIMIT": "1/600", "VITAL_LIMIT": "1/600"}
    for _ in range(3):
        station.run(CORE)
    assert [gzip.decompress((station.watch_dir / name).read_bytes()) for name in station.names()] == [
        CORE
    ] * 2
    (record,) = station.records()
    assert (record["kept"], record["suppressed"], record["vital"]) == ("1", "2", "1")


def take_slots(station, count):
    """Hold all slots of a station that has been used."""
    slots = [os.open(station.watch_dir / f".helper/slot-{number}", os.O_RDWR) for number in range(count)]
    for slot in slots:
        fcntl.flock(slot, fcntl.LOCK_EX)
        os.pwrite(slot, b"another".ljust(256), 0)
    return slots


def test_missing_slot_leaves_the_vital_part_at_once(station, large):  # noqa: F811
    given = {"MAX_CONCURRENT": 1, "DEADLINE_SECONDS": 100}
    large(**given)
    station.dump().unlink()
    slots = take_slots(station, 1)
    started = time.monotonic()
    large(**given)
    assert time.monotonic() - started < 50
    assert station.attributes()["trimmed"] == "no_slot"
    (record,) = [each for each in station.records() if each["reason"] == "no_slot"]
    assert (record["suppressed"], record["vital"]) == ("1", "1")
    for slot in slots:
        os.close(slot)


def test_small_dump_without_a_slot_is_whole_and_no_loss(station):
    station.settings = {"MAX_CONCURRENT": 1, "DEADLINE_SECONDS": 100}
    station.run(CORE)
    station.dump().unlink()
    slots = take_slots(station, 1)
    station.run(CORE)
    assert station.core() == CORE
    assert "truncated" not in station.attributes()
    assert [record for record in station.records() if record["reason"] == "no_slot"] == []
    for slot in slots:
        os.close(slot)


def test_slot_that_becomes_free_is_taken_before_a_reserved_one(station):
    station.settings = {"MAX_CONCURRENT": 1, "VITAL_LIMIT": "1/600", "DEADLINE_SECONDS": 100}
    station.run(CORE)
    slots = take_slots(station, 1)
    station.run(CORE)
    process = station.start()
    opened = Path(f"/proc/{process.pid}/fd")
    wait_until(lambda: any("slot-0" in str(fd.resolve()) for fd in opened.iterdir()), 20)
    for slot in slots:
        os.close(slot)
    process.communicate(CORE, timeout=30)
    assert len(station.names()) == 3, "none is allowed any more, so it waited"


def held_slots(station, count, name):
    """Hold all slots of a kind; their files are made if no helper has made them yet."""
    paths = [station.watch_dir / f".helper/{name}-{number}" for number in range(count)]
    slots = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    for slot in slots:
        fcntl.flock(slot, fcntl.LOCK_EX)
    return slots


def test_allowance_is_not_used_up_by_a_dump_that_got_a_slot_of_its_own(station):
    station.settings = {"MAX_CONCURRENT": 1, "VITAL_LIMIT": "1/600", "DEADLINE_SECONDS": 100}
    station.run(CORE)
    slots = take_slots(station, 1) + held_slots(station, VITAL_SLOTS, "vital-slot")
    process = station.start()
    kept = station.watch_dir / ".helper/vital-kept"
    wait_until(kept.exists, 20)
    assert kept.read_bytes().split()[2] == b"1"
    os.close(slots.pop(0))
    process.communicate(CORE, timeout=30)
    assert len(station.names()) == 2
    assert kept.read_bytes().split()[2] == b"0"
    for slot in slots:
        os.close(slot)


def test_allowance_is_counted_for_each_origin_and_window(records, monkeypatch):
    allowance = Allowance(records, "2/600")
    assert [allowance.take(b"user:1") for _ in range(3)] == [True, True, False]
    assert allowance.take(b"user:2")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    assert allowance.take(b"user:1")
    monkeypatch.setattr(time, "time", lambda: now - 10_000)
    assert allowance.take(b"user:1"), "a clock that was set back"


def test_origins_cannot_fill_the_list_of_allowances(records):
    allowance = Allowance(records, "1/600")
    state = f"/proc/self/fd/{records.directory}/vital-kept"
    now = int(time.time())
    with open(state, "w") as file:
        file.write("".join(f"{number:020x} {now} 1\n" for number in range(MAX_ORIGINS)))
    assert [allowance.take(b"user:%d" % number) for number in range(3)] == [True, False, False]


@pytest.mark.parametrize("text", ["garbage\n", "a b c\n", "x 1\n", "\0" * 100, "a 1 " + "9" * 5000 + "\n"])
def test_damaged_list_of_allowances_keeps_nothing(records, text):
    with open(f"/proc/self/fd/{records.directory}/vital-kept", "w") as file:
        file.write(text)
    assert not Allowance(records, "2/600").take(b"user:1")


def test_allowances_of_many_at_once_are_not_exceeded(station):
    station.settings = {"RATE_LIMIT": "1/600", "VITAL_LIMIT": "3/600", "MAX_CONCURRENT": 0}
    station.run(CORE)
    command, core = station.command(), station.directory / "core"
    core.write_bytes(CORE)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(core.open()) for _ in range(8)]
        processes = [
            subprocess.Popen(command, stdin=file, stderr=subprocess.DEVNULL, env={}) for file in files
        ]
        assert [process.wait(timeout=60) for process in processes].count(0) == 3
    assert len(station.names()) == 1 + 3
    (record,) = station.records()
    assert (record["suppressed"], record["vital"]) == ("8", "3")


@pytest.mark.skipif("STORM" not in os.environ, reason="STORM=1000: a crash loop of minutes")
@pytest.mark.timeout(1800)
def test_crash_loop_of_a_thousand_is_bounded_and_a_quiet_service_keeps_its_dump(
    station,
    large,  # noqa: F811
    record_property,
):
    count = int(os.environ["STORM"])
    station.settings = {"MAX_TOTAL_BYTES": 0, "RATE_LIMIT": "5/6000", "VITAL_LIMIT": "20/6000"}
    command, held = station.command(), []
    usual = (f"-P{os.getpid()}", "-p9", "-s6", "-t17", "-d1")
    for number in range(count):
        if number == count // 2:
            subprocess.run([command[0], *usual, "--", "quiet"], input=CORE, check=True, env={})
        started = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}) as helper:
            with contextlib.suppress(BrokenPipeError):
                helper.stdin.write(large.core)
            held.append(time.monotonic() - started)
            with contextlib.suppress(BrokenPipeError):
                helper.stdin.close()
    first, last = (statistics.median(part) for part in (held[:25], held[25:]))
    (kept,) = (station.watch_dir / name for name in station.names() if "quiet" in name)
    dumps = [station.watch_dir / name for name in station.names() if "quiet" not in name]
    trimmed = [path for path in dumps if "trimmed" in station.attributes(path)]
    record_property("held_seconds", (first, last, max(held)))
    record_property("bytes", sum(path.stat().st_size for path in dumps))
    assert (len(dumps), len(trimmed)) == (25, 20)
    assert all(path.stat().st_size < 2 << 20 for path in trimmed)
    (record,) = (record for record in station.records() if record["signal"] == "11")
    assert (record["kept"], record["vital"]) == ("5", "20")
    assert int(record["suppressed"]) == count - 5
    assert last <= first, "a refused crash is held no longer than one that is dumped"
    assert gzip.decompress(kept.read_bytes()) == CORE


CRASH = {"exe": b"/opt/batch/run now", "origin": b"unit:batch.service", "signal": b"6"}


@pytest.mark.parametrize(
    ("rules", "action"),
    [
        ("", ""),
        ("whole", "whole"),
        ("trim exe=/opt/*", "trim"),
        ("trim exe=/opt/?atch/run?now", "trim"),
        ("trim exe=/opt/batch", ""),
        ("metadata origin=unit:batch.service signal=SEGV; trim signal=ABRT,SEGV", "trim"),
        ("nothing signal=6; whole", "nothing"),
        ("nothing signal=SIGABRT exe=/usr/*;; whole ;", "whole"),
        ("trim exe=*", "trim"),
    ],
)
def test_first_rule_that_holds_wins(rules, action):
    assert choose(rules, CRASH) == action


def test_rules_know_the_image_and_the_namespace(monkeypatch):
    content = b'{"annotations": {"io.kubernetes.cri.sandbox-namespace": "shop", '
    content += b'"io.kubernetes.cri.image-name": "registry/web:1"}}'
    asked = []

    def read(container):
        asked.append(container)
        return runtime.RuntimeFile(runtime.CONTAINERD, content)

    monkeypatch.setattr(runtime, "read_runtime_file", read)
    handler = Handler(parse_arguments(["-P1", "-s11", "--", "app"]), 0)
    handler.metadata = {"container_id": b"c" * 64, "signal": b"11"}
    for rules, action in (
        ("trim signal=11", "trim"),
        ("nothing namespace=bank; metadata namespace=shop image=registry/*", "metadata"),
        ("trim image=other", ""),
    ):
        handler.settings.RULES = rules
        assert handler.choose() == action
    assert asked == [b"c" * 64], "read once, and only if a rule asks"


def test_rule_about_what_is_not_known_does_not_hold():
    assert choose("nothing exe=*; trim", {"signal": b"11"}) == "trim"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("trimm", "rule 1 begins with 'trimm'"),
        ("whole; trim exe=", "rule 2 has 'exe='"),
        ("trim exe", "rule 1 has 'exe'"),
        ("trim user=1", "rule 1 has 'user=1'"),
        ("trim signal=SEG", "signal='SEG', which is no signal"),
        ("trim signal=0", "which is no signal"),
        ("trim signal=65", "which is no signal"),
        ("trim signal=6,", "which is no signal"),
        ("trim signal=_DFL", "which is no signal"),
        ("trim exe=" + "x" * 1001, "rule 1 has"),
        ("trim;" * 1001, "at most 1000"),
    ],
)
def test_wrong_rule_is_named_by_the_check(station, rules, said):
    with pytest.raises(ValueError, match="rules, separated by semicolons") as caught:
        parse_rules(rules)
    assert said in str(caught.value)
    station.settings = {"RULES": rules}
    done = subprocess.run(
        [*station.command("--check")[:2]], capture_output=True, text=True, env={}, check=False
    )
    assert "RULES=" in done.stdout
    assert said[:20] in done.stdout


@given(st.binary(max_size=20), st.lists(st.sampled_from([b"a", b"b", b"?", b"*"]), max_size=8).map(b"".join))
def test_wildcards_match_as_everywhere(value, pattern):
    import re

    wanted = b"".join({42: b".*", 63: b"."}.get(byte, re.escape(bytes([byte]))) for byte in pattern)
    assert matches(value, pattern) == bool(re.fullmatch(wanted, value, re.DOTALL))


def test_pattern_of_wildcards_takes_no_time():
    started = time.monotonic()
    assert not matches(b"a" * 1000, b"*a" * 400 + b"b")
    assert time.monotonic() - started < 2

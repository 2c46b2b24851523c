"""Whatever a crashed process is called or does, what the helper writes the collector reads back as the same."""

from __future__ import annotations

import itertools
import json
import os

from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tests.support.uploads import options

from core_dump_collector import metadata
from core_dump_collector.metadata import StoredObject
from core_dump_collector.node import suppressed
from core_dump_collector.node.dumpfile import DumpFile
from core_dump_format.attributes import ATTRIBUTE_PREFIX, NUMBERS, TEXTS
from core_dump_format.names import LEAST_TIMESTAMP, is_candidate, is_partial, parse_name, unpartial
from core_dump_helper.crash import parse_arguments, read_metadata
from core_dump_helper.dumpfile import file_name, set_attributes
from core_dump_helper.limits import RateLimiter
from core_dump_helper.records import Records, open_state
from core_dump_helper.system import Refused

COMM = st.binary(max_size=64).filter(lambda name: b"\0" not in name)
FEW = limits(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
number = itertools.count()


def crash_of(comm, timestamp, pid, signal):
    return parse_arguments(
        [f"-P{pid}", f"-p{pid}", f"-s{signal}", f"-t{timestamp}", "-d1", "--", os.fsdecode(comm)]
    )


@limits(deadline=None)
@given(
    COMM,
    st.integers(LEAST_TIMESTAMP, 10**19),
    st.integers(0, 2**22),
    st.integers(0, 64),
    st.integers(0, 9999),
    st.sampled_from(["", ".gz"]),
)
def test_every_name_of_the_helper_is_parsed_to_equal_fields(comm, timestamp, pid, signal, copy, suffix):
    name = file_name(crash_of(comm, timestamp, pid, signal), copy, suffix)
    read = parse_name(name)
    assert read is not None
    assert (read.timestamp, read.pid, read.signal) == (timestamp, pid, signal)
    assert (read.copy or 0, read.compressed) == (copy, suffix == ".gz")
    assert is_candidate(name, ("core*",))
    assert is_partial(name + ".partial")
    assert unpartial(name + ".partial") == name


FORMS = {
    "build_id": b"0a" * 20,
    "container_id": b"c" * 64,
    "pod_uid": b"01234567-89ab-cdef-0123-456789abcdef",
    "namespace": b"shop",
    "pod": b"cart-0",
    "container": b"app",
    "image": b"registry/app:1",
    "image_digest": b"sha256:" + b"d" * 64,
    "identity_source": b"runtime",
}
"""Of the attributes that are read in one form only."""


@FEW
@given(st.dictionaries(st.sampled_from(sorted(TEXTS - {"truncated"})), st.binary(min_size=1, max_size=300)))
def test_every_attribute_of_the_helper_is_read_by_the_collector(watch_dir, values):
    values |= {"pid": b"42", "signal": b"11"}
    values |= {name: form for name, form in FORMS.items() if name in values}
    path = watch_dir / f"core-{next(number)}"
    path.write_bytes(b"")
    descriptor = os.open(path, os.O_RDWR)
    set_attributes(descriptor, values, space=16_000)
    os.close(descriptor)
    with DumpFile(str(watch_dir), path.name) as dump:
        raw = dump.attributes()
        facts = metadata.gather(dump, raw, options())
    assert {name.removeprefix(ATTRIBUTE_PREFIX): value for name, value in raw.items()} == values
    told = json.loads(metadata.render(facts, StoredObject("k", 1, 2), "dumps"))
    assert set(told) >= set(values)
    assert (told["pid"], told["signal"]) == (42, 11)
    assert all(
        told[name] == values[name].decode("utf-8", "backslashreplace")
        for name in set(values) & {"comm", "exe"}
    )


def test_every_attribute_that_the_helper_names_is_known_to_the_collector():
    known = set(read_metadata(crash_of(b"app", 1_700_000_000, os.getpid(), 11))[0])
    results = {"bytes", "expected_bytes", "truncated", "compressor", "duration_ms", "helper_version"}
    results |= {"frames", "build_id", "machine"}
    written = known | {"sensitive"} | results
    assert {"comm", "exe", "cmdline", "threads", "ns_pid", "tid"} - {"tid"} <= written
    assert written <= NUMBERS | TEXTS


def is_refused(limiter, metadata):
    try:
        limiter.check(metadata)
    except Refused:
        return True
    return False


@FEW
@given(COMM, COMM, st.integers(0, 64), st.integers(1, 4))
def test_every_record_of_the_helper_is_read_by_the_collector(watch_dir, exe, thread, signal, times):
    directory = os.open(watch_dir, os.O_RDONLY)
    try:
        records = Records(open_state(directory))
        metadata = {"exe": exe, "thread": thread, "signal": b"%d" % signal}
        for record in (watch_dir / ".helper").glob("?" * 24):
            record.unlink()
        limiter = RateLimiter(records, "2/60")
        refused = [is_refused(limiter, metadata) for _ in range(times)]
        os.close(records.directory)
    finally:
        os.close(directory)
    (read,) = suppressed._read_records(str(watch_dir))
    assert refused == [False, False, True, True][:times]
    assert (read.reason, read.kept, read.suppressed) == ("rate_limit", min(times, 2), max(0, times - 2))
    told = (exe or thread)[:1024].decode("utf-8", "backslashreplace")
    assert dict(read.workload).get("exe", "") == told
    json.dumps(dict(read.as_document().facts))

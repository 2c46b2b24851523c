import os
import re
import struct
import time
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tests.support import cores
from tests.support.cores import Shape
from tests.support.cores import simple as elf

from core_dump_helper.core import Memory, Reader
from core_dump_helper.crash import parse_arguments
from core_dump_helper.dumpfile import create_partial, file_name, publish
from core_dump_helper.length import HEADER_LIMIT, elf_length
from core_dump_helper.records import percent
from core_dump_helper.settings import Settings

GRAMMAR = r"core-[A-Za-z0-9._+-]*-\d{1,20}-\d{1,10}-\d{1,3}(-\d{1,4})?(\.gz)?"


def test_arguments_of_a_new_kernel():
    argv = ["-P12", "-p1", "-i13", "-u0", "-g5", "-s11", "-t17", "-c0", "-d1", "-F3", "-hbox", "--", "a b"]
    crash = parse_arguments(argv)
    assert (crash.pid, crash.ns_pid, crash.tid, crash.pidfd) == ("12", "1", "13", "3")
    assert (crash.uid, crash.gid, crash.signal, crash.timestamp) == ("0", "5", "11", "17")
    assert (crash.rlimit, crash.dumpable, crash.hostname, crash.thread) == ("0", "1", "box", "a b")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (
            ["-P1", "-hx", "-d1", "-C/evil", "--", "n"],
            "dumpable",
            "2",
        ),  # a host name may not pose as an option
        (["-P1", "-ha", "b", "c", "--", "n"], "hostname", "a b c"),
        (["--", "a", "b", "-d1"], "thread", "a b -d1"),
        (["--", "a", "", "b"], "thread", "a  b"),
        (["-d1", "-d0"], "dumpable", "1"),
        (["-d"], "dumpable", "2"),
        ([], "dumpable", "2"),
        (["-P12x"], "pid", ""),
        (["-P\u0663"], "pid", ""),
        (["-P" + "9" * 21], "pid", ""),
        (["-c18446744073709551615"], "rlimit", "18446744073709551615"),
        (["-", "-Z1", "x", "-P4"], "pid", "4"),
    ],
)
def test_arguments_that_are_split_missing_or_hostile_take_the_safest_meaning(argv, field, value):
    assert getattr(parse_arguments(argv), field) == value


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_any_arguments_make_a_valid_name(argv):
    crash = parse_arguments(argv)
    for suffix in ("", ".gz"):
        name = file_name(crash, 9999, suffix) + ".partial"
        assert len(name) <= 255
        assert re.fullmatch(GRAMMAR + r"\.partial", name)


@given(st.binary(max_size=300).filter(lambda name: b"\0" not in name))
def test_any_name_becomes_a_valid_file_name(name):
    crash = parse_arguments(["-p1", "-s11", "-t17", "--", os.fsdecode(name)])
    found = file_name(crash, 0, ".gz")
    assert re.fullmatch(GRAMMAR, found)
    assert len(found) <= 255
    assert found[5] not in ".-"


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("segments", [1, 3, 20000])
def test_length_is_what_the_program_headers_promise(wide, order, segments):
    core = elf(b"x" * 5000, shape=Shape(64 if wide else 32, order), segments=segments)
    wanted, length = elf_length(core)
    assert length == len(core)
    assert elf_length(core[: wanted - 1])[1] == 0
    assert elf_length(core[:wanted]) == (wanted, len(core))


@pytest.mark.parametrize("sizes", [(5000, 10), (10, 5000), (0, 5000, 0)])
def test_length_is_that_of_the_segment_that_ends_last(sizes):
    core = cores.build(Shape(), bytes(100), [(4096 * n, bytes(size), False) for n, size in enumerate(sizes)])
    assert elf_length(core)[1] == len(core)


def test_read_that_fails_ends_the_dump_and_says_so(monkeypatch):
    source, sink = os.pipe()
    os.write(sink, b"first")
    os.close(sink)
    seen = []

    def read(descriptor, buffers, readv=os.readv):
        seen.append(descriptor)
        if len(seen) > 1:
            raise OSError(5, "Input/output error")
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", read)
    reader = Reader(source, Settings(), Memory(Settings()), time.monotonic() + 10)
    assert reader.start() is None
    pieces = [bytes(piece) for piece in reader.chunks()]
    assert (reader.reason, pieces) == ("read_error", [])
    assert seen == [source, source]


@pytest.mark.parametrize("wide", [True, False])
def test_length_with_more_segments_than_the_header_can_count(wide):
    segments = 70000
    core = bytearray(elf(b"x" * 5000, shape=Shape(64 if wide else 32), segments=segments))
    sections = len(core)
    struct.pack_into("<Q" if wide else "<I", core, 40 if wide else 32, sections)
    struct.pack_into("<HH", core, 58 if wide else 46, 64, 1)
    assert elf_length(core)[1] == sections + 64


@pytest.mark.parametrize(
    "core", [b"", b"x" * 63, b"\x7fELF" + b"\x03" * 60, b"x" * 100, b"\x7fELF\x02\x01" + b"\xff" * 100]
)
def test_what_is_no_core_has_no_length(core):
    assert elf_length(core)[1] == 0


@given(
    st.binary(min_size=4, max_size=400), st.sampled_from([b"\x02\x01", b"\x01\x01", b"\x02\x02", b"\x01\x02"])
)
def test_any_header_is_survived(rest, kind):
    wanted, length = elf_length(b"\x7fELF" + kind + rest)
    assert 0 <= wanted <= HEADER_LIMIT
    assert length >= 0


@pytest.mark.parametrize(
    ("key", "text", "accepts"),
    [
        ("COMPRESSOR", "lz4", "one of auto, pigz, isal, gzip, none"),
        ("LEVEL", "0", "from 1 to 9"),
        ("LEVEL", "ten", "from 1 to 9"),
        ("KEEP_FREE_PERCENT", "100", "from 0 to 99"),
        ("MAX_TOTAL_BYTES", "most", "half"),
        ("MAX_TOTAL_BYTES", "-1", "half"),
        ("DEADLINE_SECONDS", "-1", "from 1 to"),
        ("RATE_LIMIT", "5", "5/600"),
        ("RATE_LIMIT", "5/x", "5/600"),
        ("RATE_LIMIT", "", "5/600"),
        ("RATE_LIMIT", "5 600", "5/600"),
        ("RATE_LIMIT", "5//600", "5/600"),
        ("VITAL_LIMIT", "20/600/", "20/600"),
        ("IGNORE_SIGNALS", "SEGV", "3,24"),
        ("WATCH_DIR", "core_dumps", "absolute"),
        ("RESPECT_RLIMIT", "true", "yes or no"),
        ("WATCHDIR", "/x", "one of WATCH_DIR"),
        ("parse", "/x", "one of WATCH_DIR"),
    ],
)
def test_wrong_settings_say_what_is_accepted(key, text, accepts):
    with pytest.raises(ValueError, match=accepts):
        Settings.parse(key, text)


@given(st.sampled_from([*Settings.defaults(), "", "parse"]), st.text())
def test_any_setting_is_taken_or_refused_with_a_reason(key, text):
    refused = None
    try:
        Settings.parse(key, text)
    except ValueError as error:
        refused = str(error)
    assert refused != ""


@given(st.binary(max_size=60))
def test_records_hold_no_raw_bytes(value):
    text = percent(value)
    assert unquote_to_bytes(text) == value
    assert text.isascii()
    assert not set(text) & set("\n=% ") - {"%"}


@limits(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=500))
def test_no_bytes_in_helper_conf_cost_a_setting(tmp_path, text):
    path = tmp_path / "helper.conf"
    path.write_bytes(text)
    path.chmod(0o600)
    read = Settings()
    read.load(str(path))
    assert read.WATCH_DIR.startswith("/")
    assert 1 <= read.DEADLINE_SECONDS <= 86400


@pytest.mark.parametrize("kind", [1, 2])
@limits(deadline=None)
@given(order=st.sampled_from([1, 2]), rest=st.binary(min_size=58, max_size=300))
def test_no_elf_header_makes_the_helper_wait_for_more_than_its_limit(kind, order, rest):
    wanted, length = elf_length(b"\x7fELF" + bytes([kind, order]) + rest)
    assert 0 <= wanted <= HEADER_LIMIT + 64
    assert length >= 0


@pytest.fixture
def directory(watch_dir):
    descriptor = os.open(watch_dir, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_partial_of_a_name_that_is_taken_has_another_name_from_the_start(directory, watch_dir):
    crash = parse_arguments(["-P1", "-p1", "-s11", "-t1700000000", "-d1", "--", "app"])
    (watch_dir / "core-app-1700000000-1-11.gz").write_bytes(b"first")
    dump, name = create_partial(directory, crash, ".gz")
    os.close(dump)
    assert name == "core-app-1700000000-1-11-1.gz"
    assert sorted(os.listdir(watch_dir)) == [
        "core-app-1700000000-1-11-1.gz.partial",
        "core-app-1700000000-1-11.gz",
    ]


def test_name_that_was_taken_while_the_dump_was_written_is_not_replaced(directory, watch_dir):
    crash = parse_arguments(["-P1", "-p1", "-s11", "-t1700000000", "-d1", "--", "app"])
    dump, name = create_partial(directory, crash, ".gz")
    os.write(dump, b"ours")
    (watch_dir / name).write_bytes(b"of somebody else")
    published = publish(directory, dump, name, crash, ".gz")
    os.close(dump)
    assert published == "core-app-1700000000-1-11-1.gz"
    assert (watch_dir / published).read_bytes() == b"ours"
    assert (watch_dir / name).read_bytes() == b"of somebody else"

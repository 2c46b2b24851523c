"""Names, keys and attributes: whatever bytes a crashing process chose, a key is safe and a log line is one line."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector import config
from core_dump_collector.errors import ConfigError
from core_dump_format.attributes import NUMBERS, TEXTS, TRUNCATED_REASONS, read_attributes
from core_dump_format.keys import (
    MOST_KEY_BYTES,
    TEMPLATE_FIELDS,
    build_key,
    build_record_key,
    check_template,
    date_and_hour,
    literal_folder,
)
from core_dump_format.names import CoreName, content_mark, is_candidate, parse_name, with_copy
from core_dump_format.text import printable

anything = st.text(max_size=300) | st.binary(max_size=255).map(lambda b: b.decode("utf-8", "surrogateescape"))
comms = st.text(alphabet=string.ascii_letters + string.digits + "._+-", max_size=15)


times = st.integers(1_000_000_000, 9_999_999_999)


@given(comms, times, st.integers(0, 2**22), st.integers(0, 64), st.none() | st.integers(0, 9999))
def test_every_name_the_helper_can_make_is_read_back(comm, timestamp, pid, signal, copy):
    tail = "" if copy is None else f"-{copy}"
    for suffix in ("", ".gz"):
        name = parse_name(f"core-{comm}-{timestamp}-{pid}-{signal}{tail}{suffix}")
        assert name == CoreName(comm, timestamp, pid, signal, copy, compressed=suffix == ".gz")


copies = st.lists(st.integers(1, 9999), min_size=2, max_size=4)


@given(comms, times, st.integers(0, 2**22), st.integers(0, 64), copies)
def test_name_of_a_copy_of_a_copy_tells_the_crash(comm, timestamp, pid, signal, copies):
    name = f"core-{comm}-{timestamp}-{pid}-{signal}.gz"
    for copy in copies:
        name = with_copy(name, copy)
    assert parse_name(name) == CoreName(comm, timestamp, pid, signal, copies[0], compressed=True)


@given(comms, times, st.integers(1, 50 << 40), st.integers(0, 2**32 - 1), st.sampled_from(["", ".gz"]))
def test_key_that_is_made_of_the_content_is_read_back(comm, timestamp, size, crc32, suffix):
    mark = content_mark(size, crc32)
    name = parse_name(with_copy(f"core-{comm}-{timestamp}-42-11{suffix}", mark))
    assert name == CoreName(comm, timestamp, 42, 11, None, compressed=suffix == ".gz", content=mark)
    assert (mark[:8], mark[9:]) == (f"{crc32:08x}", f"{size:x}")


@given(
    st.from_regex(
        r"core-[A-Za-z0-9._+-]{0,15}-[0-9]{1,20}-[0-9]{1,10}-[0-9]{1,3}(-([0-9]{1,4}|[0-9a-f]{8}x[0-9a-f]{1,12}))?(\.gz)?",
        fullmatch=True,
    )
)
def test_every_name_of_the_grammar_is_parsed(name):
    assert parse_name(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "", "core", "core.123", "core-a-1-2", "core-a-1-2-11.gz.partial", "core-a b-1-2-11", "core-a-1-2-11\n",
        "core-a-\u0661-2-11", "core-é-1-2-11", "../core-a-1-2-11", "core-a-1-2-11.gz.gz",
        "core-" + "a" * 255 + "-1-2-11",
    ],
)  # fmt: skip
def test_names_outside_the_grammar_are_not_parsed(name):
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("core-a-1-2-11.gz", True), ("core", True), ("heap.hprof", True), ("core-a\nb", True),
        ("core-a-1-2-11.gz.partial", False), (".core", False), ("quarantine", False), ("notes.txt", False),
        ("", False), (".helper", False), ("core/../../etc/passwd", False),
    ],
)  # fmt: skip
def test_only_names_under_a_pattern_are_candidates(name, taken):
    assert is_candidate(name, ("core*", "*.hprof")) is taken


def test_no_pattern_reaches_partials_dotfiles_or_the_quarantine():
    assert not any(is_candidate(n, ("*", ".*", "q*")) for n in ("a.partial", ".helper", "quarantine"))


@given(anything)
def test_a_displayed_name_is_short_printable_and_encodable(name):
    shown = printable(name)
    assert shown.isprintable()
    assert len(shown) <= 300
    shown.encode("utf-8")


@given(st.dictionaries(st.sampled_from(sorted(TEMPLATE_FIELDS)), anything))
def test_a_key_is_safe_whatever_the_fields_hold(fields):
    template = "{namespace}/{pod}/{container}/{node}/{date}/{hour}/{comm}/{pid}-{signal}-{timestamp}/{name}"
    key = build_key("pre/fix/", template, fields, suffix=".gz")
    assert re.fullmatch(r"pre/fix/[A-Za-z0-9._+/-]+\.gz", key)
    for copy in (9999, content_mark(50 << 40, 0xFFFFFFFF)):
        longest = with_copy(key, copy) + ".json"
        assert len(longest) <= 1024
        assert max(map(len, longest.split("/"))) <= 255
    assert not {"", ".", ".."} & set(key.split("/"))
    assert key.count("/") == 2 + template.count("/")


def test_keys_of_long_fields_that_differ_at_the_end_stay_different():
    template = "{name}/{name}/{name}/{name}/{name}"
    keys = {build_key("", template, {"name": "a" * 250 + c}, suffix=".gz") for c in "bcd"}
    assert len(keys) == 3
    assert max(map(len, keys)) == MOST_KEY_BYTES


def test_no_dump_takes_the_key_of_what_belongs_to_another_dump_or_of_a_module():
    for name in ("a.gz.json", "a.gz.modules"):
        assert build_key("", "{name}", {"name": name}, suffix="") == f"{name}_"
    taken = {"comm": "_modules", "name": "sha256"}
    assert build_key("p/", "{comm}/{name}", taken, suffix="") == "p/__modules/sha256"


@pytest.mark.parametrize(
    ("template", "folder", "record"),
    [
        ("dumps/{date}/{node}/{name}", "dumps/", "dumps/2026-11-28/n/"),
        ("{node}/{name}", "", "n/"),
        ("{name}", "", "n/"),
        ("a/b-{date}/{comm}", "a/", "a/b-2026-11-28/n/"),
        ("{date}/{node}-{comm}/{name}", "", "2026-11-28/n-unknown/"),
    ],
)
def test_record_without_a_dump_is_in_the_folder_of_the_dumps_of_its_node(template, folder, record):
    fields = {"date": "2026-11-28", "node": "n", "name": "x"}
    assert literal_folder(template) == folder
    assert build_record_key("p/", template, fields, name="storm-ab-1.json") == f"p/{record}storm-ab-1.json"


def test_raw_cores_get_gz_and_compressed_ones_keep_theirs():
    for name in ("core-a-1-2-11", "core-a-1-2-11.gz"):
        assert (
            build_key("p/", "{node}/{name}", {"node": "n", "name": name}, suffix=".gz")
            == "p/n/core-a-1-2-11.gz"
        )
    assert build_key("", "{name}", {"name": "a.hprof"}, suffix="") == "a.hprof"


def test_unknown_fields_are_said_to_be_unknown():
    assert build_key("", "{namespace}/{comm}/{pid}", {"comm": "", "pid": 0}, suffix="") == "unknown/unknown/0"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{nme}", "{nme}"), ("{name!r}", "not a field"), ("{name:>9}", "not a field"),
        ("{name.__class__}", "not a field"),
        ("{0}", "not a field"), ("{}", "not a field"), ("{name", "KEY_TEMPLATE"), ("a}", "KEY_TEMPLATE"),
        ("all-the-same", "share one key"), ("/{name}", "slash"), ("{name}/", "slash"), ("a//{name}", "slash"),
        ("../{name}", "'..'"), ("_modules/{name}", "_modules"),
        ("a b/{name}", "takes A-Z"), ("é{name}", "takes A-Z"), ("{{x}}{name}", "takes A-Z"),
    ],
)  # fmt: skip
def test_a_wrong_template_is_one_clear_line(template, said):
    with pytest.raises(ConfigError) as raised:
        config.load({"bucket_name": "dumps", "key_template": template})
    assert said in str(raised.value)
    assert "KEY_TEMPLATE=" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "template", ["{node}/{name}", "{name}", "date={date}/hour={hour}/{namespace}/{pod}/{name}"]
)
def test_right_templates_are_accepted(template):
    check_template(template)


@given(st.text(max_size=40))
def test_an_accepted_template_always_renders(template):
    try:
        check_template(template)
    except ValueError:
        return
    assert build_key("", template, {}, suffix=".gz").endswith(".gz")


@given(st.integers())
def test_dates_never_fail(timestamp):
    date, hour = date_and_hour(timestamp)
    assert (date is None) == (hour is None) == (not 0 <= timestamp <= 253_402_300_799)


def test_a_date_is_utc():
    assert date_and_hour(1_700_000_000) == ("2023-11-14", "22")


@given(st.dictionaries(st.sampled_from([*NUMBERS, *TEXTS, "upload", "x"]), st.binary(max_size=1100)))
def test_attributes_written_by_anybody_are_typed_or_left_out(raw):
    attributes = read_attributes({f"user.coredump.{name}": value for name, value in raw.items()})
    for name, value in attributes.items():
        assert type(value) is (int if name in NUMBERS else str)
        assert len(raw.get(name, b"")) <= 1024
        str(value).encode()
    assert attributes.get("truncated") in {None, *TRUNCATED_REASONS}
    assert set(attributes) <= NUMBERS | TEXTS


def test_attribute_numbers_are_decimal_digits_only():
    raw = {
        f"user.coredump.{n}": v
        for n, v in {"pid": b"42", "uid": b"-1", "gid": b" 1", "tid": "٣".encode()}.items()
    }
    assert read_attributes(raw) == {"pid": 42}


def test_bytes_that_are_not_utf8_are_escaped():
    assert read_attributes({"user.coredump.comm": b"a\xffb"}) == {"comm": "a\\xffb"}

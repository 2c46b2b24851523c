"""A list of modules keeps every path and number; no list that an attacker wrote costs more than a bound."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_format import modules
from core_dump_format.modules import ListError, Module, ModuleList, parse_list, render_list

DUMP = "core-app-1700000000-42-11.gz"
KEPT = Module(b"/usr/lib/libc.so.6", 0x7F0000000000, 0x7F0000200000, 0, "ab" * 20, 2_000_000, "cd" * 32)
GONE = Module(b"/tmp/x\xff\n\\x41 (deleted)", 0x400000, 0x401000, 4096, missing="file_system")
NUMBERS = st.integers(0, 2**64 - 2)


def document(**changes):
    """Return a list as JSON whose only module has these fields changed; None removes one."""
    row = {"path": "/a", "start": "0x1", "end": "0x2", "offset": "0x0", "bytes": 1, "sha256": "cd" * 32}
    row = {key: value for key, value in {**row, **changes}.items() if value is not None}
    return json.dumps({"version": 1, "dump": DUMP, "modules": [row]}).encode()


def test_list_is_read_as_it_was_written():
    listed = ModuleList(DUMP, (KEPT, GONE), 7, "dumpable=2")
    assert parse_list(render_list(listed)) == listed
    assert parse_list(render_list(ModuleList(DUMP))) == ModuleList(DUMP)


@given(st.binary(min_size=1, max_size=300).filter(lambda path: b"\0" not in path), NUMBERS)
def test_every_path_and_address_survives(path, start):
    module = Module(path, start, start + 1, start, missing="gone")
    text = render_list(ModuleList(DUMP, (module,)))
    assert parse_list(text).modules == (module,)
    assert text.decode().replace("\n", "").isprintable()


def test_escaped_path_is_one_word_of_text():
    assert modules.escape_path("/opt/é".encode()) == "/opt/é"
    assert modules.escape_path(b"/a\\b\xff\x1b[31m\xe2\x80\xae") == r"/a\x5cb\xff\x1b[31m\xe2\x80\xae"


def test_what_exceeds_a_bound_is_counted():
    long = KEPT._replace(path=b"/\xff" + b"a" * 4000)
    listed = parse_list(render_list(ModuleList(DUMP, (long,) * 4096, 3)))
    assert 100 < len(listed.modules) < 4096
    assert listed.left_out == 3 + 4096 - len(listed.modules)
    listed = parse_list(render_list(ModuleList(DUMP, (KEPT,) * 5000 + (KEPT._replace(path=b"/" * 4097),))))
    assert (len(listed.modules), listed.left_out) == (modules.MOST_MODULES, 905)


@pytest.mark.parametrize(
    "changes",
    [
        {"path": None}, {"path": ""}, {"path": 7}, {"path": "/a\0"}, {"path": "\\"}, {"path": "\\xZZ"},
        {"path": "\\x00"}, {"path": "\ud800"}, {"path": "/" * 4097}, {"start": 1}, {"start": "1"},
        {"start": "0x2"}, {"start": "0x" + "f" * 17}, {"offset": "-0x1"}, {"bytes": None}, {"bytes": -1},
        {"bytes": True}, {"bytes": 1.0}, {"bytes": 1 << 41}, {"bytes": int("9" * 21)}, {"sha256": "CD" * 32},
        {"sha256": "../" + "a" * 61}, {"sha256": "cd" * 32 + "\n"}, {"sha256": None}, {"build_id": "x" * 40},
        {"build_id": None, "missing": 1}, {"missing": ["gone"]},
    ],
)  # fmt: skip
def test_wrong_module_is_refused(changes):
    assert parse_list(document())
    with pytest.raises(ListError):
        parse_list(document(**changes))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"version": 1}', b'{"version": true}',
        b'{"version": 2, "dump": "core-a-1-2-3", "modules": []}', b'{"version": 1, "modules": []}',
        b'{"version": 1, "dump": "../x", "modules": []}', b'{"version": 1, "dump": ".x", "modules": []}',
        b'{"version": 1, "dump": "a", "modules": {}}', b'{"version": 1, "dump": "a", "modules": [[]]}',
        b'{"version": 1, "dump": "a", "modules": [], "left_out": NaN}',
        b'{"version": 1, "dump": "a", "modules": [], "left_out": 1e9}',
        b'{"version": 1, "dump": "a", "modules": [], "sensitive": "\\n"}',
        b'{"version": 1, "dump": "a", "modules": [' + b",".join([b"{}"] * 4097) + b"]}",
    ],
)  # fmt: skip
def test_wrong_list_is_refused(content):
    with pytest.raises(ListError):
        parse_list(content)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_no_json_is_more_than_a_wrong_list(value):
    for name in ("version", "dump", "modules", "left_out", "sensitive"):
        whole = json.loads(document())
        whole[name] = value
        with contextlib.suppress(ListError):
            parse_list(json.dumps(whole).encode())


@pytest.mark.parametrize("filler", [b"9" * (4 << 20), b"[" * (4 << 20), b" " * (5 << 20)])
def test_long_list_costs_little(filler):
    started = time.process_time()
    with pytest.raises(ListError):
        parse_list((b'{"version": ' + filler)[: modules.MOST_LIST_BYTES + 1])
    assert time.process_time() - started < 2


def test_what_a_newer_release_adds_is_ignored():
    (module,) = parse_list(document(missing="eclipse", colour="red", bytes=None, sha256=None)).modules
    assert module.missing == modules.UNKNOWN_REASON


def test_names_are_recognised_and_no_others():
    digest = "ab" * 32
    for is_sensitive in (False, True):
        name = modules.module_name(digest, is_sensitive=is_sensitive)
        assert modules.parse_module_name(name) == (digest, is_sensitive)
        assert modules.parse_list_name(name) is None
    assert modules.parse_list_name(modules.list_name(DUMP)) == DUMP
    for name in (
        "",
        ".json",
        "collector",
        "a/b.json",
        "module-ab.gz",
        f"module-{digest}.gz.partial",
        "x\n.json",
    ):
        assert modules.parse_module_name(name) is None
        assert modules.parse_list_name(name) is None
    for dump in ("", "a/b", "..", ".x", "é", "a" * 243):
        with pytest.raises(ValueError, match="not the name"):
            modules.list_name(dump)


def test_no_pattern_of_any_collector_matches_the_directory():
    from core_dump_format.names import is_candidate, is_partial

    assert not is_candidate(modules.DIRECTORY, ("*",))
    assert not is_partial(modules.DIRECTORY)

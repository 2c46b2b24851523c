"""docs/contracts.md lists what the code writes and reads, all of it and nothing else."""

import inspect
import json
import re
import time

import pytest
from tests.support.pages import ROOT, codes, column, rows, section

from core_dump_collector import metadata
from core_dump_collector.losses.messages import REFUSALS
from core_dump_collector.node import modulefiles, suppressed
from core_dump_format import attributes, modules, names
from core_dump_helper.records import Record

PAGE = "contracts.md"
NAMES = section(PAGE, "Names in the watch directory")
ATTRIBUTES = section(PAGE, "Extended attributes of a dump")
OBJECTS = section(PAGE, "Object and metadata object")
RECORDS = section(PAGE, "Records of refused dumps")
MODULES = section(PAGE, "The files behind a crash")


def test_names_are_those_that_code_creates_and_recognises():
    listed = [codes(row[0])[0] for row in rows(NAMES, "name")]
    values = {"%e": "app", "%t": "1700000000", "%p": "42", "%s": "11"}
    state = {f"{suppressed.STATE}/", f"{names.QUARANTINE}/", f"{modules.DIRECTORY}/"}
    assert set(listed) >= state
    for pattern in set(listed) - state - {"core…"}:
        name = re.sub("%.", lambda found: values[found[0]], pattern)
        parsed = names.parse_name(names.unpartial(name))
        assert parsed is not None, f"nothing in the code knows {pattern}"
        assert parsed[:4] == ("app", 1700000000, 42, 11)


NAME_CASES = [
    "core-app-1700000000-42-11.gz", "core--1700000000-42-11", "core-a-b-1700000000-42-11-3.gz", "core-1-2-3",
    "core-app-1700000000-42.gz", "core-app-1700000000-42-11.gz.partial", "core-a/b-1700000000-42-11", "x",
    "core-app-1700000000-42-11-1a2b3c4dx5f3a.gz", "core-app-1700000000-42-11-1a2b3c4d-5f3a.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", NAME_CASES)
def test_grammar_is_the_one_of_the_code(name):
    (pattern,) = [code for code in codes(NAMES) if code.startswith("^core-")]
    found = re.fullmatch(pattern, name)
    parsed = names.parse_name(name)
    assert bool(found) == bool(parsed)
    if parsed and parsed.copy is None:
        assert (found["comm"], int(found["pid"])) == (parsed.comm, parsed.pid)
    assert f"10^{len(str(names.LEAST_TIMESTAMP)) - 1}" in NAMES


def test_attributes_are_all_those_of_the_code():
    listed = column(ATTRIBUTES, "name")
    known = {name.removeprefix(attributes.ATTRIBUTE_PREFIX) for name in attributes.ATTRIBUTE_NAMES}
    assert sorted(listed) == sorted(known)
    assert f"{attributes.MOST_ATTRIBUTE_BYTES:,} bytes" in ATTRIBUTES


def test_reasons_for_truncation_are_all_those_of_the_code():
    (row,) = [row for row in rows(ATTRIBUTES, "name") if row[0] == "`truncated`"]
    assert set(codes(row[1])) == attributes.TRUNCATED_REASONS


def test_reasons_for_truncation_in_the_helper_are_known_to_the_collector():
    sources = "".join(path.read_text() for path in (ROOT / "helper/core_dump_helper").glob("*.py"))
    for reason in attributes.TRUNCATED_REASONS - {"salvaged"}:
        assert f'"{reason}"' in sources, f"no helper writes {reason}"


def test_fields_of_the_metadata_object_are_all_those_of_the_code():
    listed = set(column(OBJECTS, "name")) | set(column(ATTRIBUTES, "name"))
    own = {"upload", "salvaged"}  # of the file, not of the dump
    assert listed - own | {"sensitive_reason"} == attributes.METADATA_FIELDS


def test_user_metadata_is_what_the_code_sets():
    (line,) = [line for line in OBJECTS.splitlines() if line.startswith("S3 user metadata")]
    known = {"pid": 1, "signal": 11, "comm": "app"}
    facts = metadata.Facts("name", known, "node", 0, None)
    assert set(codes(line)) == facts.user_metadata().keys()


def test_fields_of_a_record_are_those_that_the_helper_writes():
    workload = {"exe": b"/app", "container_id": b"", "pod_uid": b"", "signal": b"11"}
    record = Record(workload, "rate_limit", 600)
    record.count(False, int(time.time()))
    written = [line.partition("=")[0] for line in record.render().decode().split()]
    (line,) = [line for line in RECORDS.splitlines() if line.startswith("`exe ")]
    listed = [word for code in codes(line.partition("Reasons:")[0]) for word in code.split()]
    assert listed == written


def test_reasons_for_refusal_are_all_those_of_the_code():
    (line,) = [line for line in RECORDS.splitlines() if "Reasons: " in line]
    assert codes(line.partition("Reasons: ")[2].partition(".")[0]) == list(REFUSALS)
    sources = "".join(path.read_text() for path in (ROOT / "helper/core_dump_helper").glob("*.py"))
    for reason in REFUSALS:
        assert f'"{reason}"' in sources, f"no helper refuses for {reason}"


def test_key_of_a_record_is_the_one_that_the_collector_writes():
    record = suppressed.Record("ab" * 12, "rate_limit", 1, 2, 0, 1700000000, 1700000001, 600, ())
    name = record.as_document().name.rpartition("/")[2]
    (pattern,) = [code for code in codes(RECORDS) if "storm-" in code]
    shape = (
        re.escape(pattern.partition("{node}/")[2])
        .replace("<hash>", "[0-9a-f]{24}")
        .replace("<first>", "1700000000")
    )
    assert re.fullmatch(shape, name)


def test_schema_number_is_the_one_that_is_written():
    (row,) = [row for row in rows(OBJECTS, "name") if row[0] == "`schema`"]
    assert f'"schema": {row[1]},' in inspect.getsource(metadata)


def test_names_of_modules_are_those_that_the_code_knows():
    listed = column(MODULES, "in `.modules/`")
    digest = "ab" * 32
    names_in_code = [modules.module_name(digest, is_sensitive=flag) for flag in (False, True)]
    names_in_code += [modules.COLLECTOR_MARK, modules.list_name("DUMP"), f"DUMP{modulefiles.RECEIPT_SUFFIX}"]
    assert sorted(name.replace("SHA256", digest) for name in listed) == sorted(names_in_code)


def test_fields_of_a_list_of_modules_are_those_that_the_code_writes():
    kept = modules.Module(b"/lib/a", 1, 2, 0, "ab" * 20, 3, "cd" * 32)
    listed = modules.ModuleList("core-a-1-2-3.gz", (kept, kept._replace(missing="gone")), 1, "dumpable=2")
    document = json.loads(modules.render_list(listed))
    written = {*document, *document["modules"][0], *document["modules"][1]}
    assert set(column(MODULES, "field")) == written
    (row,) = [row for row in rows(MODULES, "field") if row[0] == "`missing`"]
    assert set(codes(row[1])) == modules.MISSING_REASONS
    assert f"{modules.MOST_MODULES:,} modules" in MODULES
    assert f"{modules.MOST_PATH_BYTES:,} bytes" in MODULES
    assert f"{modules.MOST_LIST_BYTES >> 20} MiB" in MODULES

"""A bucket of many dumps: few requests, and the newest printed while the rest is still being listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.keyspace import KeySpace, key_space, serving

from core_dumps.dump import Dump
from core_dumps.layouts import merge

END = 1_772_409_600  # of 2026-03-01, UTC
COUNT, NODES, DAYS = 8000, 20, 4


@pytest.fixture
def large(cli):
    """Serve computed dumps under a key template, and yield what was asked for."""

    def serve(template):
        space = key_space(COUNT, NODES, template, days=DAYS, end=END)
        cli.environ |= {"BUCKET_NAME": "dumps", "KEY_TEMPLATE": template}
        return space

    return serve


def rows(cli, space, *words):
    """Return what `list` says, and the requests that it made."""
    space.requests.clear()
    with serving(space) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        return cli.json(*words), dict(space.requests)


def test_every_dump_is_listed_newest_first_with_two_requests_a_node(cli, large):
    space = large("{node}/{name}")
    found, requests = rows(cli, space)
    assert [row["pid"] for row in found] == list(range(1000 + COUNT - 1, 999, -1))
    assert [row["corefile"] for row in found] == ["present"] * 1000 + ["unread"] * (COUNT - 1000)
    assert requests == {"ListObjectsV2": 1 + NODES, "GetObject": 1000}
    assert rows(cli, space, "--node", "node-007", "-n", "5")[1] == {"ListObjectsV2": 1, "GetObject": 5}


def test_page_that_is_written_in_another_way_is_read_all_the_same(cli, large):
    space = large("{node}/{name}")
    space.oddity = "<!-- hello -->"
    found, requests = rows(cli, space, "--node", "node-007", "-n", "5")
    assert [row["pid"] for row in found] == [1000 + COUNT - 13 - NODES * n for n in range(5)]
    assert requests == {"ListObjectsV2": 2, "GetObject": 5}, "once more, for botocore to parse"


@pytest.mark.parametrize(
    ("template", "words", "listings"),
    [
        ("{date}/{node}/{name}", ("-n", "20"), 1 + 4),  # the days, and the newest: 2,000 dumps, 4,000 keys
        ("{date}/{node}/{name}", ("-S", "2026-03-01", "-U", "2026-03-01 13:00"), 1 + 4),
        ("{date}/{node}/{name}", ("-n", "20", "--node", "node-003"), 1 + 1),
        ("{node}/{date}/{name}", ("-S", "2026-03-01"), 1 + NODES),  # the nodes, and each after the day before
    ],
)
def test_dates_in_keys_spare_listings(cli, large, template, words, listings):
    found, requests = rows(cli, large(template), *words)
    times = [row["time"] for row in found]
    assert times == sorted(times, reverse=True)
    assert found
    assert requests["ListObjectsV2"] == listings


def test_newest_day_is_printed_while_older_ones_are_not_yet_listed(cli, large):
    space = large("{date}/{node}/{name}")
    space.held = "2026-02-27/"
    with serving(space) as endpoint:
        environ = cli.variables() | {"AWS_ENDPOINT_URL_S3": endpoint}
        command = [sys.executable, "-m", "core_dumps.cli", "list", "--no-legend"]
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline()
            assert not space.release.is_set()
            assert "2026-03-01" in first
            space.release.set()
            assert len(process.stdout.readlines()) == COUNT - 1


def test_reader_that_goes_away_ends_the_listing(cli, large):
    space = large("{date}/{node}/{name}")
    space.held = "2026-02-26/"
    with serving(space) as endpoint:
        environ = cli.variables() | {"AWS_ENDPOINT_URL_S3": endpoint}
        command = [sys.executable, "-m", "core_dumps.cli", "list", "--json=short"]
        reading, writing = os.pipe()
        with subprocess.Popen(
            command, env=environ, stdout=writing, stderr=subprocess.PIPE, text=True
        ) as process:
            os.close(writing)
            with open(reading) as pipe:
                assert pipe.readline() == "[\n"
                assert json.loads(pipe.readline().rstrip(",\n"))["pid"] == 1000 + COUNT - 1
            space.release.set()
            assert process.wait(30) == 141
            assert "Traceback" not in process.stderr.read()


def both_layouts():
    """Return a bucket in which the collectors of half of the nodes still use the old layout, and modules."""
    space = key_space(400, 4, "dumps/{date}/{node}/{name}", days=4, end=END)
    former = ("node-001", "node-003")
    bodies = {}
    for key, body in space.bodies.items():
        _, _, node, name = key.split("/")
        bodies[f"{node}/{name}" if node in former else key] = body
    return KeySpace(bodies | {f"_modules/sha256/{number:064x}": b"ELF" for number in range(3)})


def test_dumps_of_both_layouts_are_one_list_newest_first(cli):
    cli.environ["BUCKET_NAME"] = "dumps"
    space = both_layouts()
    found, requests = rows(cli, space)
    assert [row["pid"] for row in found] == list(range(1399, 999, -1))
    assert requests["ListObjectsV2"] == 1 + 4 + 1 + 2, "the days, each, the old nodes, each"
    found, requests = rows(cli, space, "--node", "node-001")
    assert [row["pid"] for row in found] == list(range(1397, 999, -4))
    assert requests["ListObjectsV2"] == 1 + 4 + 1
    found, _ = rows(cli, space, "--node", "node-002", "-S", "2026-03-01")
    assert {row["node"] for row in found} == {"node-002"}


def test_modules_are_no_dumps_whatever_the_template(cli):
    cli.environ["BUCKET_NAME"] = "dumps"
    bodies = both_layouts().bodies
    for template in ("{name}", "{node}/{name}"):
        cli.environ["KEY_TEMPLATE"] = template
        found, _ = rows(cli, KeySpace(bodies))
        assert len(found) == 400


def test_dump_whose_time_no_calendar_has_is_listed(cli):
    cli.environ["BUCKET_NAME"] = "dumps"
    keys = ["dumps/unknown/n/core-a-999999999999-1-11.gz", "dumps/2026-03-01/n/core-a-1772368000-2-11.gz"]
    space = KeySpace(dict.fromkeys(keys, b"x"))
    assert [row["corefile"] for row in rows(cli, space)[0]] == ["incomplete"] * 2
    assert len(rows(cli, space, "-U", "2026-03-02")[0]) == 1


def test_objects_by_which_nodes_test_the_store_cost_no_listing(cli):
    cli.environ["BUCKET_NAME"] = "dumps"
    space = key_space(4, 1, "dumps/{date}/{node}/{name}", days=1, end=END)
    probes = {f"dumps/10-0-0-{number}/.condition": b"" for number in range(50)}
    found, requests = rows(cli, KeySpace(space.bodies | probes))
    assert len(found) == 4
    assert requests["ListObjectsV2"] == 1 + 1 + 1


def test_record_that_both_layouts_hold_is_listed_once(cli):
    cli.environ["BUCKET_NAME"] = "dumps"
    record = json.dumps({"state": "suppressed", "reason": "rate_limit"}).encode()
    names = ["dumps/2026-03-01/n/storm-ab-1772368000.json", "n/storm-ab-1772368000.json"]
    names += ["m/storm-ab-1772368000.json"]
    found, _ = rows(cli, KeySpace(dict.fromkeys(names, record)))
    assert [row["corefile"] for row in found] == ["suppressed"] * 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=4), min_size=1, max_size=3))
def test_merged_streams_are_complete_and_newest_first(streams):
    """The numbers of a stream are sorted and cut into groups of the given lengths."""
    made, every = [], []
    for number, groups in enumerate(streams):
        left = sorted(
            (Dump(f"{number}-{n}", 1, at, False, {}) for n, at in enumerate(at for g in groups for at in g)),
            key=lambda dump: (dump.timestamp, dump.key),
            reverse=True,
        )
        every += left
        cut = []
        for group in filter(None, groups):
            cut.append(left[: len(group)])
            left = left[len(group) :]
        made.append(iter(cut))
    found = [dump for group in merge(made) for dump in group]
    assert found == sorted(every, key=lambda dump: (dump.timestamp, dump.key), reverse=True)

"""A bucket of many dumps: few requests, and the newest printed while the rest is still being listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.support.keyspace import key_space, serving

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

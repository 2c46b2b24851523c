"""Words, times, exit codes, output: what a person who knows coredumpctl expects."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support.s3 import haproxy, keys_in

from core_dumps import match, when
from core_dumps.errors import UsageError

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("now", "2026-03-10T12:30:00"),
        ("today", "2026-03-10T00:00:00"),
        ("yesterday", "2026-03-09T00:00:00"),
        ("-2h", "2026-03-10T10:30:00"),
        ("-1d 12h", "2026-03-09T00:30:00"),
        ("3 days ago", "2026-03-07T12:30:00"),
        ("2026-02-01", "2026-02-01T00:00:00"),
        ("2026-02-01 14:05", "2026-02-01T14:05:00"),
        ("2026-02-01T14:05:06Z", "2026-02-01T14:05:06"),
        ("2026-02-01T14:05:06+02:00", "2026-02-01T12:05:06"),
        ("Sun 2026-02-01 14:05:06 UTC", "2026-02-01T14:05:06"),
        ("9:05", "2026-03-10T09:05:00"),
        ("@1770000000", "2026-02-02T02:40:00"),
    ],
)
def test_times_are_those_of_systemd(words, expected):
    assert datetime.fromtimestamp(when.parse(words, NOW), UTC).isoformat().removesuffix("+00:00") == expected


@pytest.mark.parametrize(
    "words", ["", "soon", "-", "-2 fortnights", "2026-13-01", "@x", "@" + "9" * 40, "-" + "9" * 9 + "y"]
)
def test_word_that_is_no_time_is_refused_with_examples(words):
    with pytest.raises(UsageError, match="yesterday"):
        when.parse(words, NOW)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("1234", ("pid", "1234")),
        ("nginx", ("comm", "nginx")),
        ("/usr/bin/nginx", ("exe", "/usr/bin/nginx")),
        ("namespace=shop", ("namespace", "shop")),
        ("COREDUMP_EXE=/a=b", ("exe", "/a=b")),
        ("/odd=name", ("exe", "/odd=name")),
    ],
)
def test_match_is_read_as_coredumpctl_does(word, expected):
    assert match.parse([word]) == (expected,)


@pytest.mark.parametrize("word", ["", "colour=red", "signal=LOUD"])
def test_match_that_can_hold_for_nothing_is_refused(word):
    with pytest.raises(UsageError):
        match.parse([word])


@pytest.fixture
def filled(cli, gz):
    """Three nodes with dumps of an hour each, the last an hour ago."""
    start = int(time.time()) - 4 * 3600
    for node in range(3):
        for hour in range(4):
            at, pid = start + hour * 3600 + node, 100 * node + hour
            told = {
                "node": f"n{node}",
                "pid": pid,
                "comm": "app",
                "exe": "/bin/app",
                "namespace": "a" if node else "b",
            }
            told |= {"fingerprint": f"{hour % 2:016x}"}
            cli.put(f"n{node}/core-app-{at}-{pid}-{6 + node}.gz", gz(b"x"), told)
    return cli


def test_filters_and_requests(filled):
    told = filled.run("list", "-v", "--node", "n1", "--no-legend", "-n", "2")
    assert len(told.stdout.splitlines()) == 2
    assert "2 GetObject, 1 ListObjectsV2" in told.stderr, "one folder, and the sidecars that are shown"
    told = filled.run("list", "-v", "--no-legend", "-S", "-3h30min")
    assert len(told.stdout.splitlines()) == 9
    assert "9 GetObject, 4 ListObjectsV2" in told.stderr, "the nodes, then each; older sidecars are not read"
    assert len(filled.json("-U", "-3h30min")) == 3
    assert len(filled.json("--namespace", "a", "-S", "-3h30min")) == 6
    assert [row["pid"] for row in filled.json("-1", "-r")] == [203]
    grouped = filled.json("--group")
    assert [(row["count"], row["fingerprint"]) for row in grouped] == [(6, f"{1:016x}"), (6, f"{0:016x}")]


def test_dates_in_keys_spare_listings_and_threads_are_prefixes(cli, gz):
    first = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp())
    for day in range(5):
        for name in ("app", "other"):
            at = first + day * 86400
            key = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d}/n1/core-{name}-{at}-{day}-11.gz"
            cli.put(key, gz(b"x"), {"pid": day, "comm": name})
    cli.environ["KEY_TEMPLATE"] = "{date}/{node}/{name}"
    told = cli.run("list", "-v", "--json=short", "-S", "2026-03-04")
    assert [row["pid"] for row in json.loads(told.stdout)] == [4, 4, 3, 3]
    assert "3 ListObjectsV2" in told.stderr, "the dates from the 4th on, and each"
    told = cli.run("list", "-v", "--json=short", "--node", "n1", "-U", "2026-03-02", "thread=app")
    assert [row["pid"] for row in json.loads(told.stdout)] == [0]


def test_thread_and_time_make_a_key_to_start_after(cli, gz):
    for number in range(6):
        cli.put(f"n1/core-app-{1772000000 + number}-{number}-11.gz", gz(b"x"), {"pid": number})
    cli.put("n1/core-app-x-1772000003-9-11.gz", gz(b"x"), {"pid": 9})
    rows = cli.json("thread=app", "-S", "@1772000003", "--node", "n1")
    assert [row["pid"] for row in rows] == [5, 4, 3]


def test_rm_deletes_what_was_named_and_only_after_a_yes(filled):
    assert "say which" in filled.run("rm", code=2).stderr
    assert "--yes" in filled.run("rm", "--node", "n1", code=2, stdin=subprocess.DEVNULL).stderr
    assert "deleted" not in filled.run("rm", "--node", "n1", "--dry-run").stdout
    assert len(filled.json()) == 12
    done = filled.run("rm", "--node", "n1", "--yes", "-v")
    assert "deleted 4" in done.stdout
    assert "2 DeleteObjects" in done.stderr, "dumps, then sidecars"
    with filled.server.client() as client:
        assert not keys_in(client, prefix=f"{filled.prefix}/n1/")
    assert {row["node"] for row in filled.json()} == {"n0", "n2"}
    assert filled.run("rm", "--node", "n1", "--yes", code=1).stdout == ""


def test_rm_asks_on_a_terminal_and_deletes_singly_where_the_store_knows_no_batches(filled, tmp_path):
    text = on_terminal(filled, "rm", "--node", "n1", answer=b"n\n")
    assert "Delete 4 dumps?" in text
    assert "nothing was deleted" in text
    assert len(filled.json()) == 12
    rule = "http-request return status 501 if { method POST }"
    with haproxy(tmp_path, filled.server, rule) as proxy:
        filled.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        done = filled.run("rm", "--node", "n1", "--yes", "-v")
    assert "deleted 4" in done.stdout
    assert "8 DeleteObject," in done.stderr
    del filled.environ["AWS_ENDPOINT_URL_S3"]
    assert {row["node"] for row in filled.json()} == {"n0", "n2"}


def test_output_to_nowhere_ends_with_a_line_or_in_silence(filled):
    with open("/dev/full", "w") as full:
        done = filled.run("list", code=1, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.stderr.startswith("core-dumps: writing the output: No space left")
    reading, writing = os.pipe()
    os.close(reading)
    done = filled.run("list", code=141, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == ""


def on_terminal(cli, *arguments, answer=b""):
    """Return what the command writes to a terminal, at which somebody types an answer."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "core_dumps.cli", *arguments]
    with subprocess.Popen(
        command, env=cli.variables() | {"TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave
    ) as process:
        os.close(slave)
        os.write(master, answer)
        text = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            text += piece
        process.wait()
    os.close(master)
    return text.decode()


def test_colours_only_on_a_terminal_and_not_with_no_color(filled):
    text = on_terminal(filled, "list")
    assert "\x1b[" in text
    assert "24 names listed" in text, "how far the listing is"
    assert "names listed" not in text.rpartition("\r\n")[0].split("NODE")[1], (
        "and nothing of it among the rows"
    )
    filled.environ["NO_COLOR"] = "1"
    assert "\x1b[3" not in on_terminal(filled, "list")
    del filled.environ["NO_COLOR"]
    assert "\x1b" not in filled.run("list").stdout


def test_bad_surroundings_get_one_line(cli):
    cli.environ["BUCKET_NAME"] = "no-such-bucket"
    assert re.fullmatch("core-dumps: .*no such bucket.*\n", cli.run("list", code=1).stderr)
    cli.environ["BUCKET_NAME"] = "B"
    assert "s3://bucket/prefix" in cli.run("list", code=2).stderr
    cli.environ |= {"BUCKET_NAME": "dumps", "AWS_SECRET_ACCESS_KEY": "wrong"}
    assert "AWS_SECRET_ACCESS_KEY" in cli.run("list", code=1).stderr
    cli.environ["AWS_SECRET_ACCESS_KEY"] = cli.environ["AWS_ACCESS_KEY_ID"] = ""
    assert "no credentials: set AWS_PROFILE" in cli.run("list", code=1).stderr
    cli.environ |= {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "B", "AWS_MAX_ATTEMPTS": "1"}
    cli.environ["AWS_ENDPOINT_URL_S3"] = "http://127.0.0.1:9"
    assert "nobody answers at http://127.0.0.1:9" in cli.run("list", code=1).stderr


def test_manual_page_is_the_one_of_this_code(cli):
    page = Path(__file__).parents[2] / "docs" / "core-dumps.1"
    assert cli.run("man").stdout == page.read_text(), "core-dumps man > docs/core-dumps.1"


def test_completion_knows_commands_and_options(cli):
    assert "_CORE_DUMPS_COMPLETE=complete_bash" in cli.run("--show-completion", "bash").stdout
    for words, expected in (("core-dumps l", "list"), ("core-dumps list --nam", "--namespace")):
        cli.environ |= {
            "_CORE_DUMPS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        assert cli.run().stdout.split() == [expected]

"""Words, times, exit codes, output: what a person who knows coredumpctl expects."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.collector import wait_until
from tests.support.cores import Shape, build
from tests.support.front import Reply, cut, error, front
from tests.support.keyspace import key_space, serving
from tests.support.s3 import haproxy, keys_in

from core_dumps import match, tables, when
from core_dumps.dump import Dump
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
        ("nginx", ("word", "nginx")),
        ("/usr/bin/nginx", ("exe", "/usr/bin/nginx")),
        ("namespace=shop", ("namespace", "shop")),
        ("COREDUMP_EXE=/a=b", ("exe", "/a=b")),
        ("/odd=name", ("exe", "/odd=name")),
    ],
)
def test_match_is_read_as_coredumpctl_does(word, expected):
    assert match.parse([word]) == (expected,)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "colour=red",
        "signal=LOUD",
        "state=bogus",
        "pid=x",
        "sensitive=maybe",
        "fingerprint=no",
        "truncated=no",
    ],
)
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
    assert told.stderr == "core-dumps: requests: 2 GetObject, 2 ListObjectsV2\n", (
        "one folder of each layout, and what is shown"
    )
    told = filled.run("list", "-v", "--no-legend", "-S", "-3h30min")
    assert len(told.stdout.splitlines()) == 9
    assert "9 GetObject, 5 ListObjectsV2" in told.stderr, "days, nodes, each node; older metadata is not read"
    assert len(filled.json("-U", "-3h30min")) == 3
    assert len(filled.json("--namespace", "a", "-S", "-3h30min")) == 6
    assert filled.json("-r") == filled.json(), "newest first, as in coredumpctl"
    assert filled.json("--oldest-first") == filled.json()[::-1]
    assert [row["pid"] for row in filled.json("-1", "--oldest-first")] == [203]
    grouped = filled.json("--group")
    assert [(row["count"], row["fingerprint"]) for row in grouped] == [(6, f"{1:016x}"), (6, f"{0:016x}")]
    assert grouped[0]["nodes"] == ["n0", "n1", "n2"]


def test_limit_of_groups_counts_groups(filled):
    (newest,) = filled.json("--group", "-n", "1")
    assert (newest["count"], newest["fingerprint"]) == (6, f"{1:016x}")
    assert [row["fingerprint"] for row in filled.json("--group", "--oldest-first")] == [
        f"{0:016x}",
        f"{1:016x}",
    ]


def test_info_and_stats_have_json_too(cli, gz):
    shape = Shape()
    core = build(shape, shape.status(7), [(0x400000, bytes(4096), True)])
    cli.put("n1/core-app-1772000000-5-11.gz", gz(core), {"exe": "/bin/app", "bytes": len(core)})
    (dump,) = json.loads(cli.run("info", "--json=short").stdout)
    assert (dump["pid"], dump["exe"], dump["corefile"]) == (5, "/bin/app", "present")
    assert dump["core"]["machine"] == "x86-64"
    assert dump["core"]["expected_bytes"] == len(core)
    assert [thread["tid"] for thread in dump["core"]["threads"]] == [7]
    assert "core" not in json.loads(cli.run("info", "--json=short", "--no-core").stdout)[0]
    assert json.loads(cli.run("stats", "--json=short").stdout) == [{"count": 1, "sig": 11, "exe": "/bin/app"}]


def test_no_command_lists(filled):
    assert filled.run().stdout == filled.run("list").stdout


def test_options_may_stand_before_the_command_or_without_one(filled):
    """As in `coredumpctl -S yesterday` and `coredumpctl -q info`."""
    assert (
        filled.run("-n", "2", "--node", "n1").stdout == filled.run("list", "-n", "2", "--node", "n1").stdout
    )
    assert filled.run("-1").stdout == filled.run("list", "-1").stdout
    done = filled.run("-q", "--node", "n1", "info", "app", "--no-core", "--json=short")
    assert done.stdout == filled.run("info", "app", "--no-core", "--json=short", "--node", "n1", "-q").stdout
    assert "No such option: --bogus" in filled.run("--bogus", code=2).stderr
    assert "No such command 'bogus'" in filled.run("bogus", code=2).stderr
    assert filled.run("--version").stdout.startswith("core-dumps ")


def test_value_of_an_option_before_the_command_is_not_taken_for_the_command(filled):
    """A node can have the name of a command, and -A takes any word."""
    for words in (["--node", "info"], ["--node", "stats", "-q"], ["-q", "--", "rm"]):
        assert filled.run(*words, code=1).stderr.endswith("core-dumps: no dump matches\n")
    done = filled.run("--node", "rm", "list", "-q", code=1)
    assert done.stderr == "core-dumps: no dump matches\n"
    assert "there is no such file" in filled.run("-A", "get", "--exe", "/none", "bt", code=2).stderr


def test_image_is_known_by_its_name_with_or_without_place_and_tag(cli, gz):
    digest = f"sha256:{'ab' * 32}"
    for number, image in enumerate(
        ("shop.example:5000/web/app:1.2", f"shop.example/app@{digest}", "other"), start=1
    ):
        fields = {"image": image} | ({"image_digest": digest} if number == 1 else {})
        cli.put(f"n/core-app-177200000{number}-{number}-11.gz", gz(b"x"), fields)
    cli.put("n/core-app-1772000009-9-11.gz", gz(b"x"))
    for name, pids in {
        "shop.example:5000/web/app:1.2": [1],
        "shop.example:5000/web/app": [1],
        "app:1.2": [1],
        "app": [2, 1],
        "app:*": [1],
        "shop.example/*": [2],
        digest: [2, 1],
        "other": [3],
        "1.2": [],
    }.items():
        code = 0 if pids else 1
        found = cli.run("list", "--json=short", "--image", name, code=code).stdout
        assert [row["pid"] for row in json.loads(found or "[]")] == pids, name
    assert [row["pid"] for row in cli.json("image=app:1.2", "image=other")] == [3, 1]


def test_word_is_any_name_that_the_tool_prints(cli, gz):
    fields = {"comm": "shop-api", "thread": "worker 3", "exe": "/srv/app/bin/shop.bin", "pod": "shop-6f7-x2x"}
    fields |= {"container": "main", "hostname": "ip-10-0-0-7", "node": "node-a", "namespace": "n"}
    key = cli.put("node-a/core-worker_3-1772000000-5-11.gz", gz(b"x"), fields)
    cli.put("node-b/core-other-1772000001-6-11.gz", gz(b"x"), {"comm": "other", "node": "node-b"})
    words = [
        "shop-api",
        "worker 3",
        "shop.bin",
        "shop-6f7-x2x",
        "main",
        "ip-10-0-0-7",
        "node-a",
        key,
        "shop-*",
    ]
    words += ["core-worker_3-1772000000-5-11.gz", "core-worker_3-1772000000-5-11", "/srv/*/shop.bin"]
    for word in words:
        assert [row["pid"] for row in cli.json(word)] == [5], word
    assert [row["pid"] for row in cli.json("--pod", "shop-6f7-x2x")] == [5]
    assert [row["pid"] for row in cli.json("node-?")] == [6, 5]
    assert cli.run("list", "-F", "COREDUMP_EXE").stdout == "/srv/app/bin/shop.bin\n"


def test_empty_bucket_and_no_match_are_different_sentences(cli, gz):
    assert "is empty" in cli.run("list", "app", code=1).stderr
    cli.put("n1/core-app-1772000000-5-11.gz", gz(b"x"))
    assert cli.run("list", "nobody", code=1).stderr == "core-dumps: no dump matches\n"


def test_taking_one_of_several_says_how_many(filled):
    assert "the newest of 4 dumps that match: " in filled.run("info", "--no-core", "--node", "n1").stderr
    assert "the newest of 12 dumps that match: " in filled.run("info", "--no-core", "app").stderr
    assert filled.run("info", "--no-core", "101").stderr == ""
    assert filled.run("info", "--no-core", "app", "-q").stderr == ""


def test_executable_that_was_replaced_while_it_ran_keeps_its_name(cli, gz):
    cli.put("n1/core-app-1772000000-5-11.gz", gz(b"x"), {"exe": "/usr/bin/app (deleted)"})
    cli.put("n1/core-app-1772000001-6-11.gz", gz(b"x"), {"exe": "/usr/bin/app"})
    assert {row["exe"] for row in cli.json("/usr/bin/app")} == {"/usr/bin/app"}
    assert "(deleted)" not in cli.run("list").stdout + cli.run("info", "5").stdout
    assert [row["count"] for row in cli.json("--group")] == [2]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_fits_a_terminal_and_never_breaks_a_pod_or_node(width):
    fields = {
        "exe": "/opt/very/long/path/to/the/program/checkout",
        "uid": 1000,
        "state": "truncated",
        "pid": 123,
    }
    fields |= {
        "pod": "checkout-7d9f8b6c5-x2x4z",
        "node": "ip-10-0-12-34",
        "fingerprint": "a" * 16,
        "signal": 11,
    }
    dump = Dump("k", 10, 1772000000, True, {}, fields | {"frames": "app+0x1234 " * 10})
    for columns, row in (
        (tables.COLUMNS, tables.row(dump)),
        (tables.GROUP_COLUMNS, tables.group_row(tables.groups([dump])[0])),
    ):
        output = io.StringIO()
        console = Console(file=output, force_terminal=True, width=width, soft_wrap=True, no_color=True)
        tables.print_rows(console, columns, [row], legend=True)
        header, line = output.getvalue().splitlines()
        assert max(len(header), len(line)) <= width, line
        assert "checkout" in line
        if columns is tables.COLUMNS:
            assert {"checkout-7d9f8b6c5-x2x4z", "ip-10-0-12-34", "truncated"} <= set(line.split())


def test_table_is_whole_where_no_terminal_limits_it(cli, gz):
    exe = "/opt/very/long/path/to/the/program/checkout"
    cli.put("n/core-app-1772000000-5-11.gz", gz(b"x"), {"exe": exe})
    cli.environ["COLUMNS"] = "40"
    assert exe in cli.run("list").stdout


def test_output_never_fails_on_a_character(cli, gz):
    cli.put(
        "n1/core-app-1772000000-5-11.gz",
        gz(b"x"),
        {"comm": "b\u00f6rse\u65e5", "exe": "/bin/b\u00f6rse\u65e5"},
    )
    cli.environ["PYTHONIOENCODING"] = "ascii"
    for command in (["list"], ["info"], ["stats"]):
        done = cli.run(*command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert "b\\xf6rse\\u65e5" in done.stdout, command


def test_unreadable_metadata_affects_its_own_row_alone(filled):
    refused = {
        "-101-7.gz.json": error(403, "InvalidObjectState", "The object is archived."),
        "-103-7.gz.json": error(400, "InvalidRequest", "The object has a key of its own."),
    }

    def before(request):
        return next((reply for end, reply in refused.items() if request.path.endswith(end)), None)

    def after(request, reply):
        return cut(reply, 20) if request.path.endswith("-102-7.gz.json") else reply

    with front(filled.server.endpoint, before, after) as endpoint:
        filled.environ |= {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_MAX_ATTEMPTS": "1"}
        done = filled.run("list", "--json=short", "-v")
    states = {row["pid"]: row["corefile"] for row in json.loads(done.stdout)}
    assert len(states) == 12
    assert {pid for pid, state in states.items() if state == "unreadable"} == {101, 102, 103}
    assert {state for pid, state in states.items() if pid not in {101, 102, 103}} == {"present"}
    assert "3 metadata objects could not be read" in done.stderr
    assert "requests: 15 GetObject," in done.stderr, "the others are still read in the quick way"


def test_rm_reports_each_dump_and_leaves_no_half_of_a_pair(filled):
    def before(request):
        if request.method != "POST" or "delete" not in request.path:
            return None
        keys = re.findall(r"<Key>([^<]+)</Key>", request.body.decode())
        locked = [key for key in keys if "-102-" in key]
        with filled.server.client() as client:
            for key in set(keys) - set(locked):
                client.delete_object(Bucket="dumps", Key=key)
        told = "".join(
            f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>Object is WORM protected.</Message></Error>"
            for key in locked
        )
        return Reply(
            200, f"<DeleteResult>{told}</DeleteResult>".encode(), [("Content-Type", "application/xml")]
        )

    with front(filled.server.endpoint, before) as endpoint:
        filled.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        done = filled.run("rm", "--node", "n1", "--yes", code=1)
    assert "deleted 3 of 4" in done.stdout
    assert re.search(
        "core-app-.*-102-7.gz: the store says AccessDenied: Object is WORM protected", done.stderr
    )
    with filled.server.client() as client:
        left = keys_in(client, prefix=f"{filled.prefix}/n1/")
    assert sorted(key.rpartition("-")[2] for key in left) == ["7.gz", "7.gz.json"]


def test_list_of_modules_is_no_dump_and_goes_with_its_dump(cli, gz):
    for number in (1, 2):
        key = f"n1/core-app-177200000{number}-{number}-11.gz"
        cli.put(key, gz(b"x"), {"pid": number})
        cli.put_raw(f"{key}.modules.json", b"{}")
    cli.put_raw("n1/core-gone-1772000000-9-11.gz.modules.json", b"{}")
    assert [row["pid"] for row in cli.json()] == [2, 1]
    assert "deleted 1 of 1" in cli.run("rm", "1", "--yes").stdout
    with cli.server.client() as client:
        left = [key.rpartition("/")[2] for key in keys_in(client, prefix=f"{cli.prefix}/")]
    assert sorted(left) == [
        "core-app-1772000002-2-11.gz",
        "core-app-1772000002-2-11.gz.json",
        "core-app-1772000002-2-11.gz.modules.json",
        "core-gone-1772000000-9-11.gz.modules.json",
    ]


def test_rm_reports_each_dump_where_the_store_deletes_singly(filled):
    def before(request):
        if request.method == "POST":
            return error(501, "NotImplemented", "no")
        if request.method == "DELETE" and "-102-" in request.path:
            return error(403, "AccessDenied", "Locked until tomorrow.")
        return None

    with front(filled.server.endpoint, before) as endpoint:
        filled.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        done = filled.run("rm", "--node", "n1", "--yes", code=1)
    del filled.environ["AWS_ENDPOINT_URL_S3"]
    assert "deleted 3 of 4" in done.stdout
    assert "Locked until tomorrow" in done.stderr
    assert len(filled.json("--node", "n1")) == 1


def test_ctrl_c_ends_a_listing_at_once(cli):
    space = key_space(2000, 2, "{node}/{name}")
    space.held = "node-001/"
    with serving(space) as endpoint:
        environ = cli.variables() | {"BUCKET_NAME": "dumps", "AWS_ENDPOINT_URL_S3": endpoint}
        command = [sys.executable, "-m", "core_dumps.cli", "list"]
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: space.requests["ListObjectsV2"] > 1, 30, "a listing")
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)[1]
            assert time.monotonic() - began < 10, "the store does not answer"
        space.release.set()
    assert (process.returncode, said) == (130, "core-dumps: interrupted\n")


def test_without_the_extra_it_says_what_to_install(cli):
    code = "import sys; sys.modules['typer'] = None; from core_dumps.start import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli.variables(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr == "core-dumps: the package typer is not installed: pip install pyelftools rich typer\n"
    )


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
    assert "give MATCH" in filled.run("rm", code=2).stderr
    assert "--yes" in filled.run("rm", "--node", "n1", code=2, stdin=subprocess.DEVNULL).stderr
    assert "deleted" not in filled.run("rm", "--node", "n1", "--dry-run").stdout
    assert len(filled.json()) == 12
    done = filled.run("rm", "--node", "n1", "--yes", "-v")
    assert "deleted 4 of 4" in done.stdout
    assert "2 DeleteObjects" in done.stderr, "dumps, then metadata"
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
    assert "deleted 4 of 4" in done.stdout
    assert "8 DeleteObject," in done.stderr
    del filled.environ["AWS_ENDPOINT_URL_S3"]
    assert {row["node"] for row in filled.json()} == {"n0", "n2"}


def test_output_to_nowhere_ends_with_a_line_or_in_silence(filled):
    with open("/dev/full", "w") as full:
        done = filled.run("list", code=1, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.stderr.startswith("core-dumps: writing the output: No space left")
    reading, writing = os.pipe()
    os.close(reading)
    for command in ("list", "info"):
        done = filled.run(
            command, "-q", code=141, capture_output=False, stdout=writing, stderr=subprocess.PIPE
        )
        assert done.stderr == "", command
    os.close(writing)


def on_terminal(cli, *arguments, answer=b"", code=None):
    """Return what the command writes to a terminal, at which somebody types an answer; check its exit status."""
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
        assert process.wait() == code or code is None, text
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


def test_terminal_has_a_pager_that_may_be_left_early_and_a_pipe_has_none(filled):
    filled.environ["PAGER"] = "sed s/^/paged:/"
    text = on_terminal(filled, "list", "-n", "5")
    assert text.count("paged:") == 6, "a header and five rows"
    assert "\x1b[1m" in text, "the pager shows colours"
    assert "paged:" not in on_terminal(filled, "list", "--no-pager")
    assert "paged:" not in filled.run("list").stdout
    for words in (["info"], ["stats"]):
        assert "paged:" in on_terminal(filled, *words), words
    for none in ("cat", "no-such-pager"):
        filled.environ["PAGER"] = none
        assert "NODE" in on_terminal(filled, "list")
    filled.environ["PAGER"] = "true"
    assert "NODE" not in on_terminal(filled, "list", code=0), "leaving the pager early is no failure"


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
    assert "http://127.0.0.1:9/dumps: nothing answers" in cli.run("list", code=1).stderr


def test_manual_page_is_the_one_of_this_code(cli):
    page = Path(__file__).parents[2] / "docs" / "core-dumps.1"
    assert cli.run("man").stdout == page.read_text(), "core-dumps man > docs/core-dumps.1"


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"botocore", "boto3", "rich", "elftools", "drgn", "http.server"}),
        (["list", "--help"], {"botocore", "boto3", "rich", "elftools", "drgn", "http.server"}),
        (["list"], {"boto3", "elftools", "drgn", "http.server"}),
    ],
    ids=["help", "help of list", "list"],
)
def test_command_imports_only_its_own_modules(filled, words, absent):
    """botocore takes 0.3 s, and rich as long as typer."""
    code = "import sys; from core_dumps.start import main; sys.argv[0] = 'core-dumps'\ntry: main()\nfinally: "
    code += "print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=filled.variables(),
        cwd=filled.home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "core_dumps.options" in done.stderr.split()
    assert not absent & set(done.stderr.split())


def test_completion_knows_commands_and_options(cli):
    cli.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # whichever shell runs the tests
    assert "_CORE_DUMPS_COMPLETE=complete_bash" in cli.run("--show-completion", "bash").stdout
    for words, expected in (("core-dumps l", "list"), ("core-dumps list --nam", "--namespace")):
        cli.environ |= {
            "_CORE_DUMPS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        assert cli.run().stdout.split() == [expected]

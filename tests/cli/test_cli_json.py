"""`--json` of each command, and its table in docs/core-dumps.md."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from tests.support import modules as support
from tests.support.cores import Shape, build
from tests.support.pages import ROOT

from core_dump_format.attributes import METADATA_FIELDS
from core_dump_format.modules import Module, ModuleList, render_list

SHAPE = Shape()
CORE = build(SHAPE, SHAPE.status(7), [(0x400000, bytes(4096), True)])
NAMES = [f"n1/core-app-177200000{number}-{number}-11.gz" for number in (1, 2)]


@pytest.fixture
def two(cli, tmp_path):
    """Two dumps, the newest with a list of modules; a debugger that prints one frame."""
    for name in NAMES:
        cli.put(name, gzip.compress(CORE), {"exe": "/bin/app", "bytes": len(CORE), "fingerprint": "ab" * 8})
    row = Module(b"/bin/app", 1, 2, 0, "ab" * 20, 3, support.digest(b"abc"), "")
    cli.put_raw(f"{NAMES[1]}.modules.json", render_list(ModuleList("x.gz", (row,))))
    cli.put_raw(f"_modules/sha256/{support.digest(b'abc')}", gzip.compress(b"abc"))
    program = tmp_path / "gdb"
    program.write_text("#!/bin/sh\necho 'Thread 1 (LWP 7):'\necho '#0  main () at a.c:3'\n")
    program.chmod(0o755)
    return cli, program


def documented(command):
    """Return the keys that the table names for a command, with those of `list` where it refers to them."""
    page = (ROOT / "docs" / "core-dumps.md").read_text()
    row = re.search(rf"^\| `{re.escape(command)}`[^|]*\|(.*)\|$", page.partition("## JSON")[2], re.MULTILINE)[
        1
    ]
    keys = set(re.findall(r"`(\w+)`", re.sub(r"\(`.*?\)|: `machine.*", "", row)))
    return (keys - {"list"}) | (documented("list") if "`list`" in row else set())


def test_json_of_each_command_has_the_documented_keys(two, tmp_path):
    cli, program = two

    def keys(*words, code=0):
        found = json.loads(cli.run(*words, "--json=short", code=code).stdout)
        assert isinstance(found, list)
        assert found, words
        return set().union(*found)

    dump = {"time", "pid", "uid", "gid", "sig", "corefile", "exe", "size", "key"}
    assert documented("list") == dump | {"damage"}
    for words in (["list"], ["info", "--no-core"]):
        assert keys(*words) - METADATA_FIELDS <= documented("list") <= keys(*words) | {"damage"}
    assert keys("list", "--group") == documented("list --group")
    assert keys("info") - METADATA_FIELDS - dump == documented("info") - dump - {"damage"} == {"core"}
    assert keys("bt", "--debugger", program) - METADATA_FIELDS - dump == documented("bt") - dump - {"damage"}
    assert keys("get", "-o", tmp_path / "core") == documented("get")
    assert keys("modules") == documented("modules")
    assert keys("stats") == documented("stats")
    assert keys("share") == documented("share")
    cli.put_raw(f"_modules/sha256/{'ab' * 32}", b"junk")
    assert keys("modules", "--verify", "--yes", code=1) == documented("modules --verify")
    assert keys("rm", "1", "--dry-run") == documented("rm")


def test_every_command_but_the_interactive_ones_has_json(cli):
    commands = re.findall(r"^  ([a-z]+) ", cli.run("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert commands == ["list", "info", "bt", "debug", "get", "modules", "debuginfod", "stats", "share", "rm"]
    without = {name for name in commands if "--json" not in cli.run(name, "--help").stdout}
    assert without == {"debug", "debuginfod"}


def test_json_of_removals_says_what_became_of_each(two):
    cli, _ = two
    assert "--yes or --dry-run" in cli.run("rm", "1", "--json=short", code=2).stderr
    (row,) = json.loads(cli.run("rm", "1", "--dry-run", "--json=short").stdout)
    assert row == {"key": f"{cli.prefix}/{NAMES[0]}", "deleted": False, "problem": None}
    (row,) = json.loads(cli.run("rm", "1", "--yes", "--json=short").stdout)
    assert row["deleted"]
    assert [found["pid"] for found in cli.json()] == [2]
    assert "give --yes" in cli.run("modules", "--prune", "--json=short", code=2).stderr
    wrong = f"_modules/sha256/{'ab' * 32}"
    cli.put_raw(wrong, b"junk")
    done = cli.run("modules", "--verify", "--yes", "--json=short", code=1)
    (row,) = json.loads(done.stdout)
    assert (row["key"], row["removed"], row["problem"]) == (f"{cli.prefix}/{wrong}", True, None)
    assert "SHA-256" in row["reason"]
    assert json.loads(cli.run("modules", "--verify", "--yes", "--json=short").stdout) == []


def test_get_to_standard_output_leaves_no_place_for_json(two):
    cli, _ = two
    assert "--json and -o -" in cli.run("get", "-o", "-", "--json=short", code=2).stderr


def test_backtraces_of_several_dumps_have_headings_and_one_failure_ends_none(two, tmp_path):
    cli, program = two
    cli.put("n1/core-app-1772000003-3-11.gz", b"junk", {"exe": "/bin/app", "fingerprint": "ab" * 8})
    cli.put("n1/core-other-1772000004-4-11.gz", gzip.compress(CORE), {"exe": "/bin/other"})
    done = cli.run("bt", "--all", "fingerprint=abab", "--debugger", program, code=1)
    assert [line.split()[-1].rpartition("/")[2] for line in done.stdout.splitlines() if "SIGSEGV" in line] == [
        "core-app-1772000003-3-11.gz", "core-app-1772000002-2-11.gz", "core-app-1772000001-1-11.gz",
    ]  # fmt: skip
    assert done.stdout.count("#0  main () at a.c:3") == 2
    assert "core-dumps: no backtrace of 1 of 3 dumps\n" in done.stderr
    assert "gzip" in done.stderr
    done = cli.run("bt", "-n", "2", "--debugger", program, "/bin/app", code=1)
    assert done.stdout.count("#0  main") == 1
    rows = json.loads(cli.run("bt", "--all", "--debugger", program, "--json=short", code=1).stdout)
    assert [(row["pid"], len(row["backtrace"]), row["problem"] is None) for row in rows] == [
        (4, 1, True), (3, 0, False), (2, 1, True), (1, 1, True),
    ]  # fmt: skip
    assert rows[0]["backtrace"] == [{"thread": "Thread 1 (LWP 7)", "frames": ["#0  main () at a.c:3"]}]
    assert "no dump matches" in cli.run("bt", "--all", "nobody", "--debugger", program, code=1).stderr


def test_backtraces_of_several_dumps_take_the_space_of_one(two):
    cli, program = two
    kept = cli.home / ".cache/core-dumps"
    counts = cli.home / "counts"
    script = program.read_text().replace("\n", f"\nls {kept} | grep -c '[.]core' >>{counts}\n", 1)
    program.write_text(script)
    cli.run("bt", "1", "--debugger", program)
    (first,) = kept.glob("*.core")
    cli.run("bt", "--all", "--debugger", program)
    cli.run("bt", "-n", "2", "--debugger", program, "--json=short")
    assert list(kept.glob("*.core")) == [first], "it was there before"
    assert set(counts.read_text().split()) == {"1", "2"}


def test_each_note_is_told_once_for_all_dumps_and_not_at_all_if_the_user_is_quiet(two):
    cli, program = two
    done = cli.run("bt", "--all", "--debugger", program)
    assert done.stderr.count("to get them: ") == 1
    assert done.stderr.count("the kernel left the list of mapped files out") == 1
    assert cli.run("bt", "--all", "-q", "--debugger", program).stderr == ""
    assert cli.run("bt", "-q", "--debugger", program).stderr == ""


def test_more_frames_than_the_limit_are_shown_if_the_user_asks_for_them(two):
    """The user's own `bt 1000` in --debugger-arguments."""
    cli, program = two
    program.write_text(
        "#!/bin/sh\necho 'Thread 1 (LWP 7):'\necho 'warning: Section is too small.'\n"
        'for n in $(seq 0 299); do echo "#$n  main () at a.c:3"; done\n'
    )
    lines = cli.run("bt", "--debugger", program).stdout.splitlines()
    assert len(lines) == 301, "without the remark of the debugger"
    assert "more frames" not in lines[-1]

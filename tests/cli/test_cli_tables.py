"""Tables at the widths of real terminals, with hostile and wide names in every column."""

from __future__ import annotations

import gzip
import io
import re

import pytest
from rich.console import Console
from tests.cli.test_cli_commands import on_terminal
from tests.support import modules as support

from core_dump_format.modules import Module, ModuleList, render_list
from core_dumps import fit, tables
from core_dumps.dump import Dump

STEER = "\x1b]0;owned\x07\x1b[31m\u202e\r\n"
WIDE = "\u65e5\u672c\u8a9e/\u30d7\u30ed\u30b0\u30e9\u30e0"
FRAMES = "app+0x1234=parse_the_very_long_name app+0x1334=main"


def table(columns, rows, width):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, soft_wrap=True, no_color=True)
    tables.print_rows(console, columns, rows, legend=True)
    return output.getvalue().splitlines()


def group(**fields):
    known = {"exe": "/opt/very/long/path/to/checkout", "signal": 11, "node": "n1", "frames": FRAMES}
    dump = Dump("k", 10, 1772000000, True, {}, known | {"fingerprint": "a" * 16, "build_id": "b"} | fields)
    return tables.group_row(tables.groups([dump])[0])


@pytest.mark.parametrize("width", [80, 100, 160])
def test_groups_show_first_last_nodes_and_builds_at_every_width(width):
    header, line = table(tables.GROUP_COLUMNS, [group()], width)
    assert {"COUNT", "FIRST", "LAST", "NODES", "BUILDS", "SIG", "EXE", "WHERE"} <= set(header.split())
    assert ("FINGERPRINT" in header) == (width > 80)
    assert max(map(len, (header, line))) <= width
    assert "checkout" in line
    assert "parse_the" in line


@pytest.mark.parametrize("width", [40, 80, 100, 160])
@pytest.mark.parametrize("text", [WIDE * 4, "e\u0301" * 60, "x" * 300])
def test_wide_and_combining_characters_fit_too(width, text):
    rows = [group(exe=f"/{text}", frames=""), group()]
    lines = table(tables.GROUP_COLUMNS, rows, width)
    assert all(fit.width(line) <= max(width, 50) for line in lines), lines
    positions = {line.index("11-28") if "11-28" in line else None for line in lines[1:]}
    assert len(positions) == 1


def test_path_is_cut_at_a_slash():
    rows = [("stored", "1.0K", "ab", "/usr/lib/x86_64-linux-gnu/libgeneric.so.6")]
    _, line = table(("STATE", "SIZE", "BUILD ID", "PATH"), rows, 45)
    assert line.endswith("…/libgeneric.so.6")
    assert len(line) <= 45


def test_longest_names_of_pod_and_node_are_not_cut(cli):
    names = {"pod": "p" * 253, "node": "n" * 253}
    cli.put("n1/core-app-1772000000-5-11.gz", gzip.compress(b"x"), names)
    (_, line) = cli.run("list").stdout.splitlines()
    assert set(names.values()) <= set(line.split())


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_hostile_names_steer_no_table(cli, columns):
    texts = (
        "exe",
        "comm",
        "thread",
        "pod",
        "node",
        "namespace",
        "container",
        "hostname",
        "image",
        "frames",
        "state",
    )
    fields = dict.fromkeys(texts, STEER) | {
        "fingerprint": STEER,
        "build_id": STEER,
        "sensitive_reason": STEER,
    }
    name = "n1/core-app-1772000000-5-11.gz"
    cli.put(name, gzip.compress(b"x"), fields | {"sensitive": True})
    cli.put_raw("n1/core-%1b]0;x-1772000000-6-11.gz", b"x")
    row = Module(STEER.encode(), 1, 2, 0, "ab" * 20, 3, support.digest(b"abc"), "")
    cli.put_raw(f"{name}.modules.json", render_list(ModuleList("x.gz", (row,))))
    cli.environ |= {"COLUMNS": str(columns), "NO_COLOR": "1"}
    for words in (
        ["list"],
        ["list", "--group"],
        ["stats"],
        ["modules", "5"],
        ["info", "5"],
        ["list", "-F", "exe"],
    ):
        text = on_terminal(cli, *words, "--no-pager") if words[0] != "modules" else on_terminal(cli, *words)
        own = r"\rcore-dumps: \d+ names listed|\r +\r|\x1b\[[01]m"  # the progress of the listing, bold labels
        body = re.sub(own, "", text).replace("\r\n", "\n")
        assert not set("\x1b\x07\u202e\r") & set(body), (words, body)
        assert "31m" in body, words

"""A trimmed dump is never called whole: each command reports why it was trimmed, and how much was left out."""

import gzip
import json
import os
import struct
import zlib

import pytest
from tests.cli.test_cli_vital import STACK, gdb  # noqa: F401  a fixture
from tests.support.cores import Shape, build

from core_dump_format.reorder import order_note

NAME = "node-7/core-app-1700000001-1-11.gz"
SHAPE = Shape()
DROPPED = [(0x100000, 0x900000), (0xA00000, 0xA01000)]
SAID = (
    "this dump was trimmed on its node (rate_limit): 8.0M of memory was left out; backtraces do not need it"
)


@pytest.fixture
def trimmed(cli):
    """Put a trimmed dump; return its core."""
    note = order_note(4096, DROPPED)
    core = build(SHAPE, SHAPE.status(1) + note, [(0x7000, STACK, False), (0xB00000, os.urandom(8192), False)])
    vital = gzip.compress(core[:-8192], 1, mtime=0)
    told = {
        "state": "trimmed",
        "trimmed": "rate_limit",
        "truncated": "max_dump_bytes",
        "dropped_bytes": 0x801000,
    }
    told |= {"vital": "whole", "vital_bytes": len(vital), "vital_crc32": zlib.crc32(vital)}
    told |= {"pid": 1, "signal": 11, "bytes": len(core), "expected_bytes": len(core)}
    cli.put(NAME, vital + gzip.compress(core[-8192:], 1, mtime=0), told)
    return core


@pytest.mark.usefixtures("trimmed")
def test_list_shows_the_state_and_finds_by_it(cli):
    assert cli.run("list").stdout.rstrip().endswith(" trimmed")
    assert "core-app" in json.dumps(cli.json("state=trimmed"))
    assert cli.json("trimmed=rate_limit")
    assert cli.run("list", "state=truncated", code=1).stdout == ""


@pytest.mark.usefixtures("trimmed")
def test_info_says_why_and_lists_what_was_dropped(cli):
    text = cli.run("info").stdout
    assert "Trimmed: rate_limit: 8.0M of memory was left out; backtraces do not need it" in text
    assert "Dropped memory: 8.0M in 2 ranges" in text
    assert "0x0000000000100000-0x0000000000900000" in text
    (told,) = json.loads(cli.run("info", "--json=short").stdout)
    assert told["core"]["dropped"] == [list(span) for span in DROPPED]


@pytest.mark.parametrize("command", ["bt", "debug"])
@pytest.mark.usefixtures("trimmed")
def test_debuggers_are_told(cli, gdb, command):  # noqa: F811
    done = cli.run(command, "1", "--debugger", gdb, "--verbose")
    assert SAID in done.stderr
    assert "--full also downloads the other memory that was kept" in done.stderr, (
        "not the heap, which is gone"
    )


def test_get_fetches_all_of_it_and_says_that_it_is_trimmed(cli, trimmed, tmp_path):
    done = cli.run("get", "1", "-o", tmp_path / "core")
    assert SAID in done.stderr
    assert "verified: CRC-32, ELF length" in done.stdout
    assert (tmp_path / "core").read_bytes() == trimmed


def test_dump_that_was_trimmed_and_then_cut_is_truncated(cli):
    cli.put(NAME, gzip.compress(b"x"), {"trimmed": "rate_limit", "truncated": "disk_full", "pid": 1})
    assert cli.run("list").stdout.rstrip().endswith(" truncated")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<IIQ", 1, 2**32 - 1, 0),
        struct.pack("<IIQ", 2, 1, 0) + bytes(16),
        b"\1",
        struct.pack("<IIQQQ", 1, 1, 0, 2**64 - 1, 0),
    ],
)
def test_note_that_lies_ends_nothing(cli, content):
    core = build(SHAPE, SHAPE.status(1) + SHAPE.note(0x43444831, content), [(0x7000, STACK, False)])
    cli.put(NAME, gzip.compress(core), {"pid": 1})
    assert "1 thread:" in cli.run("info").stdout

"""Backtraces need the front of a dump alone: it is fetched by range, proven, and made a core of its own."""

import gzip
import io
import os
import zlib

import pytest
from tests.support.cores import Shape, build

from core_dump_format.core import read_core
from core_dump_format.stream import Forward

NAME = "node-7/core-app-1700000001-1-11.gz"
SHAPE = Shape()
STACK = b"stack".ljust(4096, b"!")


def reordered(cli, **lies):
    """Put a dump whose first gzip member holds headers, notes and stack, and whose second one holds a heap."""
    whole = build(SHAPE, SHAPE.status(1), [(0x7000, STACK, False), (0x100000, os.urandom(1 << 20), False)])
    vital = gzip.compress(whole[: -1 << 20], 1, mtime=0)
    told = {
        "vital": "whole",
        "vital_bytes": len(vital),
        "vital_crc32": zlib.crc32(vital),
        "bytes": len(whole),
    }
    cli.put(NAME, vital + gzip.compress(whole[-1 << 20 :], 1, mtime=0), told | lies)
    return whole, len(vital)


@pytest.fixture
def gdb(tmp_path):
    """A debugger that keeps the core it was given."""
    program = tmp_path / "gdb"
    program.write_text(
        '#!/bin/sh\nfor word; do case $word in --core=*) cp "${word#--core=}" "$0.core";; esac; done\n'
        "echo '#0  0x0000000000001000 in main ()'\n"
    )
    program.chmod(0o755)
    return program


def opened(gdb):
    content = gdb.with_suffix(".core").read_bytes()
    return content, read_core(Forward(io.BytesIO(content).read, 1 << 30))


@pytest.mark.parametrize("command", ["bt", "debug"])
def test_only_the_vital_part_is_fetched_and_the_heap_is_missing_not_zero(cli, gdb, command):
    whole, _ = reordered(cli)
    done = cli.run(command, "1", "--debugger", gdb, "--verbose")
    content, core = opened(gdb)
    assert content[len(content) - 4096 :] == STACK
    assert core.threads[0].tid == 1
    assert core.where(0x7000, 8)
    assert core.where(0x100000, 8) is None
    assert len(content) < len(whole) - 900_000
    assert "--full also fetches the heap" in done.stderr
    assert cli.run(command, "1", "--debugger", gdb).returncode == 0, "from the cache"


def test_full_fetches_the_whole_dump(cli, gdb):
    whole, _ = reordered(cli)
    cli.run("bt", "1", "--debugger", gdb, "--full")
    assert opened(gdb)[0] == whole
    done = cli.run("bt", "1", "--debugger", gdb)
    assert opened(gdb)[0] == whole, "a whole dump in the cache is better than a part"
    assert "--full" not in done.stderr


@pytest.mark.parametrize(
    ("lies", "said"),
    [({"vital_crc32": 1}, "CRC-32 of the vital part"), ({"vital_bytes": 100}, "CRC-32 of the vital part")],
)
def test_vital_part_that_is_not_what_was_uploaded_is_refused(cli, gdb, lies, said):
    reordered(cli, **lies)
    assert said in cli.run("bt", "1", "--debugger", gdb, code=1).stderr
    assert not gdb.with_suffix(".core").exists()


@pytest.mark.parametrize(
    "lies",
    [{"vital": "none"}, {"vital_bytes": 10**12}, {"vital_bytes": 0}, {"vital_crc32": None}],
    ids=["none", "too long", "empty", "unproven"],
)
def test_dump_without_a_vital_part_is_fetched_whole(cli, gdb, lies):
    whole, _ = reordered(cli, **lies)
    cli.run("bt", "1", "--debugger", gdb)
    assert opened(gdb)[0] == whole


def test_bomb_in_the_vital_part_is_refused(cli, gdb):
    bomb = gzip.compress(bytes(300 << 20), 1, mtime=0)
    cli.put(NAME, bomb, {"vital": "whole", "vital_bytes": len(bomb), "vital_crc32": zlib.crc32(bomb)})
    assert "the vital part decompresses to more" in cli.run("bt", "1", "--debugger", gdb, code=1).stderr

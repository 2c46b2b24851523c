"""Backtraces need the front of a dump alone: it is fetched by range, proven, and made a core of its own."""

import gzip
import io
import json
import os
import zlib

import pytest
from tests.support import s3
from tests.support.cores import PT_NOTE, Shape, build

from core_dump_format.core import read_core
from core_dump_format.stream import Forward

NAME = "node-7/core-app-1700000001-1-11.gz"
SHAPE = Shape()
STACK = b"stack".ljust(4096, b"!")


BUILD_ID = bytes(range(20))


def module():
    """The first page of a library with a build ID."""
    note = SHAPE.note(3, BUILD_ID, b"GNU\0")
    content = SHAPE.header(count=1, kind=3) + SHAPE.row(PT_NOTE, 4, 120, 120, len(note)) + note
    return content.ljust(4096, b"\0")


def reordered(cli, stack=STACK, **lies):
    """Put a dump whose first gzip member holds headers, notes, stack and a library, and whose second one a heap."""
    notes = SHAPE.status(1) + SHAPE.files((0x10000000, 0x10001000, 0, b"/lib/libx.so"))
    segments = [
        (0x7000, stack, False),
        (0x10000000, module(), True),
        (0x20000000, os.urandom(1 << 20), False),
    ]
    whole = build(SHAPE, notes, segments)
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
    assert content[-8192:] == STACK + module()
    assert core.threads[0].tid == 1
    assert core.where(0x7000, 8)
    assert core.where(0x20000000, 8) is None
    assert len(content) < len(whole) - 900_000
    assert "--full also downloads the heap" in done.stderr
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


def told(cli, key):
    """Return what `info` says about the core of a dump."""
    return json.loads(cli.run("info", f"key={key}", "--json=short").stdout)[0]["core"]


def test_info_reads_the_vital_part_and_says_what_it_says_of_the_whole_dump(cli):
    whole, _ = reordered(cli)
    plain = cli.put("node-7/core-app-1700000002-2-11.gz", gzip.compress(whole, 1, mtime=0), {"vital": "none"})
    core = told(cli, f"{cli.prefix}/{NAME}")
    assert core == told(cli, plain)
    assert core["files"] == [{"path": "/lib/libx.so", "build_id": BUILD_ID.hex()}]
    assert core["expected_bytes"] == len(whole)


def test_info_reaches_the_modules_behind_large_stacks_and_leaves_the_heap(cli):
    _, vital_bytes = reordered(cli, os.urandom(9 << 20))
    assert vital_bytes > 9 << 20
    with cli.server.client() as client:  # a heap that is damaged is not read
        key = f"{cli.prefix}/{NAME}"
        body = client.get_object(Bucket=s3.BUCKET, Key=key)["Body"].read()
        client.put_object(Bucket=s3.BUCKET, Key=key, Body=body[:vital_bytes].ljust(len(body), b"!"))
    assert told(cli, key)["files"] == [{"path": "/lib/libx.so", "build_id": BUILD_ID.hex()}]


def test_info_finds_a_module_that_was_not_in_memory_behind_the_vital_part(cli):
    notes = SHAPE.status(1) + SHAPE.files((0x10000000, 0x10001000, 0, b"/lib/libx.so"))
    whole = build(SHAPE, notes, [(0x7000, STACK, False), (0x10000000, module(), True)])
    vital = gzip.compress(whole[:-4096], 1, mtime=0)
    facts = {"vital": "whole", "vital_bytes": len(vital), "vital_crc32": zlib.crc32(vital)}
    key = cli.put(NAME, vital + gzip.compress(whole[-4096:], 1, mtime=0), facts)
    assert told(cli, key)["files"] == [{"path": "/lib/libx.so", "build_id": BUILD_ID.hex()}]


@pytest.mark.parametrize("lies", [{"vital_crc32": 1}, {"vital_bytes": 100}])
def test_info_shows_nothing_of_a_vital_part_that_is_not_what_was_uploaded(cli, lies):
    reordered(cli, **lies)
    shown = cli.run("info", "1").stdout
    assert "Core: the CRC-32 of the vital part is not the one that was uploaded" in shown
    assert "libx" not in shown

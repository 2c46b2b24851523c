"""An object is data: names, metadata and content that lie are shown escaped or refused, and nothing else happens."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys

import pytest
from tests.support import cores
from tests.support.collector import wait_until
from tests.support.slow import slow_proxy

from core_dumps.workfile import Work

CONTROL = "\x1b]0;owned\x07\x1b[31m\u202e"


def elf(size, *, promised=None):
    """Return a core of one segment that is `size` bytes long, or says so of another length."""
    return cores.simple(os.urandom(1000).ljust(size - 120, b"\0"), promised=promised)


def name(number, comm="app"):
    return f"node-7/core-{comm}-17{number:08d}-{number}-11.gz"


def test_lying_metadata_is_escaped_or_left_out(cli, gz):
    core = elf(8192)
    whole = cli.put(
        name(1),
        gz(core),
        {"exe": CONTROL, "pod": "\n../../x", "uid": "0; rm -rf", "pid": 10**40, "bytes": True},
    )
    cli.put(name(2), gz(core), {"key": "another/key"})
    cli.put(name(3), gz(core), {"cmdline": "x" * 70_000})
    cli.put(name(4), gz(core), metadata=False)
    cli.put_raw(name(4) + ".json", b"[" * 60_000)
    cli.put(name(5), gz(core), metadata=False)
    cli.put_raw(
        "node-7/storm-ab12-1700000009.json",
        json.dumps({"state": "suppressed", "reason": "rate_limit"}).encode(),
    )
    for probe in (".condition", ".check-0e8a52c6-6f5c-4d19-9a56-6e1f3c1f7f0e"):
        cli.put_raw(f"node-7/{probe}", b"{}")  # they are no dumps
    listed = cli.run("list")
    assert not set("\x1b\x07\u202e") & set(listed.stdout)
    assert "\\x1b]0;owned" in listed.stdout
    assert len(listed.stdout.splitlines()) == 7
    rows = {row["time"] // 1_000_000 - 1_700_000_000: row for row in cli.json()}
    assert {n: row["corefile"] for n, row in rows.items()} == {
        1: "present",
        2: "damaged",
        3: "damaged",
        4: "damaged",
        5: "incomplete",
        9: "suppressed",
    }
    assert (rows[1]["uid"], rows[1]["pid"]) == (None, 1)
    shown = cli.run("info", f"key={whole}").stdout
    assert "\x1b" not in shown
    assert "\\x1b]0;owned" in shown


@pytest.mark.parametrize("metadata", [True, False])
def test_bomb_is_not_unpacked_beyond_what_its_headers_promise(cli, gz, tmp_path, metadata):
    bomb = gz(elf(64 * 1024 * 1024, promised=100_000))
    cli.put(name(1), bomb, {"bytes": 64 * 1024 * 1024}, metadata=metadata)
    assert "100000 bytes that it promises" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert not [entry for entry in os.listdir(tmp_path) if entry.endswith("core") or entry == "out"]
    done = cli.run("get", "1", "-o", "-", code=1)
    assert "100000 bytes that it promises" in done.stderr
    assert len(done.stdout) <= 100_000


def test_wrong_bytes_are_not_kept(cli, gz, tmp_path):
    cli.put(name(1), gz(elf(8192)), {"crc32": "AAAAAA=="})
    cli.put(name(2), gz(elf(8192)), {"bytes": 8191})
    cli.put(name(3), gz(elf(8192))[:-6])
    cli.put(name(4), gz(b"no core" * 100))
    cli.put(name(5), gz(elf(8192)), {"bytes": 8193})
    assert "CRC-32 is" in cli.run("get", "1", "-o", "a", code=1).stderr
    assert "8191" in cli.run("get", "2", "-o", "b", code=1).stderr
    assert "ends early" in cli.run("get", "3", "-o", "c", code=1).stderr
    assert "--keep-compressed" in cli.run("get", "4", "-o", "d", code=1).stderr
    assert "8193 were dumped" in cli.run("get", "5", "-o", "e", code=1).stderr
    assert not {"a", "b", "c", "d", "e"} & set(os.listdir(tmp_path))
    assert "do not use" in cli.run("get", "1", "-o", "-", code=1).stderr
    assert "8191" in cli.run("get", "2", "-o", "-", code=1).stderr
    assert "ends early" in cli.run("get", "3", "-o", "-", code=1).stderr


def test_lying_headers_are_refused_with_a_line(cli, gz):
    core = bytearray(elf(8192))
    struct.pack_into("<H", core, 56, 0xFFFF)
    cli.put(name(1), gz(bytes(core)))
    cli.put(name(2), gz(elf(8192, promised=2**62)))
    cli.put(name(3), b"\x1f\x8bgarbage")
    assert "the number of its segments is not known" in cli.run("info", "1").stdout
    assert "0 threads" in cli.run("info", "2").stdout
    assert "ends within its headers" in cli.run("info", "3").stdout
    assert "truncated: it has 8192 of the" in cli.run("get", "2", "-o", "kept").stderr


def test_no_link_is_followed_and_no_file_replaced(cli, gz, tmp_path):
    cli.put(name(1), gz(elf(8192)), {"bytes": 8192})
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    assert "--force" in cli.run("get", "1", "-o", "link", code=1).stderr
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "--force" in cli.run("get", "1", "-o", "dangling", code=1).stderr
    cli.run("get", "1", "-o", "link", "--force")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()
    assert not (tmp_path / "nothing").exists()


def test_file_that_appeared_during_a_download_is_not_replaced(cli, gz, tmp_path, monkeypatch):
    def appear(work, open_core=Work.open_core):
        (tmp_path / "out").write_bytes(b"of somebody else")
        return open_core(work)

    monkeypatch.setattr(Work, "open_core", appear)
    cli.put(name(1), gz(elf(8192)), {"bytes": 8192})
    assert "out" in cli.run("get", "1", "-o", tmp_path / "out", code=1).stderr
    assert (tmp_path / "out").read_bytes() == b"of somebody else"


def test_key_cannot_choose_a_place(cli, gz, tmp_path):
    cli.put("node-7/..hidden -x\x07.gz", gz(elf(8192)), {"bytes": 8192})
    cli.run("get", "-v")
    (made,) = [entry for entry in os.listdir(tmp_path) if not entry.startswith(".")]
    assert made == "hidden_-x_"


def test_download_goes_on_where_it_was_killed(cli, tmp_path):
    core = elf(4096) + os.urandom(24 * 1024 * 1024)
    body = gzip.compress(core, 0)
    cli.put(name(1), body, {"bytes": len(core)})
    parts = -(-len(body) // (8 * 1024 * 1024))
    command = [sys.executable, "-m", "core_dumps.cli", "get", "1", "--keep-compressed", "-o", "out"]
    with slow_proxy(cli.server.endpoint, 2e6) as endpoint:
        slow = cli.variables() | {"AWS_ENDPOINT_URL_S3": endpoint}
        with subprocess.Popen(command, env=slow, cwd=tmp_path) as process:
            wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob(".out.*.parts")), 60, "a part")
            process.kill()
    assert not (tmp_path / "out").exists()
    again = cli.run("get", "1", "--keep-compressed", "-v", "-o", "out").stderr
    fetched = int(again.split(" GetObject")[0].rpartition(" ")[2]) - 1
    assert 0 < fetched < parts, "the metadata and the parts that were missing"
    assert (tmp_path / "out").read_bytes() == body
    assert os.listdir(tmp_path) == ["out"]

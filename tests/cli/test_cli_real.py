"""`core-dumps` on what the collector itself uploaded of processes that really crashed."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.kernel.test_vital import backtraces
from tests.support import kernel, s3
from tests.support.cleanup import temporary_directory
from tests.support.collector import running, wait_until
from tests.support.corepair import assert_by_address, assert_only_order_differs

from core_dump_collector.fingerprint import fingerprint
from core_dumps.buildid import read_build_id

pytestmark = [
    pytest.mark.skipif(not kernel.can_crash(), reason="crashes real processes, needs root: sudo make test"),
]

PYTHON_CRASH = "import ctypes; ctypes.string_at(0)"


def crash(command):
    """Run a program that crashes; return its pid."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        return process.pid


def dumps_of(pids, watch_dir):
    """Return the whole dumps of these processes: others on this machine may crash at the same time."""
    return [path for pid in pids for path in watch_dir.glob(f"core-*-{pid}-*.gz")]


@pytest.fixture(scope="module")
def fleet(seaweed, tmp_path_factory):
    """Crash programs in C (twice), C++ and Python, and let the collector bring their dumps to the bucket."""
    home = tmp_path_factory.mktemp("fleet")
    prefix = f"fleet-{uuid.uuid4().hex[:8]}"
    with temporary_directory("cdh-", "/var/tmp") as directory:
        watch_dir = Path(directory, "w")
        watch_dir.mkdir(mode=0o700)
        program, throw = Path(directory, "crash"), Path(directory, "throw")
        kernel.build(kernel.CRASHER, program, "-pthread")
        subprocess.run(["g++", "-g", "-o", throw, kernel.CRASHER.with_name("throw.cpp")], check=True)
        settings = {"WATCH_DIR": watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 1}
        with kernel.core_pattern(kernel.install_helper(Path(directory), settings)):
            command = [program, "11", b"crash".hex(), "20", "zero", "2"]
            pids = [
                crash(command),
                crash(command),
                crash([throw]),
                crash([sys.executable, "-c", PYTHON_CRASH]),
            ]
            wait_until(lambda: len(dumps_of(pids, watch_dir)) == 4, 60, "four dumps")
        kept = home / "kept"
        kept.mkdir()
        for path in set(watch_dir.glob("core*")) - set(dumps_of(pids, watch_dir)):
            path.unlink()  # a stranger's
        for path in watch_dir.glob("*.gz"):
            (kept / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
        environ = seaweed.environ() | {"BUCKET_NAME": f"s3://{s3.BUCKET}/{prefix}"}
        with running(watch_dir, environ, home) as collector:
            wait_until(
                lambda: collector.metric('core_dump_uploads_total{result="uploaded"}') >= 4, 60, "uploads"
            )
        yield Cli(seaweed, prefix, home), program, kept
        with seaweed.client() as client, contextlib.suppress(Exception):
            for key in s3.keys_in(client, prefix=prefix):
                client.delete_object(Bucket=s3.BUCKET, Key=key)


def test_list_shows_every_crash_newest_first(fleet):
    cli, program, _ = fleet
    rows = cli.json()
    assert [row["exe"] for row in rows].count(str(program)) == 2
    assert {row["comm"] for row in rows} >= {"crash", "throw"}
    assert {row["sig"] for row in rows} == {6, 11}
    assert all(
        row["corefile"] == "present" and row["node"] == "node-1" and row["size"] > 1000 for row in rows
    )
    times = [row["time"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert [row["time"] for row in cli.json("--oldest-first")] == sorted(times)


def test_matches_are_those_of_coredumpctl(fleet):
    cli, program, _ = fleet
    pid = cli.json("throw")[0]["pid"]
    assert [row["comm"] for row in cli.json(pid)] == ["throw"]
    assert len(cli.json(program)) == 2
    assert len(cli.json("signal=SEGV")) == 3
    assert len(cli.json("COREDUMP_SIGNAL=6", "comm=throw")) == 1
    assert len(cli.json("crash", "throw")) == 3, "values of one field are alternatives"
    assert "no dump matches" in cli.run("list", "nobody", code=1).stderr


def test_info_tells_what_the_core_holds_without_downloading_it(fleet):
    cli, program, _ = fleet
    text = cli.run("info", "crash").stdout
    assert "SIGSEGV at 0x8, address not mapped" in text
    assert "3 threads, the crashed one first:" in text
    assert re.search(rf"pc 0x[0-9a-f]+ .*{program}\+0x", text)
    build_id = re.search(
        r"Build ID: ([0-9a-f]+)",
        subprocess.run(["readelf", "-n", program], capture_output=True, text=True, check=True).stdout,
    )[1]
    assert f"{build_id}  {program}" in text


def test_get_gives_back_the_core_by_address_and_sparsely(fleet, tmp_path):
    cli, program, kept = fleet
    pid = cli.json("-1", "crash")[0]["pid"]
    done = cli.run("get", pid, "-o", tmp_path / "core")
    assert "verified: CRC-32, ELF length" in done.stdout
    (original,) = kept.glob(f"core-*-{pid}-11")
    assert_only_order_differs(original, tmp_path / "core")
    assert_by_address(tmp_path / "core")
    assert backtraces(program, tmp_path / "core") == backtraces(program, original)
    found = (tmp_path / "core").stat()
    assert found.st_blocks * 512 < found.st_size - 15_000_000, "20 MB of zeros are holes"
    assert found.st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["core"]
    assert "--force" in cli.run("get", pid, "-o", tmp_path / "core", code=1).stderr
    piped = cli.run("get", pid, "-o", "-", capture_output=True, text=False)
    assert piped.stdout == original.read_bytes()


def test_kept_compressed_object_is_the_one_in_the_bucket(fleet, tmp_path):
    cli, _, kept = fleet
    row = cli.json("-1", "throw")[0]
    cli.run("get", "throw", "--keep-compressed", cwd=tmp_path)
    (name,) = os.listdir(tmp_path)
    assert row["key"].endswith(name)
    assert gzip.decompress((tmp_path / name).read_bytes()) == (kept / name.removesuffix(".gz")).read_bytes()
    assert json.loads(cli.run("list", "--json=pretty", f"key={row['key']}").stdout)[0]["pid"] == row["pid"]


def gdb_trace(program, core):
    """Return gdb's own backtrace from the first thread on."""
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all -ascending bt", program, core]
    found = frames(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found[found.index(next(line for line in found if line.startswith("Thread "))) :]


def frames(text):
    return [line.strip() for line in text.splitlines() if re.match(r"(Thread |#\d)", line)]


def test_backtrace_is_that_of_gdb_on_the_original_core(fleet):
    cli, program, kept = fleet
    row = cli.json("-1", "crash")[0]
    (original,) = kept.glob(f"core-*-{row['pid']}-11")
    found = frames(cli.run("bt", row["pid"]).stdout)
    assert found == gdb_trace(program, original)
    assert any("die_here" in line and "crash.c" in line for line in found)
    assert sum("wait_for_ever" in line for line in found) >= 2


def test_debugger_gets_the_executable_and_arguments(fleet):
    cli, program, _ = fleet
    done = cli.run("debug", "throw", "-A", "-batch -ex bt -ex 'info files'", stdin=subprocess.DEVNULL)
    assert "Order::ship" in done.stdout
    assert str(program.with_name("throw")) in done.stdout


def test_missing_executable_is_named_with_its_build_id(fleet, tmp_path):
    cli, program, _ = fleet
    hidden = program.rename(program.with_name("hidden"))
    try:
        told = cli.run("bt", "crash", code=1).stderr
        assert re.search(f"missing: {program} .build ID [0-9a-f]{{40}}.", told)
        assert "--sysroot" in told
        root = tmp_path / "image"
        (root / "opt").mkdir(parents=True)
        place = root / str(program).lstrip("/")
        place.parent.mkdir(parents=True)
        (root / "opt" / "real").write_bytes(hidden.read_bytes())
        place.symlink_to("/opt/real")
        found = cli.run("bt", "crash", "--sysroot", root)
        assert f"missing: {program} " not in found.stderr
        assert "die_here" in found.stdout
    finally:
        hidden.rename(program)


@contextlib.contextmanager
def debuginfod(build_id, body):
    """Serve one executable as debuginfod(8) does, and yield its URL and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            known = self.path == f"/buildid/{build_id}/executable"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            self.wfile.write(body if known else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_debuginfod_is_asked_by_build_id_and_a_lie_is_not_used(fleet):
    cli, program, _ = fleet
    build_id = read_build_id(str(program))
    hidden = program.rename(program.with_name("hidden"))
    lie, truth = program.with_name("throw").read_bytes(), hidden.read_bytes()
    try:
        with debuginfod(build_id, lie) as (liar, lied), debuginfod(build_id, truth) as (server, told):
            cli.environ["DEBUGINFOD_URLS"] = liar
            done = cli.run("bt", "crash", code=1)
            assert f"{liar} sent a file with another build ID" in done.stderr
            assert "die_here" not in done.stdout
            cli.environ["DEBUGINFOD_URLS"] = f"{liar} {server}"
            done = cli.run("bt", "crash")
            assert "die_here" in done.stdout
            assert f"missing: {program} " not in done.stderr
            assert {lied[0], told[0]} == {f"/buildid/{build_id}/executable"}
    finally:
        del cli.environ["DEBUGINFOD_URLS"]
        hidden.rename(program)


@pytest.mark.skipif(shutil.which("lldb") is None, reason="needs lldb: apt-get install lldb")
def test_lldb_opens_the_same_core(fleet):
    cli, program, _ = fleet
    script = "--batch -o 'thread backtrace all' -o 'target modules list'"
    text = cli.run("debug", "crash", "--debugger", "lldb", "-A", script, stdin=subprocess.DEVNULL).stdout
    assert "die_here" in text
    assert "crash.c" in text
    assert str(program) in text
    assert "die_here" in cli.run("bt", "crash", "--debugger", "lldb").stdout


def test_stats_count_each_crash(fleet):
    cli, program, _ = fleet
    text = cli.run("stats").stdout
    assert re.search(rf"^ *2 SIGSEGV {program}$", text, re.MULTILINE)
    assert re.search(r"█+ 4$", text, re.MULTILINE) or text.count("█") >= 2


def test_shared_url_gives_the_object_and_warns(fleet):
    cli, _, _ = fleet
    row = cli.json("-1", "throw")[0]
    done = cli.run("share", "throw", "--expires", "5min")
    with urllib.request.urlopen(done.stdout.strip(), timeout=10) as answer:
        assert len(answer.read()) == row["size"]
    assert "everyone who has this URL" in done.stderr
    assert "--expires" in cli.run("share", "throw", "--expires", "8d", code=2).stderr


def test_fingerprint_is_equal_for_the_same_crash_alone(fleet):
    _, _, kept = fleet
    found = {}
    for path in kept.iterdir():
        with path.open("rb") as file:
            found.setdefault(path.name.split("-")[1], []).append(fingerprint(file.read))
    assert len(found["crash"]) == 2
    assert found["crash"][0] == found["crash"][1]
    assert re.match(r"crash\+0x", found["crash"][0].frames)
    assert len({each[0].id for each in found.values()}) == 3

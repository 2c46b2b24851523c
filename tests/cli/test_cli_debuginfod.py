"""`core-dumps debuginfod`: the files of a dump for any debugger, only on loopback, verified, in bounded numbers."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tests.cli.test_cli_modules import NAME, Crashed, frames, needs_gdb
from tests.support import modules as support
from tests.support.collector import wait_until

from core_dumps import serving

pytestmark = needs_gdb


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    return Crashed(tmp_path_factory.mktemp("served"))


class Server:
    """A running `core-dumps debuginfod`."""

    def __init__(self, process, address):
        self.process, self.address = process, address

    def ask(self, path, method="GET"):
        """Return status and body."""
        request = urllib.request.Request(f"{self.address}/{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    def end(self):
        """Press Ctrl-C; return the exit status and the notes."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30), self.process.stderr.read()


@contextlib.contextmanager
def served(cli, *words):
    command = [sys.executable, "-m", "core_dumps.cli", "debuginfod", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=cli.variables(), cwd=cli.home, **pipes) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"export DEBUGINFOD_URLS=(http://127\.0\.0\.1:\d+/[0-9a-f]{32})\n", line)
            assert found, (line, process.stderr.read())
            yield Server(process, found[1])
        finally:
            process.kill()


def of(crashed, end):
    """Return build ID and content of a module by the end of its path."""
    (row,) = [row for row in crashed.modules if row.path.endswith(end)]
    return row.build_id, crashed.contents[row.sha256]


def test_debuggers_of_this_machine_open_a_core_with_the_files_in_the_bucket(crashed, cli, tmp_path):
    crashed.put(cli)
    assert not crashed.program.exists()
    with served(cli, "app") as server:
        environ = os.environ | {
            "DEBUGINFOD_URLS": server.address,
            "DEBUGINFOD_CACHE_PATH": str(tmp_path / "cache"),
            "HOME": str(tmp_path),
        }
        command = [
            "gdb",
            "-nx",
            "-q",
            "-batch",
            "-iex",
            "set debuginfod enabled on",
            "-ex",
            "bt",
            "-c",
            crashed.core,
        ]
        text = subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout
        assert any(re.search(r"main \(\) at .*main\.c:2", line) for line in frames(text)), text
        if shutil.which("eu-stack"):
            text = subprocess.run(
                ["eu-stack", "--core", crashed.core], env=environ, capture_output=True, text=True, check=False
            ).stdout
            assert re.search(r"#0 .* die\n#1 .* main\n", text)
        code, told = server.end()
    assert code == 0, "Ctrl-C is its normal end"
    assert f"sent {crashed.program} (" in told
    assert "serving 4 files of 1 dump until" in told


def test_nothing_else_is_served(crashed, cli):
    crashed.put(cli)
    build_id, content = of(crashed, b"/app")
    plain = [row for row in crashed.modules if b".debug_info" not in crashed.contents[row.sha256]]
    with served(cli) as server:
        assert server.ask(f"buildid/{build_id}/executable")[:2] == (200, content)
        assert server.ask(f"buildid/{build_id}/debuginfo")[:2] == (200, content), "it has its own"
        status, body, headers = server.ask(f"buildid/{build_id}/executable", "HEAD")
        assert (status, body, int(headers["Content-Length"])) == (200, b"", len(content))
        for row in plain:
            assert server.ask(f"buildid/{row.build_id}/debuginfo")[0] == 404
        paths = [
            f"buildid/{'ab' * 20}/executable",
            f"buildid/{build_id}/source/etc/passwd",
            "",
            "../../etc/passwd",
        ]
        paths += [f"buildid/{build_id}/executable/", f"x/buildid/{build_id}/executable"]
        for path in paths:
            assert server.ask(path)[:2] == (404, b""), path
        base = server.address.rpartition("/")[0]
        for token in ("", "0" * 32):
            stranger = Server(None, f"{base}/{token}")
            assert stranger.ask(f"buildid/{build_id}/executable")[0] == 404, (
                "the token is part of the address"
            )
        with (
            pytest.raises(urllib.error.HTTPError, match="501"),
            urllib.request.urlopen(server.address, data=b"x"),
        ):
            pass


def test_content_that_is_not_what_it_claims_to_be_is_not_served(crashed, cli):
    """Neither content with another SHA-256, nor a file with another build ID that the list names."""
    (first, second, *_) = [row for row in crashed.modules if row.build_id]
    rows = [first._replace(build_id="ab" * 20), second]
    crashed.put(cli, rows=rows)
    cli.put_raw(f"_modules/sha256/{second.sha256}", gzip.compress(b"\x7fELF junk"))
    with served(cli) as server:
        assert server.ask(f"buildid/{'ab' * 20}/executable")[0] == 404
        assert server.ask(f"buildid/{second.build_id}/executable")[0] == 404
        _, told = server.end()
    assert told.count("is not in the bucket") + told.count("has another build ID") == 2
    assert "another SHA-256" in told


def test_dumps_without_files_are_named(crashed, cli):
    cli.put(NAME, b"x")
    done = cli.run("debuginfod", code=1)
    assert f"{NAME} has no list of modules" in done.stderr
    assert "core-dumps modules" in done.stderr
    cli.put_raw(f"{NAME}.modules.json", b"junk")
    assert "is not a list of modules" in cli.run("debuginfod", code=1).stderr


def test_clients_that_say_nothing_take_no_more_than_their_share(monkeypatch):
    monkeypatch.setattr(serving, "MOST_CLIENTS", 4)
    monkeypatch.setattr(serving._Handler, "timeout", 0.5)
    monkeypatch.setattr(serving._Server, "request_queue_size", 32)  # nobody waits to connect
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving.served(lambda *_: __file__))
        port = int(re.search(r":(\d+)/", address)[1])
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(lambda: threading.active_count() >= before + 5, 10, "the clients' threads")
        assert threading.active_count() == before + 1 + 4
        url = f"{address}/buildid/{'ab' * 20}/executable"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.read() == Path(__file__).read_bytes(), "the silent ones were dropped"


def test_server_ends_at_once_though_all_places_are_taken(monkeypatch):
    monkeypatch.setattr(serving, "MOST_CLIENTS", 1)
    with contextlib.ExitStack() as stack:
        with serving.served(lambda *_: None) as address:
            port = int(re.search(r":(\d+)/", address)[1])
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            began = time.monotonic()
        assert time.monotonic() - began < serving.IDLE_SECONDS / 2


def test_one_module_that_many_ask_for_is_fetched_once(crashed, cli):
    crashed.put(cli)
    build_id, content = of(crashed, b"/app")
    with served(cli, "-v") as server:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.ask(f"buildid/{build_id}/executable")[1]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == [content] * 8
        _, told = server.end()
    assert re.search(r"requests: .*\b1 HeadObject", told), told
    assert support.digest(content) in {
        path.stem for path in (cli.home / ".cache" / "core-dumps").glob("*.module")
    }

"""`core-dump-collector check` as its users run it."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from tests.support import kernel, s3
from tests.support.collector import run_check, running

from core_dump_collector import crashtest

KEYS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def answering(status, body):
    """A store that gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def check(directory, environ, *flags):
    ended = run_check(directory, environ, *flags)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout.splitlines()


def line_about(lines, word):
    return next(line for line in lines if word in line)


@pytest.mark.parametrize("keys", [s3.ADMIN, s3.WRITER], ids=["admin", "write-only"])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "tls"])
def test_good_bucket_passes_with_the_least_rights(seaweed, bucket, watch_dir, keys, tls):
    _, lines = check(watch_dir, seaweed.environ(keys, tls=tls))
    assert line_about(lines, "bucket").startswith("ok")
    assert line_about(lines, "directory").startswith("ok")


def test_foreign_core_pattern_fails_the_check_and_names_the_remedy(seaweed, bucket, watch_dir):
    if not kernel.can_crash():
        pytest.skip("run as root to set kernel.core_pattern")
    with kernel.core_pattern("|/bin/false"):
        code, lines = check(watch_dir, seaweed.environ())
    line = line_about(lines, "kernel.core_pattern")
    assert code == 1
    assert line.startswith("FAIL")
    assert "sysctl/install.sh" in line


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, [], "credentials"),
        ({}, ["--bucket-name", "no-such-bucket-here"], "bucket"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, [], "check the network, aws_endpoint_url_s3"),
    ],
    ids=["wrong secret", "no such bucket", "nobody listens"],
)
def test_bad_store_fails_with_a_line_that_says_why(seaweed, bucket, watch_dir, environ, flags, said):
    code, lines = check(watch_dir, seaweed.environ() | environ, *flags)
    line = line_about(lines, "bucket s3://")
    assert code == 1
    assert line.startswith("FAIL")
    assert said in line.lower()


def test_missing_directory_is_told_with_the_command_that_creates_it(seaweed, bucket, tmp_path):
    code, lines = check(tmp_path / "missing", seaweed.environ())
    assert code == 1
    assert f"install -d -m 0700 {tmp_path / 'missing'}" in line_about(lines, "directory")


def test_directory_open_to_others_is_warned_about(seaweed, bucket, watch_dir):
    watch_dir.chmod(0o1777)
    _, lines = check(watch_dir, seaweed.environ())
    assert line_about(lines, "directory").startswith("warn")


def test_clock_that_differs_is_told_as_such(watch_dir, tmp_path):
    body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>"
    with answering(403, body) as endpoint:
        code, lines = check(watch_dir, {**KEYS, "AWS_ENDPOINT_URL_S3": endpoint})
    assert code == 1
    assert "clock differs" in line_about(lines, "bucket s3://")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_without_scheme_is_one_clear_line(watch_dir, name):
    done = run_check(watch_dir, {**KEYS, name: "localhost:9000"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"core-dump-collector: {name}='localhost:9000': takes a URL with its scheme, e.g. https://s3.example.com"
    ]


def test_file_in_the_directorys_place_is_told_with_its_remedy(seaweed, bucket, tmp_path):
    (tmp_path / "file").write_text("")
    code, lines = check(tmp_path / "file", seaweed.environ())
    assert code == 1
    assert "remove it" in line_about(lines, "not a directory")


def test_link_in_the_directorys_place_is_warned_about(seaweed, bucket, watch_dir, tmp_path):
    (tmp_path / "link").symlink_to(watch_dir)
    _, lines = check(tmp_path / "link", seaweed.environ())
    assert line_about(lines, "symbolic link").startswith("warn")
    assert f"watch {watch_dir} instead" in line_about(lines, "symbolic link")


@pytest.mark.parametrize(
    ("options", "said"),
    [("ro,size=1m", "mounted read-only"), ("size=4k", "is full"), ("size=1m,nr_inodes=2", "no inode left")],
)
def test_file_system_without_room_is_told_with_its_remedy(seaweed, bucket, tmp_path, options, said):
    if os.geteuid():
        pytest.skip("run as root to mount a file system")
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", directory], check=True)
    try:
        if said == "is full":
            (directory / "filler").write_bytes(bytes(4096))
        if said == "no inode left":
            (directory / "filler").touch()
        code, lines = check(directory, seaweed.environ())
    finally:
        subprocess.run(["umount", directory], check=True)
    assert code == 1
    assert line_about(lines, said).startswith("FAIL")


@pytest.fixture
def installed(watch_dir):
    """The directory of an installed helper whose pattern is in force; short, for patterns have 127 bytes."""
    if not kernel.can_crash():
        pytest.skip("run as root to set kernel.core_pattern")
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as name:
        directory = Path(name)
        pattern = kernel.install_helper(directory, {"WATCH_DIR": watch_dir, "KEEP_FREE_PERCENT": 0})
        with kernel.core_pattern(pattern.replace(" -P", f" -C{directory}/helper.conf -P", 1)):
            yield directory


def test_installed_helper_is_asked_and_says_what_it_would_refuse(
    seaweed, bucket, watch_dir, installed, tmp_path
):
    code, lines = check(watch_dir, seaweed.environ())
    assert code == 0, lines
    assert f"helper: WATCH_DIR {watch_dir}" in line_about(lines, "helper: WATCH_DIR")
    config = installed / "helper.conf"
    kernel.write_config(config, {"WATCH_DIR": watch_dir, "KEEP_FREE_PERCENT": 99, "COMPRESSOR": "lzma"})
    code, lines = check(watch_dir, seaweed.environ())
    assert code == 1
    assert line_about(lines, "lower KEEP_FREE_PERCENT=99").startswith("FAIL")
    assert line_about(lines, "'COMPRESSOR=lzma'").startswith("warn")
    kernel.write_config(config, {"WATCH_DIR": installed})
    assert line_about(check(watch_dir, seaweed.environ())[1], "make them the same").startswith("FAIL")
    (installed / "core-dump-helper").chmod(0o777)
    assert line_about(check(watch_dir, seaweed.environ())[1], "others than root can change it").startswith(
        "FAIL"
    )
    (installed / "core-dump-helper").unlink()
    assert line_about(check(watch_dir, seaweed.environ())[1], "cannot be executed").startswith("FAIL")


def test_crash_of_our_own_is_followed_to_the_bucket(seaweed, bucket, watch_dir, installed, tmp_path):
    with running(watch_dir, seaweed.environ(), tmp_path):
        code, lines = check(watch_dir, seaweed.environ(), "--crash")
    assert code == 0, lines
    assert "arrived and was collected" in line_about(lines, "crash:")


def test_crash_that_no_helper_takes_names_the_stage(seaweed, bucket, watch_dir, installed):
    kernel.write_config(
        installed / "helper.conf", {"WATCH_DIR": watch_dir, "IGNORE_SIGNALS": "31", "KEEP_FREE_PERCENT": 0}
    )
    code, lines = check(watch_dir, seaweed.environ(), "--crash")
    assert code == 1
    assert "the kernel handed the core over, but no dump reached" in line_about(lines, "crash:")


def test_crash_is_not_tried_where_no_dump_could_arrive(seaweed, bucket, watch_dir):
    if not kernel.can_crash():
        pytest.skip("run as root to set kernel.core_pattern")
    with kernel.core_pattern("|/bin/false"):
        code, lines = check(watch_dir, seaweed.environ(), "--crash")
    assert code == 1
    assert line_about(lines, "crash:").startswith("FAIL  crash: not tried")


def test_process_that_is_held_too_long_is_killed_and_the_handler_named(watch_dir, tmp_path, monkeypatch):
    if not kernel.can_crash():
        pytest.skip("run as root to set kernel.core_pattern")
    handler = Path("/tmp") / f"h{os.getpid()}"
    handler.write_text("#!/bin/sh\nsleep 30\n")
    handler.chmod(0o755)
    monkeypatch.setattr(crashtest, "_HELD_SECONDS", 0.5)
    try:
        with kernel.core_pattern(f"|{handler}"):
            result = crashtest.run(str(watch_dir))
    finally:
        handler.unlink()
        subprocess.run(["pkill", "-f", str(handler)], check=False)
    assert not result.passed
    assert "does not read the core" in result.text

"""`core-dump-collector check` as its users run it."""

from __future__ import annotations

import os
import subprocess

import pytest
from tests.support import kernel, s3
from tests.support.collector import COMMAND


def check(directory, environ, *flags):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "BUCKET"))}
    ended = subprocess.run(
        [*COMMAND, "check", str(directory), *flags],
        env=clean | {"BUCKET_NAME": "dumps", "AWS_EC2_METADATA_DISABLED": "true"} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
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
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, [], "connect"),
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

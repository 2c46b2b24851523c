"""Downloads under bad conditions: interrupted, cut, twice at once, on a full disk, of an object that is replaced."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tests.support.collector import wait_until
from tests.support.cores import Shape, build
from tests.support.front import cut, error, front
from tests.support.uploads import connected, send

from core_dumps import parts
from core_dumps.sparse import write_sparse
from core_dumps.workfile import Work

NAME = "node-7/core-app-1700000001-1-11.gz"
PART = parts.PART_BYTES
COMMAND = [sys.executable, "-m", "core_dumps.cli"]


def core(content):
    shape = Shape()
    return build(shape, shape.status(1), [(0x100000, content, False)])


@pytest.fixture
def noisy(cli):
    """A dump of three parts, which does not compress."""
    whole = core(os.urandom(2 * PART + 4096))
    body = gzip.compress(whole, 0, mtime=0)
    cli.put(NAME, body, {"bytes": len(whole)})
    return whole, body


def is_part(request):
    return request.method == "GET" and request.first_byte is not None


def test_answer_that_is_cut_is_continued_where_it_ended(cli, noisy, tmp_path):
    firsts = []

    def after(request, reply):
        if not is_part(request):
            return reply
        firsts.append(request.first_byte)
        return cut(reply, 3_000_000)

    with front(cli.server.endpoint, after=after) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        cli.run("get", "1", "-o", "out")
        assert {0, 3_000_000, 6_000_000} <= set(firsts)
        firsts.clear()
        piped = cli.run("get", "1", "-o", "-", capture_output=True, text=False)
    assert (tmp_path / "out").read_bytes() == piped.stdout == noisy[0]


def test_answers_that_always_end_early_end_the_command_with_a_line(cli, noisy, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST_CUTS", 1)
    with front(cli.server.endpoint, after=lambda q, r: cut(r, 1000) if is_part(q) else r) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        assert "keep ending early" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_two_downloads_to_one_place_never_share_their_work(cli, noisy, tmp_path):
    held, release = threading.Event(), threading.Event()

    def before(request):
        if is_part(request):
            held.set()
            release.wait(30)

    with front(cli.server.endpoint, before) as endpoint:
        environ = cli.variables() | {"AWS_ENDPOINT_URL_S3": endpoint}
        with subprocess.Popen([*COMMAND, "get", "1", "-o", "out"], env=environ, cwd=tmp_path) as first:
            assert held.wait(30)
            done = cli.run("get", "1", "-o", "out", code=1)
            assert "another core-dumps is downloading this dump to the same place" in done.stderr
            release.set()
            assert first.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == noisy[0]
    assert os.listdir(tmp_path) == ["out"]


def notes(directory):
    return b"".join(path.read_bytes() for path in directory.glob(".out.*.parts"))


def test_ctrl_c_ends_a_download_at_once_and_the_next_one_resumes(cli, noisy, tmp_path):
    def slow(request, reply):
        return replace(reply, bytes_per_second=400_000) if is_part(request) else reply

    with front(cli.server.endpoint, after=slow) as endpoint:
        environ = cli.variables() | {"AWS_ENDPOINT_URL_S3": endpoint}
        command = [*COMMAND, "get", "1", "-o", "out"]
        with subprocess.Popen(
            command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until(
                lambda: re.search(rb"^[01] ", notes(tmp_path), re.MULTILINE), 60, "a note of a long part"
            )
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)[1]
            assert time.monotonic() - began < 10, "half of what is left of the part"
    assert process.returncode == 130
    assert said == "core-dumps: interrupted: the same command continues the download\n"
    firsts = []
    with front(
        cli.server.endpoint, lambda q: firsts.append(q.first_byte) if is_part(q) else None
    ) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        cli.run("get", "1", "-o", "out")
    assert any(first % PART for first in firsts), "within a part"
    assert (tmp_path / "out").read_bytes() == noisy[0]
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_replaced_object_are_removed(cli, noisy, tmp_path):
    def before(request):
        if is_part(request) and request.first_byte:
            return error(400, "ExpiredToken", "The provided token has expired.")
        return None

    with front(cli.server.endpoint, before) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        assert "log in again" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert os.listdir(tmp_path) != []
    del cli.environ["AWS_ENDPOINT_URL_S3"]
    other = core(os.urandom(5000))
    cli.put(NAME, gzip.compress(other), {"bytes": len(other)})
    cli.run("get", "1", "-o", "out")
    assert (tmp_path / "out").read_bytes() == other
    assert os.listdir(tmp_path) == ["out"]


def test_object_that_is_replaced_during_a_download_is_not_mixed_with_its_successor(cli, noisy, tmp_path):
    other = noisy[1][:-1] + b"x"

    def before(request):
        if is_part(request) and request.first_byte == PART:
            cli.put_raw(NAME, other)

    with front(cli.server.endpoint, before) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        assert "was replaced" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_object_that_is_replaced_between_listing_and_download_is_refused(cli, noisy, tmp_path):
    def before(request):
        if request.method == "HEAD":
            cli.put_raw(NAME, b"short")

    with front(cli.server.endpoint, before) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        assert "size changed" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert os.listdir(tmp_path) == []


def test_store_that_ignores_ranges_is_named(cli, noisy, tmp_path):
    def after(request, reply):
        return replace(reply, status=200, body=noisy[1]) if is_part(request) else reply

    with front(cli.server.endpoint, after=after) as endpoint:
        cli.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        assert "ignores Range" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_notes_on_a_file_of_another_length_are_not_believed(tmp_path):
    dump = SimpleNamespace(key="key")
    remote = SimpleNamespace(bucket=SimpleNamespace(name="bucket"), dump=dump, etag="etag")
    folder = os.open(tmp_path, os.O_RDONLY)
    for size, believed in ((5000, {0: 4000}), (3000, {})):
        with Work(folder, "out", remote) as work:
            work.received(5000)
            work.write(b"x" * 4000, 0)
            work.note(0, 4000)
            os.ftruncate(work.file, size)
        with Work(folder, "out", remote) as work:
            assert work.received(5000) == believed
            work.remove()
    os.close(folder)


def test_disk_that_takes_a_part_of_a_write_gets_the_rest_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda file, data, at, pwrite=os.pwrite: pwrite(file, data[:1000], at))
    content = os.urandom(70_000)
    with open(tmp_path / "core", "w+b") as file:
        assert write_sparse(file.fileno(), iter([content])) == len(content)
        assert file.read() == content


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid():
        pytest.skip("mounts a file system, needs root: sudo make test")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_space_is_checked_before_a_download(cli, noisy, small_disk):
    done = cli.run("get", "1", "-v", "-o", small_disk / "out", code=1)
    assert "not enough space" in done.stderr
    assert "requests: 1 GetObject," in done.stderr, "only the metadata was read"
    assert os.listdir(small_disk) == []


def test_disk_that_becomes_full_is_left_as_it_was(cli, gz, small_disk):
    whole = core(b"abcdefgh" * 1_000_000)
    cli.put(NAME, gz(whole), {"bytes": len(whole)})
    assert (
        "the disk is full; nothing was kept" in cli.run("get", "1", "-o", small_disk / "out", code=1).stderr
    )
    assert os.listdir(small_disk) == []


def test_refused_object_leaves_nothing(cli, gz, tmp_path):
    cli.put(NAME, gz(core(b"x" * 100_000)), {"bytes": 7})
    cli.run("get", "1", "-o", "out", code=1)
    assert os.listdir(tmp_path) == []


def test_zeros_are_found_at_the_speed_of_memory(tmp_path):
    block = bytes(1 << 20)
    other = bytes(1 << 20)
    began = time.process_time()
    assert all(block == other for _ in range(512))
    compared = time.process_time() - began
    with open(tmp_path / "core", "wb") as file:
        began = time.process_time()
        assert write_sparse(file.fileno(), iter([block] * 512)) == 512 << 20
        taken = time.process_time() - began
        assert os.fstat(file.fileno()).st_blocks == 0
    assert taken < 20 * compared + 0.2


def test_data_between_zeros_is_written_where_it_was(tmp_path):
    pieces = [bytes(100_000), b"x" * 70_000, bytes(200_000), b"y", bytes(65_536 * 3)]
    with open(tmp_path / "core", "w+b") as file:
        size = write_sparse(file.fileno(), iter(pieces))
        os.ftruncate(file.fileno(), size)
        assert file.read() == b"".join(pieces)


def test_heap_dump_that_the_collector_compressed_comes_back(cli, tmp_path):
    data = b"JAVA PROFILE 1.0.2\0" + os.urandom(50_000) + bytes(1 << 20)
    path = tmp_path / "java_pid7.hprof"
    path.write_bytes(data)
    with connected(cli.server.environ()):
        send(path, bucket_name=f"s3://dumps/{cli.prefix}")
    assert cli.json()[0]["bytes"] == len(data)
    done = cli.run("get", "java_pid7.hprof", "-o", "out")
    assert (tmp_path / "out").read_bytes() == data
    assert "verified: CRC-32, length" in done.stdout
    assert done.stderr == ""

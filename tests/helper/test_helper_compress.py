"""The compressor in the helper's own process, on one thread and on two."""

import gzip
import os
import random
import time
import zlib

import pytest

from core_dump_helper.compress import GzipWriter, SparseWriter
from core_dump_helper.settings import Settings

MEBIBYTE = 1 << 20


@pytest.fixture
def writer(tmp_path, request):
    """A compressor that writes to `dump`, and believes that it has two cores."""
    pytest.importorskip("isal")
    dump = os.open(tmp_path / "dump", os.O_RDWR | os.O_CREAT)
    writer = GzipWriter(dump, request.param, Settings())
    writer.start()
    writer._may_start = True
    yield writer
    os.close(dump)


def memory(size):
    """Return bytes as a process holds them: repetitions within a MiB and across it, zeros, noise."""
    source = random.Random(5)
    tiles = [source.randbytes(3000), bytes(9000), b"some text of a service, " * 300]
    data = b"".join(source.choice(tiles) for _ in range(size // 6000))
    return memoryview((data + source.randbytes(size // 8))[:size])


@pytest.mark.parametrize("writer", ["isal", "gzip"], indirect=True)
def test_dump_is_one_gzip_member_however_often_the_second_thread_helps(writer, tmp_path):
    content = memory(12 * MEBIBYTE)
    chance, start = random.Random(6), 0
    while start < len(content):
        size = chance.choice([1, 2, 7, 4096, MEBIBYTE, MEBIBYTE])
        writer.parallel = chance.random() < 0.5
        writer.write(content[start : start + size])
        start += size
    assert writer._started
    assert writer.close() == ""
    reader = zlib.decompressobj(wbits=31)
    assert reader.decompress((tmp_path / "dump").read_bytes()) == content
    assert (reader.eof, reader.unused_data) == (True, b"")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("writer", ["isal", "gzip"], indirect=True)
def test_data_around_zeros_comes_back_and_refers_to_nothing_before_them(writer, tmp_path, parallel):
    noise = random.Random(7).randbytes(MEBIBYTE)
    data, zeros = memoryview(noise), memoryview(bytearray(MEBIBYTE))
    pieces = [zeros, data, zeros, zeros, data[-30_000:], zeros[:30_000], data, zeros, data[-30_000:], zeros]
    writer.parallel = parallel
    for piece in pieces:
        writer.write(piece)
    assert writer.close() == ""
    reader = zlib.decompressobj(wbits=31)
    assert reader.decompress((tmp_path / "dump").read_bytes()) == b"".join(pieces)
    assert (reader.eof, reader.unused_data) == (True, b"")


@pytest.mark.parametrize("writer", ["isal", "gzip"], indirect=True)
def test_piece_that_does_not_fit_is_left_out_whole(writer, tmp_path, monkeypatch):
    content = memory(4 * MEBIBYTE)
    writer.parallel = True
    writer.write(content[: 2 * MEBIBYTE])
    written = []

    def fails_in_the_second_half(descriptor, data):
        written.append(data)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        os.write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr("core_dump_helper.compress.write_all", fails_in_the_second_half)
        with pytest.raises(OSError, match="No space"):
            writer.write(content[2 * MEBIBYTE :])
    writer.close()
    assert gzip.decompress((tmp_path / "dump").read_bytes()) == content[: 2 * MEBIBYTE]


def best_seconds(work):
    """Return the least CPU time of several runs: others on this machine hardly change it."""
    times = []
    for _ in range(20):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("writer", ["gzip"], indirect=True)
def test_zeros_take_zlib_less_than_half_the_time_of_compressing_them(writer):
    zeros = memoryview(bytearray(MEBIBYTE))
    deflate = zlib.compressobj(1, 8, -15)
    compressed = best_seconds(lambda: (deflate.compress(zeros), deflate.flush(zlib.Z_SYNC_FLUSH)))
    assert best_seconds(lambda: writer.write(zeros)) < compressed / 2


def test_zeros_become_holes_at_the_speed_of_memory(tmp_path):
    dump = os.open(tmp_path / "dump", os.O_RDWR | os.O_CREAT)
    writer = SparseWriter(dump)
    writer.start()
    zeros = memoryview(bytearray(MEBIBYTE))
    taken = best_seconds(lambda: writer.write(zeros))
    assert taken < 4 * best_seconds(lambda: bytes(zeros))
    almost = bytearray(MEBIBYTE)
    almost[-1] = 1
    writer.write(memoryview(almost))
    writer.write(zeros[:1000])
    assert writer.close() == ""
    os.close(dump)
    content = (tmp_path / "dump").read_bytes()
    assert content == bytes(20 * MEBIBYTE) + almost + bytes(1000)
    assert (tmp_path / "dump").stat().st_blocks * 512 <= 2 * MEBIBYTE


def no_compressor():
    raise MemoryError


class FailingCompressor:
    def compress(self, _):
        raise ValueError("any other error")


@pytest.mark.parametrize("writer", ["isal"], indirect=True)
@pytest.mark.parametrize("broken", [no_compressor, FailingCompressor])
def test_second_thread_that_fails_fails_the_dump_and_leaves_nobody_waiting(writer, broken):
    writer._new_deflate = broken
    writer.parallel = True
    with pytest.raises(MemoryError):
        writer.write(memory(MEBIBYTE))


@pytest.mark.parametrize("writer", ["isal"], indirect=True)
def test_one_thread_does_it_where_no_other_can_be_started(writer, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("core_dump_helper.compress.start_new_thread", refuse)
    writer.parallel = True
    content = memory(3 * MEBIBYTE)
    for start in range(0, len(content), MEBIBYTE):
        writer.write(content[start : start + MEBIBYTE])
    writer.close()
    assert gzip.decompress((tmp_path / "dump").read_bytes()) == content

"""What is read of a dump: parts that make the file again, gzip that any reader takes, a damaged stream mended."""

import gzip
import hashlib
import io
import itertools
import os
import random
import subprocess
import zlib

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from isal import isal_zlib

from core_dump_collector.board import SEAT_BYTES, Seat
from core_dump_collector.budget import MEBIBYTE
from core_dump_collector.node.dumpfile import DumpFile
from core_dump_collector.s3 import compression, sources
from core_dump_collector.s3.flow import Flow
from core_dump_collector.s3.multipart import SentPart, Whole
from core_dump_collector.s3.parts import BLOCK_BYTES, Body, FilePart
from core_dump_collector.s3.sources import part_size
from core_dump_format.crc32 import encode_crc32
from core_dump_format.gzip import inflate_until_damage

RAW = "core-app-1700000000-42-11"
on_disk = hypothesis_settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def some_core(size, seed=1):
    """Bytes like a core's: noise, text and zeros."""
    noise = random.Random(seed)
    blocks = itertools.cycle([noise.randbytes(4096), b"some text " * 400, bytes(8192)])
    return b"".join(itertools.islice(blocks, size // 4096 + 3))[:size]


def read_all(body):
    return b"".join(iter(lambda: bytes(body.read(16384)), b""))


def parts_of(path, part_bytes, **options):
    """Return the bodies of a file's parts, read the way botocore reads them."""
    with DumpFile(str(path.parent), path.name) as dump:
        read = sources.open_source(dump, part_bytes, **({"compress_raw": True, "salvaged": False} | options))
        bodies = []
        numbers = []
        for part in read.parts():
            body = part.body()
            data = body if isinstance(body, bytes) else read_all(body)
            assert len(data) == part.size_bytes
            assert part.crc32() == zlib.crc32(data)
            assert part.md5() == hashlib.md5(data).hexdigest()
            bodies.append(data)
            numbers.append((part.number, part.last))
            part.release()
    assert [number for number, _ in numbers] == list(range(1, len(numbers) + 1))
    assert [last for _, last in numbers] == [False] * (len(numbers) - 1) + [True]
    assert all(len(body) == read.part_bytes for body in bodies[:-1])
    return bodies


@given(size=st.integers(0, 5000), part_bytes=st.integers(1, 5000))
@on_disk
def test_parts_of_a_compressed_file_are_the_file(tmp_path, size, part_bytes):
    content = some_core(size)
    (tmp_path / "core.gz").write_bytes(content)
    assert b"".join(parts_of(tmp_path / "core.gz", part_bytes)) == content


@given(size=st.integers(0, 200_000), part_bytes=st.integers(1000, 100_000))
@on_disk
def test_a_raw_core_goes_up_as_gzip_of_itself(tmp_path, size, part_bytes):
    content = some_core(size)
    (tmp_path / RAW).write_bytes(content)
    assert gzip.decompress(b"".join(parts_of(tmp_path / RAW, part_bytes))) == content


def test_a_raw_core_gives_the_same_bytes_each_time(tmp_path):
    (tmp_path / RAW).write_bytes(some_core(3 * MEBIBYTE))
    first = parts_of(tmp_path / RAW, 100_000)
    os.utime(tmp_path / RAW, (0, 0))
    assert parts_of(tmp_path / RAW, 100_000) == first


def test_gzip_itself_reads_what_we_write(tmp_path):
    content = some_core(5 * MEBIBYTE)
    (tmp_path / RAW).write_bytes(content)
    compressed = b"".join(parts_of(tmp_path / RAW, MEBIBYTE))
    done = subprocess.run(["gzip", "-d"], input=compressed, capture_output=True, check=True)
    assert done.stdout == content


def test_a_raw_core_is_left_raw_when_configured(tmp_path):
    (tmp_path / RAW).write_bytes(b"dump")
    assert parts_of(tmp_path / RAW, 100, compress_raw=False) == [b"dump"]


@pytest.mark.parametrize("name", ["core.gz", "core.zst", "heap.hprof.xz"])
def test_compressed_files_go_up_as_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"whatever it holds")
    assert parts_of(tmp_path / name, 100) == [b"whatever it holds"]


def test_no_more_than_two_parts_of_a_stream_exist_at_a_time(tmp_path):
    (tmp_path / RAW).write_bytes(os.urandom(10 * MEBIBYTE))
    with DumpFile(str(tmp_path), RAW) as dump:
        found = sources.open_source(dump, MEBIBYTE, compress_raw=True, salvaged=False).parts()
        first, second = next(found), next(found)
        first.release()
        third = next(found)  # would wait for ever if `first` had kept its buffer
        second.release()
        third.release()
        assert sum(part.size_bytes for part in found if part.release() is None) > 6 * MEBIBYTE


def test_a_file_that_becomes_shorter_is_an_error_and_never_a_shorter_part(tmp_path):
    (tmp_path / "core.gz").write_bytes(b"x" * 1000)
    with DumpFile(str(tmp_path), "core.gz") as dump:
        (part,) = sources.open_source(dump, MEBIBYTE, compress_raw=True, salvaged=False).parts()
        os.truncate(tmp_path / "core.gz", 10)
        with pytest.raises(OSError, match="shorter"):
            part.crc32()
        assert part.error is not None


# The compressed stream


@given(st.lists(st.one_of(st.binary(max_size=2000), st.integers(0, 3 * MEBIBYTE).map(bytes)), max_size=6))
@hypothesis_settings(max_examples=30, deadline=None)
def test_what_is_compressed_is_one_gzip_member_and_the_same_each_time(pieces):
    packed = b"".join(compression.compress(pieces))
    reader = zlib.decompressobj(wbits=31)
    assert reader.decompress(packed) + reader.flush() == b"".join(pieces)
    assert (reader.eof, reader.unused_data) == (True, b"")
    assert b"".join(compression.compress(iter(pieces))) == packed


def test_compressor_reads_no_further_ahead_than_its_threads_need():
    taken = []
    packed = compression.compress(taken.append(n) or bytes(MEBIBYTE) for n in range(100))
    for _ in range(4):
        next(packed)
    packed.close()
    assert 3 <= len(taken) <= 3 + compression.THREADS


# A salvaged partial

DAMAGE = {
    "ends early": lambda whole: whole[: len(whole) * 2 // 3],
    "ends in its trailer": lambda whole: whole[:-3],
    "garbage at the end": lambda whole: whole + b"\0garbage" * 700,
    "zeros at the end": lambda whole: whole[: len(whole) // 2] + bytes(10_000),
    "whole after all": lambda whole: whole,
    "two members": lambda whole: whole + whole[:-20],
}


@pytest.mark.parametrize("compress", [zlib, "pigz"], ids=["zlib", "pigz"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_decompresses_of_a_salvaged_dump_goes_up_as_valid_gzip(tmp_path, damage, compress):
    content = some_core(3 * MEBIBYTE)
    whole = gzip.compress(content, 1)
    if compress == "pigz":
        whole = subprocess.run(["pigz", "-1"], input=content, capture_output=True, check=True).stdout
    damaged = damage(whole)
    (tmp_path / "core.gz").write_bytes(damaged)
    mended = gzip.decompress(b"".join(parts_of(tmp_path / "core.gz", MEBIBYTE, salvaged=True)))
    pairs = zip(whole + whole, damaged, strict=False)
    intact = next((n for n, (good, bad) in enumerate(pairs) if good != bad), len(damaged))
    reader = zlib.decompressobj(wbits=31)
    best = reader.decompress(damaged[:intact])
    assert mended.startswith(best[: len(best) - 64 * 1024])
    if (
        damage is not DAMAGE["zeros at the end"]
    ):  # zeros decode to something: deflate has its checksum at the end
        assert (content + content).startswith(mended)


def test_no_byte_is_left_in_the_decompressor_wherever_a_stream_of_zeros_is_cut():
    packer = isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)
    whole = packer.compress(bytes(6 * MEBIBYTE)) + packer.flush()
    for cut in range(4096, len(whole) - 8, 3):
        blocks = (whole[start : min(cut, start + 4096)] for start in range(0, cut, 4096))
        salvaged = sum(map(len, inflate_until_damage(blocks)))
        assert salvaged == len(isal_zlib.decompressobj(wbits=31).decompress(whole[:cut])), cut


@given(st.binary(max_size=300))
def test_no_bytes_make_the_mending_fail(data):
    list(inflate_until_damage(iter([data[i : i + 7] for i in range(0, len(data), 7)])))
    list(inflate_until_damage(iter([b"\x1f\x8b\x08" + data])))


def test_a_salvaged_dump_that_was_never_gzip_goes_up_as_it_is(tmp_path):
    (tmp_path / "core.gz").write_bytes(b"\x7fELF")
    assert parts_of(tmp_path / "core.gz", 100, salvaged=True) == [b"\x7fELF"]


# Sizes and checksums


@given(st.integers(0, 2**45), st.integers(5 * MEBIBYTE, 1024 * MEBIBYTE))
def test_every_object_fits_into_ten_thousand_parts(size, wanted):
    chosen = part_size(size, wanted)
    assert chosen >= wanted
    assert -(-size // chosen) <= 10_000
    assert chosen == wanted or chosen - size // 10_000 <= MEBIBYTE


def test_a_sparse_core_is_not_taken_for_a_huge_one(tmp_path):
    with (tmp_path / RAW).open("wb") as file:
        file.truncate(2**40)
    with DumpFile(str(tmp_path), RAW) as dump:
        read = sources.open_source(dump, 16 * MEBIBYTE, compress_raw=True, salvaged=False)
        assert read.part_bytes == 16 * MEBIBYTE


def sent(bodies, *, proven=True):
    return tuple(
        SentPart(n, len(body), zlib.crc32(body), f'"{hashlib.md5(body).hexdigest()}"', proven=proven)
        for n, body in enumerate(bodies, 1)
    )


@given(st.lists(st.binary(max_size=300), min_size=2, max_size=8))
def test_checksums_of_parts_combine_to_those_of_the_object(bodies):
    content = Whole(sent(bodies)).content
    assert content.crc32 == zlib.crc32(b"".join(bodies))
    assert content.size_bytes == sum(map(len, bodies))
    md5s = b"".join(hashlib.md5(body).digest() for body in bodies)
    assert content.etag() == f"{hashlib.md5(md5s).hexdigest()}-{len(bodies)}"
    crcs = b"".join(zlib.crc32(body).to_bytes(4, "big") for body in bodies)
    assert content.composite_crc32() == f"{encode_crc32(zlib.crc32(crcs))}-{len(bodies)}"


def test_etag_of_the_whole_proves_nothing_unless_each_part_is_proven():
    assert Whole(sent([b"a", b"b"], proven=False)).content.etag() is None
    assert Whole((*sent([b"a"]), *sent([b"b"], proven=False))).content.etag() is None
    assert Whole((SentPart(1, 1, 5, '"opaque"', proven=True), *sent([b"b"]))).content.etag() is None


def test_object_of_one_part_has_the_etag_of_one_request():
    assert Whole(sent([b"a"])).content.etag() == hashlib.md5(b"a").hexdigest()


@given(
    st.binary(max_size=2000),
    st.lists(
        st.one_of(st.integers(-1, 500), st.tuples(st.sampled_from([0, 1, 2]), st.integers(-50, 50))),
        max_size=12,
    ),
)
@on_disk
def test_a_body_reads_and_seeks_like_a_file(tmp_path, content, acts):
    (tmp_path / "core.gz").write_bytes(b"before" + content + b"after")
    with (tmp_path / "core.gz").open("rb") as file:
        part = FilePart(file.fileno(), 1, 6, len(content), last=True)
        body, like = Body(part), io.BytesIO(content)
        assert len(body) == len(content)
        for act in acts:
            if isinstance(act, tuple):
                whence, offset = act
                target = {0: 0, 1: body.tell(), 2: len(content)}[whence] + offset
                assert body.seek(offset, whence) == like.seek(max(0, target))
            else:
                block = body.read(act)
                assert bytes(block) == like.read(len(block))
                assert len(block) >= min(act, len(content) - body.tell() + len(block)) or act < 0
                like.seek(body.tell())


def test_file_that_is_read_only_for_its_checksums_makes_progress_with_each_part(tmp_path):
    (tmp_path / f"{RAW}.gz").write_bytes(b"core")
    seat = Seat(memoryview(bytearray(SEAT_BYTES)))
    flow = Flow(seat)
    with DumpFile(str(tmp_path), f"{RAW}.gz") as dump, flow.job(2):
        for _ in sources.FileSource(dump, 1).parts(flow):
            assert seat.beaten_at(2)
            seat.clear()


def test_parts_that_are_read_at_the_same_time_have_memory_of_their_own_and_give_it_back(tmp_path):
    (tmp_path / f"{RAW}.gz").write_bytes(b"aabbccdd")
    with DumpFile(str(tmp_path), f"{RAW}.gz") as dump:
        first, second, third, _ = sources.FileSource(dump, 2).parts()
        one, two = first.block(0, 2), second.block(0, 2)
        assert (bytes(one), bytes(two)) == (b"aa", b"bb")
        first.release()
        three = third.block(0, 2)
        assert (bytes(two), bytes(three)) == (b"bb", b"cc")
        assert three.obj is one.obj, "memory does not grow with the number of parts"


def test_all_of_a_part_can_be_read_at_once(tmp_path):
    content = random.Random(1).randbytes(3 * BLOCK_BYTES + 1)
    (tmp_path / "core.gz").write_bytes(content)
    with (tmp_path / "core.gz").open("rb") as file:
        body = Body(FilePart(file.fileno(), 1, 0, len(content), last=True))
        assert len(body.read(1)) == BLOCK_BYTES
        assert bytes(body.read()) == content[BLOCK_BYTES:]
        assert body.read() == b""

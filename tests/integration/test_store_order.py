"""A raw core arrives with its vital part first: the same memory, and backtraces from the first megabytes alone."""

import gzip
import io
import os
import zlib
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.test_store_uploads import as_sidecar
from tests.support import s3
from tests.support.corepair import CoreFile, assert_same_memory
from tests.support.cores import Shape, build
from tests.support.uploads import KEY, MEBIBYTE, NAME, connected, send

from core_dump_collector.jobs import Outcome
from core_dump_collector.s3 import multipart, ordering
from core_dump_format.attributes import UPLOAD_RECORD
from core_dump_format.core import read_core
from core_dump_format.stream import Forward

RAW = NAME.removesuffix(".gz")
SHAPE = Shape()
STACK_AT, HEAP_AT, HEAP_BYTES = 0x7FFF_0000_0000, 0x10_0000, 12 * MEBIBYTE
STACK = b"".join(page.to_bytes(8, "little") * 512 for page in range(1, 17))


@pytest.fixture(autouse=True)
def _admin(seaweed):
    with connected(seaweed.environ()):
        yield


@pytest.fixture
def core(watch_dir):
    """A raw core of 12 MiB whose stack lies at its end, and a copy that stays."""
    notes = SHAPE.status(77, 11, [(16, HEAP_AT), (19, STACK_AT + 0x1000)]) + SHAPE.note(6, SHAPE.words(0, 0))
    content = build(SHAPE, notes, [(HEAP_AT, os.urandom(HEAP_BYTES), False), (STACK_AT, STACK, False)])
    (watch_dir / RAW).write_bytes(content)
    (watch_dir.parent / "kernel").write_bytes(content)
    return watch_dir / RAW


def test_vital_part_is_the_first_member_and_no_byte_of_memory_is_lost(bucket, core, tmp_path):
    assert send(core).outcome is Outcome.UPLOADED
    body, facts = s3.body_of(bucket, KEY), as_sidecar(bucket)
    vital = body[: facts["vital_bytes"]]
    assert (facts["vital"], zlib.crc32(vital)) == ("whole", facts["vital_crc32"])
    front = gzip.decompress(vital)
    assert STACK[4096:] in front
    assert len(vital) < MEBIBYTE
    dump = tmp_path / "dump"
    dump.write_bytes(gzip.decompress(body))
    assert dump.stat().st_size == facts["bytes"]
    assert CoreFile(dump).vital_end() == len(front)
    assert_same_memory(tmp_path / "kernel", dump)


def test_core_that_was_cut_keeps_what_it_has_and_promises_what_it_lacks(bucket, core, tmp_path):
    os.truncate(core, 6 * MEBIBYTE)
    os.truncate(core, 9 * MEBIBYTE)
    assert send(core).outcome is Outcome.UPLOADED
    content = gzip.decompress(s3.body_of(bucket, KEY))
    assert len(content) == as_sidecar(bucket)["bytes"]
    parsed = read_core(Forward(io.BytesIO(content).read, 1 << 30))
    assert parsed.expected_bytes > len(content)
    offset, size = parsed.where(HEAP_AT, 4 * MEBIBYTE)
    assert (
        content[offset : offset + size]
        == (tmp_path / "kernel").read_bytes()[-HEAP_BYTES - len(STACK) :][:size]
    )


@pytest.mark.parametrize("break_it", ["not a core", "no threads", "another machine", "small"])
def test_core_that_cannot_be_ordered_is_uploaded_as_it_is(bucket, watch_dir, break_it):
    heap = [(HEAP_AT, os.urandom(1 * MEBIBYTE if break_it == "small" else HEAP_BYTES), False)]
    content = {
        "not a core": lambda: os.urandom(HEAP_BYTES),
        "no threads": lambda: build(SHAPE, b"", heap),
        "another machine": lambda: build(Shape(machine=8), Shape(machine=8).status(1), heap),
        "small": lambda: build(SHAPE, SHAPE.status(1, 11, [(19, HEAP_AT)]), heap),
    }[break_it]()
    (watch_dir / RAW).write_bytes(content)
    assert send(watch_dir / RAW).outcome is Outcome.UPLOADED
    assert gzip.decompress(s3.body_of(bucket, KEY)) == content
    facts = as_sidecar(bucket)
    assert facts["bytes"] == len(content)
    assert not facts.keys() & {"vital", "vital_bytes", "vital_crc32"}


def test_core_that_is_not_compressed_keeps_the_kernels_order(bucket, core, tmp_path):
    assert send(core, compress_raw=False).outcome is Outcome.UPLOADED
    assert s3.body_of(bucket, f"node-1/{RAW}") == (tmp_path / "kernel").read_bytes()


def test_upload_in_the_kernels_order_is_finished_in_that_order(bucket, core, tmp_path):
    """As an older collector left it: parts of the kernel's order are in the store."""
    real = multipart.send_parts

    def cut_short(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with (
        mock.patch.object(ordering, "order", return_value=None),
        mock.patch.object(multipart, "send_parts", cut_short),
        pytest.raises(KeyboardInterrupt),
    ):
        send(core)
    assert b'"order":0' in os.getxattr(core, UPLOAD_RECORD)
    with mock.patch.object(ordering, "order", side_effect=AssertionError("it is not asked for")):
        assert send(core).outcome is Outcome.UPLOADED
    assert gzip.decompress(s3.body_of(bucket, KEY)) == (tmp_path / "kernel").read_bytes()
    assert "vital" not in as_sidecar(bucket)
    assert s3.unfinished_multiparts(bucket) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_headers_cost_the_order_and_never_the_dump(tmp_path_factory, data):
    notes = SHAPE.status(77, 11, [(19, STACK_AT)]) + SHAPE.note(6, SHAPE.words(3, HEAP_AT, 5, 9))
    content = bytearray(build(SHAPE, notes, [(HEAP_AT, b"h" * 8192, False), (STACK_AT, STACK, False)]))
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, 1600))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8)]) | st.binary(min_size=8, max_size=8)
        )
    path = tmp_path_factory.mktemp("fuzz") / RAW
    path.write_bytes(content[: data.draw(st.integers(4096, len(content)))])
    with path.open("rb") as file, mock.patch.object(ordering, "LEAST_BYTES", 0):
        size = path.stat().st_size
        ordered = ordering.order(file.fileno(), size)
        if ordered is not None:
            unpacked = gzip.decompress(b"".join(ordered.compressed()))
            assert len(unpacked) == ordered.size_bytes >= size
            assert gzip.decompress(ordered.vital) == unpacked[: len(gzip.decompress(ordered.vital))]

"""`get` writes the memory of a dump by address, and leaves a dump that it cannot order as it is."""

import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.format.test_trim import trimmed
from tests.format.test_vital import (
    FIRST,
    PAGE,
    SPANS,
    Held,
    any_segments,
    assemble,
    content_of,
    kernel_core,
    note,
    select,
    status,
)
from tests.support.corepair import assert_by_address, assert_only_order_differs, assert_same_memory
from tests.support.cores import Shape, build
from tests.support.fetched import write_by_address

from core_dump_format.core import read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.front import read_front
from core_dump_format.reorder import NOTE_KIND, NOTE_OWNER, Reordered
from core_dump_format.stream import Forward
from core_dumps import addressorder
from core_dumps.addressorder import AddressOrder

NAME = "node-7/core-app-1700000001-1-11.gz"
STACK = SPANS[3][0] + 0x2010
DECOY = note(0x46494C45, struct.pack("<5Q", 1, PAGE, FIRST, FIRST + PAGE, 0) + NOTE_OWNER + bytes(80))
"""An NT_FILE with a file that is called like the owner of this project's note."""
A, B, C = (bytes([number]) * PAGE * number for number in (1, 2, 3))
SHAPES = [Shape(bits, order) for bits in (32, 64) for order in "<>"]


def vital_first(spans=SPANS, notes=b"", **how):
    """Return a core as the kernel writes it, and the dump of it that begins with its vital part."""
    core = kernel_core(spans, status(STACK) + notes, **how)
    front, selection = select(core, Held(spans))
    return core, assemble(core, Reordered(front, selection.pieces, PAGE), selection.pieces)


def dump_of(segments, shape=SHAPES[2], vital_end=PAGE):
    """Return a dump that holds (address, content) in the given order, with its headers by address."""
    content = struct.pack(shape.order + "IIQ", 1, 0, vital_end)
    notes = shape.status(1) + shape.note(NOTE_KIND, content, NOTE_OWNER)
    dump = bytearray(build(shape, notes, [(*segment, False) for segment in segments]))
    first, row = (64 + 56, 56) if shape.bits == 64 else (52 + 32, 32)
    end = first + row * len(segments)
    rows = [bytes(dump[at : at + row]) for at in range(first, end, row)]
    address = struct.Struct(f"{shape.order}{shape.bits // 4}x{shape.word}").unpack_from
    dump[first:end] = b"".join(sorted(rows, key=address))
    return dump


def core_of(dump):
    return read_core(Forward.over([bytes(dump)], 1 << 30))


def memory_of(dump):
    """Return what each program header of memory shows, by address."""
    return [bytes(dump[offset : offset + size]) for offset, size in core_of(dump).layout.segments.places()]


def test_get_writes_memory_by_address_and_changes_nothing_else(cli, gz, tmp_path):
    core, dump = vital_first(notes=DECOY)
    (tmp_path / "kernel").write_bytes(core)
    (tmp_path / "dump").write_bytes(dump)
    cli.put(NAME, gz(dump), {"bytes": len(dump)})
    assert "verified: CRC-32, ELF length" in cli.run("get", "1", "-o", "out").stdout
    assert_by_address(tmp_path / "out")
    assert_same_memory(tmp_path / "kernel", tmp_path / "out")
    assert_only_order_differs(tmp_path / "dump", tmp_path / "out")
    assert not write_by_address((tmp_path / "out").read_bytes(), tmp_path / "again"), "it is in order"


def test_other_ways_out_of_the_bucket_give_the_dumps_own_order(cli, gz, tmp_path):
    _, dump = vital_first()
    cli.put(NAME, gz(dump), {"bytes": len(dump)})
    assert cli.run("get", "1", "-o", "-", capture_output=True, text=False).stdout == dump
    cli.run("get", "1", "--keep-compressed", "-o", "out.gz")
    assert (tmp_path / "out.gz").read_bytes() == gz(dump)


def test_get_writes_a_trimmed_dump_by_address(cli, gz, tmp_path):
    spans = [*SPANS, (0x7F0000000000, 0x400000, 0x400000, 6)]
    core = kernel_core(spans, status(STACK))
    memory = Held(spans, words={STACK // 8 * 8 + 64: 0x7F0000200010})
    _, _, dump = trimmed(core, memory, 0x40000)
    facts = {"state": "trimmed", "trimmed": "rule", "truncated": "max_dump_bytes", "bytes": len(dump)}
    cli.put(NAME, gz(dump), facts)
    cli.run("get", "1", "-o", "out")
    (tmp_path / "dump").write_bytes(dump)
    assert (tmp_path / "out").read_bytes() != dump
    assert_by_address(tmp_path / "out")
    assert_only_order_differs(tmp_path / "dump", tmp_path / "out")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("missing", [PAGE, 10 * PAGE, 0])
def test_get_keeps_the_order_of_a_dump_that_is_truncated_or_may_be(cli, gz, tmp_path, recorded, missing):
    _, dump = vital_first()
    dump = dump[: len(dump) - missing]
    cli.put(NAME, gz(dump), {"bytes": len(dump)} if recorded else {})
    done = cli.run("get", "1", "-o", "out")
    assert ("truncated" in done.stderr) == bool(missing)
    assert ((tmp_path / "out").read_bytes() == dump) == bool(missing or not recorded)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cores_of_any_class_and_byte_order_are_ordered(tmp_path, shape):
    dump = dump_of([(0x30000, C), (0x10000, A), (0x20000, B)], shape)
    assert write_by_address(bytes(dump), tmp_path / "out", 1000)
    found = (tmp_path / "out").read_bytes()
    assert found.endswith(A + B + C)
    assert memory_of(found) == [A, B, C]
    assert core_of(found).vital_end == 0
    assert core_of(found).threads == core_of(dump).threads


def test_zeros_are_holes_wherever_they_go(cli, gz, tmp_path):
    segments = [(0x9000000, A), (0x1000000, bytes(64 << 20)), (0x8000000, B), (0x7000000, bytes(8 << 20) + C)]
    dump = dump_of(segments)
    cli.put(NAME, gz(dump), {"bytes": len(dump)})
    cli.run("get", "1", "-o", "out")
    found = (tmp_path / "out").stat()
    assert found.st_size == len(dump)
    assert found.st_blocks * 512 <= 256 << 10
    assert memory_of((tmp_path / "out").read_bytes()) == [each[1] for each in sorted(segments)]


@pytest.mark.parametrize("extra", [[(0x70000002, bytes(range(256)) * 16)], []])
def test_tags_behind_the_memory_stay_there(tmp_path, extra):
    core, dump = vital_first(extra=extra)
    (tmp_path / "dump").write_bytes(dump)
    assert write_by_address(bytes(dump), tmp_path / "out")
    assert_only_order_differs(tmp_path / "dump", tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[-4096:] == core[-4096:]


def test_more_segments_than_the_header_can_count_are_ordered(tmp_path):
    spans = [(FIRST + number * 2 * PAGE, PAGE, PAGE, 6) for number in range(65_535)]
    core = kernel_core(spans, status(FIRST + 0x10))
    front, selection = select(core, Held([(FIRST + 0x20000, PAGE, PAGE, 6)]))
    pieces = selection.pieces or [(40_000, spans[39_999][0], content_of(spans[39_999][0], PAGE))]
    dump = assemble(core, Reordered(front, pieces, PAGE), pieces)
    (tmp_path / "dump").write_bytes(dump)
    assert write_by_address(bytes(dump), tmp_path / "out")
    assert_by_address(tmp_path / "out")
    assert_only_order_differs(tmp_path / "dump", tmp_path / "out")


def words(dump, at, *values):
    struct.pack_into(f"<{len(values)}Q", dump, at, *values)
    return dump


def row(number):
    """Return the place of the offset in a program header; 0 is that of the notes."""
    return 64 + 56 * number + 8


def table_in_memory(dump):
    """Put the program headers where memory is that moves."""
    table = bytes(dump[64 : 64 + 4 * 56])
    start = len(dump) - 6 * PAGE
    dump[start : start + len(table)] = table
    return words(dump, 32, start)


HOSTILE = {
    "overlap": lambda dump: words(dump, row(1), struct.unpack_from("<Q", dump, row(1))[0] - PAGE),
    "gap": lambda dump: words(dump, row(2), struct.unpack_from("<Q", dump, row(2))[0] + PAGE),
    "one place twice": lambda dump: words(dump, row(2), struct.unpack_from("<Q", dump, row(1))[0]),
    "before the front": lambda dump: words(dump, row(3), 0),
    "endless": lambda dump: words(dump, row(2) + 24, 1 << 63),
    "beyond everything": lambda dump: words(dump, row(3), (1 << 64) - PAGE),
    "not by address": lambda dump: words(dump, row(1) + 8, 0x40000),
    "notes in memory": lambda dump: words(dump, row(0) + 24, 2 * PAGE),
    "headers in memory": table_in_memory,
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_headers_that_do_not_fit_together_keep_the_order(lie):
    dump = dump_of([(0x30000, C), (0x10000, A), (0x20000, B)])
    assert AddressOrder.of(core_of(dump))
    changed = HOSTILE[lie](bytearray(dump))
    assert len(core_of(changed).layout.segments) == 3
    assert AddressOrder.of(core_of(changed)) is None


def test_length_that_headers_and_metadata_invent_leaves_nothing(cli, gz, tmp_path):
    dump = dump_of([(0x30000, C), (0x20000, B), (0x10000, A)])
    words(dump, row(1) + 24, 1 << 61)
    assert AddressOrder.of(core_of(dump))
    cli.put(NAME, gz(dump), {"bytes": core_of(dump).expected_bytes})
    assert "too long for a file; nothing was kept" in cli.run("get", "1", "-o", "out", code=1).stderr
    assert os.listdir(tmp_path) == []


def test_offsets_that_32_bits_cannot_hold_keep_the_order():
    dump = dump_of([(0x30000, C), (0x10000, A), (0x20000, B)], SHAPES[0])
    size = 52 + 32 * 3 + 16
    assert struct.unpack_from("<I", dump, size)[0] == len(C)
    struct.pack_into("<I", dump, size, 0xFFFFF000)
    assert AddressOrder.of(core_of(dump)) is None


def test_core_without_a_vital_part_or_with_too_many_segments_keeps_its_order(monkeypatch):
    segments = [(0x30000, C), (0x10000, A), (0x20000, B)]
    assert AddressOrder.of(core_of(dump_of(segments, vital_end=0))) is None
    monkeypatch.setattr(addressorder, "MOST_SEGMENTS", 3)
    assert AddressOrder.of(core_of(dump_of(segments)))
    monkeypatch.setattr(addressorder, "MOST_SEGMENTS", 2)
    assert AddressOrder.of(core_of(dump_of(segments))) is None


@pytest.mark.parametrize("wide", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_dump_has_the_same_memory_by_address(wide, data):
    spans, pages = data.draw(any_segments().filter(lambda drawn: drawn[1]))
    core = kernel_core(spans, note(1, b"x"), wide=wide, machine=3)
    chosen = data.draw(st.lists(st.sampled_from(pages), unique=True, min_size=1))
    pieces = [(index, address, content_of(address, PAGE)) for index, address in chosen]
    dump = assemble(core, Reordered(read_front(core), pieces, PAGE), pieces)
    with tempfile.TemporaryDirectory() as directory:
        kernel, out = Path(directory, "kernel"), Path(directory, "out")
        kernel.write_bytes(core)
        if write_by_address(bytes(dump), out, data.draw(st.sampled_from([999, PAGE, 1 << 20]))):
            assert_by_address(out)
        else:
            out.write_bytes(dump)
            assert b"".join(memory_of(dump)) == dump[len(dump) - len(b"".join(memory_of(dump))) :]
        assert_same_memory(kernel, out)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6))
def test_damaged_front_keeps_the_order_or_every_byte(changes):
    dump = dump_of([(0x30000, C), (0x10000, A), (0x20000, B)])
    for at, value in changes:
        dump[at] = value
    try:
        if core_of(dump).expected_bytes != len(dump):
            return
    except NotACoreError:
        return
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "out")
        if write_by_address(bytes(dump), out):
            assert out.stat().st_size == len(dump)
            assert memory_of(out.read_bytes()) == memory_of(dump)

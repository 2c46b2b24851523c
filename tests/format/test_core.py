"""Cores of every kind that Linux writes are understood; what lies in them costs no more than a bound."""

import contextlib
import gzip
import io
import resource
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cores import AARCH64, AUXV, FILE, I386, PRPSINFO, SIGINFO, X86_64, Shape, build

from core_dump_format.core import MOST_THREADS, read_build_ids, read_core
from core_dump_format.elf import NotACoreError, build_id_of
from core_dump_format.gzip import DamagedError, inflate
from core_dump_format.stream import Forward

BUILD_ID = bytes(range(20))
SHAPES = [
    pytest.param(Shape(64, "<", X86_64), (16, 19, 4), "x86-64", id="x86-64"),
    pytest.param(Shape(64, "<", AARCH64), (32, 31, 29), "aarch64", id="aarch64"),
    pytest.param(Shape(32, "<", I386), (12, 15, 5), "i386", id="i386"),
    pytest.param(Shape(64, ">", 22), None, "s390", id="s390"),
    pytest.param(Shape(32, ">", 20), None, "ppc", id="ppc"),
]


def read(content, **options):
    return read_core(Forward(io.BytesIO(content).read, 1 << 32, **options))


def first_page(shape):
    """Return the first page of a program with a build ID."""
    head = 64 if shape.bits == 64 else 52
    at = head + (56 if shape.bits == 64 else 32)
    note = shape.note(3, BUILD_ID, b"GNU\0")
    return (shape.header(count=1, kind=3) + shape.row(4, 4, at, at, len(note)) + note).ljust(4096, b"\0")


def whole(shape, numbers=None):
    """Return a core with one of each note, and its program mapped at 0x10000."""
    registers = [
        (number, value) for number, value in zip(numbers or (), (0x11000, 0x7000, 0x7010), strict=False)
    ]
    notes = shape.status(77, 11, registers) + shape.status(78)
    if shape.bits == 64:
        process = bytes(16) + shape.ints(33, 34, 77)
    else:
        process = bytes(8) + struct.pack(shape.order + "HHI", 33, 34, 77)
    process = (
        process.ljust(40 if shape.bits == 64 else 28, b"\0") + b"app".ljust(16, b"\0") + b"app -x".ljust(80)
    )
    notes += shape.note(PRPSINFO, process) + shape.note(AUXV, shape.words(9, 0x11000, 0, 0))
    notes += shape.note(SIGINFO, shape.ints(11, 0, 1).ljust(8 + shape.bits // 8, b"\0") + shape.words(0xDEAD))
    notes += shape.files(
        (0x10000, 0x14000, 0, b"/usr/bin/app"), (0x20000, 0x21000, 2, b"/lib/x.so (deleted)")
    )
    return build(shape, notes, [(0x10000, first_page(shape), True), (0x7000, bytes(8192), False)])


@pytest.mark.parametrize(("shape", "numbers", "machine"), SHAPES)
def test_core_of_every_class_byte_order_and_machine_is_understood(shape, numbers, machine):
    content = whole(shape, numbers)
    source = Forward(io.BytesIO(content).read, 1 << 32)
    core = read_core(source)
    assert (core.machine, core.form.bits, core.expected_bytes) == (machine, shape.bits, len(content))
    assert (core.comm, core.arguments, core.pid, core.uid, core.gid) == ("app", "app -x", 77, 33, 34)
    assert (core.signal, core.code, core.fault_address, core.entry) == (11, 1, 0xDEAD, 0x11000)
    assert [thread.tid for thread in core.threads] == [77, 78]
    if numbers:
        assert core.threads[0][2:] == (0x11000, 0x7000, 0x7010)
    assert core.executable() == "/usr/bin/app"
    assert core.is_code(0x11000)
    assert not core.is_code(0x7000)
    assert core.where(0x7100, 1 << 20) == (len(content) - 8192 + 0x100, 8192 - 0x100)
    assert core.where(0x6FFF, 1) is core.where(0x9001, 1) is None
    build_ids, memory = read_build_ids(core, source, [(0x7000, 16)])
    assert (build_ids, memory[0x7000]) == ({"/usr/bin/app": BUILD_ID.hex()}, bytes(16))


def test_deleted_is_the_kernels_word_and_not_part_of_the_path():
    file = read(whole(Shape())).file_at(0x20000)
    assert (file.path, file.deleted, file.offset_bytes) == ("/lib/x.so", True, 8192)


def test_segments_written_in_another_order_are_found_by_address():
    shape = Shape()
    core = read(build(shape, b"", [(0x9000, b"b" * 16, False), (0x1000, b"a" * 16, True)]))
    content = build(shape, b"", [(0x9000, b"b" * 16, False), (0x1000, b"a" * 16, True)])
    for address, letter in ((0x9000, b"b"), (0x1000, b"a")):
        offset, size = core.where(address, 99)
        assert content[offset : offset + size] == letter * 16
    assert core.is_code(0x1000)


@pytest.mark.parametrize("shape", [Shape(), Shape(32, "<", I386)], ids=["64", "32"])
def test_more_segments_than_16_bits_can_count_are_read(shape):
    segments = [(4096 * number, b"", False) for number in range(70_000)]
    content = build(shape, whole_notes(shape), segments, extended=True)
    core = read(content)
    assert (len(core.layout.segments), core.expected_bytes, core.threads[0].tid) == (70_000, len(content), 1)


def whole_notes(shape):
    return shape.status(1)


def test_a_million_segments_take_seconds_and_little_memory():
    """In a process of its own, whose limit of memory ends it if each segment were an object."""
    script = """
import io, resource, time
from core_dump_format.core import read_core
from core_dump_format.stream import Forward
from tests.support.cores import Shape
shape = Shape()
count = 1_000_000
row = shape.row(1, 6, 4096, 1, 0)
head = shape.header(count=0xFFFF) + shape.row(4, 0, 64 + 56 * (count + 1), 0, 0)
left = [count]
def rows(_):
    some = min(left[0], 4096)
    left[0] -= some
    return row * some
pieces = iter(lambda: rows(0), b"")
import itertools
resource.setrlimit(resource.RLIMIT_DATA, (128 << 20, 128 << 20))
began = time.process_time()
core = read_core(Forward.over(itertools.chain([head], pieces), 1 << 32))
print(len(core.layout.segments), time.process_time() - began)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    count, seconds = done.stdout.split()
    assert int(count) == 1_000_000
    assert float(seconds) < 15


def test_every_thread_is_counted_and_the_first_are_kept():
    shape = Shape()
    core = read(build(shape, b"".join(shape.status(tid) for tid in range(1, 6002)), []))
    assert (core.thread_count, len(core.threads)) == (6001, 6001)
    many = read(build(shape, shape.status(1) * (MOST_THREADS + 9), []))
    assert (many.thread_count, len(many.threads)) == (MOST_THREADS + 9, MOST_THREADS)


def note_bombs():
    shape, most = Shape(), 16 * 1024 * 1024 - 4096
    yield "a table of files made of NULs", shape.note(FILE, bytes(most))
    yield "two-byte names", shape.note(FILE, shape.words(0, 1) + b"ab\0" * (most // 3))
    one = shape.files(*((i, i + 1, 0, b"/%d" % i) for i in range(65_536)))
    yield "tables of files without end", one * (most // len(one))
    yield "empty notes", shape.ints(0, 0, 99) * (most // 12)
    yield "a note longer than the file", shape.ints(5, 0x7FFFFFFF, 1) + bytes(100)


@pytest.mark.parametrize(
    "bomb", [pytest.param(bomb, id=name.replace(" ", "-")) for name, bomb in note_bombs()]
)
def test_notes_cost_little_time_and_memory(bomb):
    shape = Shape()
    content = build(shape, shape.status(1) + bomb, [])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    core = read(content, seconds=2)
    assert core.threads[0].tid == 1
    assert time.monotonic() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_empty_gzip_members_without_end_are_damage():
    with pytest.raises(DamagedError, match="no content"):
        list(inflate([gzip.compress(b"") * 2000]))
    assert b"".join(inflate([gzip.compress(b"a") * 2000])) == b"a" * 2000
    assert b"".join(inflate([gzip.compress(b"") * 900 + gzip.compress(b"a")])) == b"a"


@pytest.mark.parametrize("cut", [4, 30, 80, 200])
def test_core_cut_within_its_headers_is_refused(cut):
    with pytest.raises(NotACoreError):
        read(whole(Shape())[:cut])


def test_deadline_ends_the_reading_of_headers():
    shape = Shape()
    head = shape.header(count=0xFFFF) + shape.row(4, 0, 64 + 56 * 2_000_001, 0, 0)
    with pytest.raises(NotACoreError):
        read(head + shape.row(1, 6, 0, 0, 0) * 2_000_000, seconds=0.05)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([param.values[0] for param in SHAPES]), st.data())
def test_lying_bytes_never_raise_anything_else(shape, data):
    content = bytearray(whole(shape))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content), 1600) - 8))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 8]) | st.binary(min_size=8, max_size=8)
        )
    with contextlib.suppress(NotACoreError):
        source = Forward(io.BytesIO(bytes(content[: data.draw(st.integers(0, len(content)))])).read, 1 << 30)
        read_build_ids(read_core(source), source)
    build_id_of(bytes(content[:4096]))

"""Trimmed dumps, on cores made here: what is kept is the same, what is dropped is missing, what is zero is zero."""

import io
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.format.test_vital import (
    FIRST,
    PAGE,
    SPANS,
    Held,
    any_segments,
    content_of,
    kernel_core,
    note,
    status,
)
from tests.support.corepair import OWNER, CoreFile

from core_dump_format import nearby
from core_dump_format.core import read_core
from core_dump_format.front import UnsupportedError, read_front
from core_dump_format.nearby import Nearby
from core_dump_format.state import ProcessState
from core_dump_format.stream import Forward
from core_dump_format.trim import Content, Trimmed
from core_dump_format.vital import Selection

ALL_FILES = note(0x46494C45, struct.pack("<2Q", 0, PAGE))
"""An NT_FILE that lists no mapping: every segment is anonymous."""


class Sparse(Held):
    """Memory of which some pages exist, and of the others it is known that they do not."""

    def __init__(self, spans, present):
        super().__init__(spans)
        self.present = set(present)

    def resident(self, start, end):
        for first, last, is_present in self.survey(start, end):
            if is_present:
                yield first, last

    def survey(self, start, end):
        for page in range(start, end, PAGE):
            yield page, page + PAGE, page in self.present


def pages_of(spans):
    return [page for start, size, _, _ in spans for page in range(start, start + size, PAGE)]


def trimmed(core, memory, budget, limit=32 << 20):
    """Return the layout, its content and the dump."""
    front = read_front(core)
    selection, state = Selection(front, memory, limit), ProcessState(front)
    selection.run(state)
    beyond = Nearby(selection, state, budget)
    beyond.run()
    content = Content(selection.pieces, selection.vital_pieces, beyond.untouched)
    order = Trimmed(front, content, PAGE)
    return order, content, order.head + b"".join(piece for _, _, piece in content.pieces)


def core_file(tmp_path, dump):
    (tmp_path / "dump").write_bytes(dump)
    return CoreFile(tmp_path / "dump")


def note_of(dump):
    (content,) = [content for owner, _, content in dump.notes() if owner == OWNER]
    version, count, end = struct.unpack_from("<IIQ", content)
    assert (version, len(content)) == (1, 16 + 16 * count)
    return end, list(struct.iter_unpack("<QQ", content[16:]))


def assert_partition(core, dump, dropped):
    """Every byte of the kernel's core is kept, dropped, or a header without content; none is two of these."""
    for row in core.loads:
        covered = [(piece.address, piece.address + piece.memory) for piece in dump.loads if piece.memory]
        inside = sorted(
            (max(start, row.address), min(end, row.address + row.memory))
            for start, end in [*covered, *dropped]
            if start < row.address + row.memory and end > row.address
        )
        at = row.address
        for start, end in inside:
            assert start == at
            at = end
        assert at == row.address + row.memory


def assert_content(dump):
    for piece in dump.loads:
        if piece.size:
            assert dump.data[piece.offset : piece.offset + piece.size] == content_of(
                piece.address, piece.size
            )


def assert_readable_by_elfutils(dump):
    """elfutils continues with the next header, and drops the bytes it has if that header has a lower offset."""
    for row, following in zip(dump.loads, dump.loads[1:], strict=False):
        assert following.size or following.offset >= row.offset + row.size


def test_trimmed_dump_holds_the_vital_part_and_what_pointers_lead_to(tmp_path):
    far = (0x7F0000000000, 0x400000, 0x400000, 6)
    spans = [*SPANS, far]
    stack = SPANS[3][0] + 0x2010
    memory = Held(spans, words={stack // 8 * 8 + 64: far[0] + 0x200010})
    order, content, dump = trimmed(kernel_core(spans, status(stack)), memory, 0)
    assert order.vital_end == order.length == len(dump), "no budget: the vital part alone"
    assert content.vital_pieces == len(content.pieces)
    order, content, dump = trimmed(kernel_core(spans, status(stack)), memory, 0x40000)
    read = core_file(tmp_path, dump)
    end, dropped = note_of(read)
    assert end == order.vital_end < order.length == len(dump)
    assert any(piece.address <= far[0] + 0x204000 - PAGE < piece.address + piece.size for piece in read.loads)
    assert sum(len(each) for _, _, each in content.pieces) <= 0x40000
    assert dropped == order.dropped
    assert order.dropped_bytes == sum(size for _, size, _, _ in spans) - sum(row.size for row in read.loads)


def test_memory_that_nobody_touched_keeps_a_header_and_dropped_memory_has_none(tmp_path):
    big = (0x7F0000000000, 0x100000, 0x100000, 6)
    spans = [*SPANS, big]
    present = set(pages_of(SPANS)) | set(range(big[0] + 0x80000, big[0] + 0xC0000, PAGE))
    core = kernel_core(spans, status(SPANS[3][0] + 0x2010) + ALL_FILES)
    order, _, dump = trimmed(core, Sparse(spans, present), 0)
    (tmp_path / "kernel").write_bytes(core)
    read = core_file(tmp_path, dump)
    empty = [(row.address, row.memory) for row in read.loads if not row.size]
    assert empty == [(big[0], 0x80000), (big[0] + 0xC0000, 0x40000)]
    assert (big[0] + 0x80000, big[0] + 0xC0000) in order.dropped
    assert_partition(CoreFile(tmp_path / "kernel"), read, order.dropped)


@pytest.mark.parametrize(
    "files",
    [
        note(0x46494C45, struct.pack("<5Q", 1, PAGE, 0x7F0000000000, 0x7F0000001000, 0) + b"/dev/zero\0"),
        note(0x46494C45, struct.pack("<5Q", 2, PAGE, 1, 2, 0) + b"/f\0"),
        b"",
    ],
    ids=["shared or of a file", "list is not complete", "no list"],
)
def test_absent_pages_that_may_hold_data_are_dropped_not_zero(tmp_path, files):
    big = (0x7F0000000000, 0x100000, 0x100000, 6)
    spans = [*SPANS, big]
    core = kernel_core(spans, status(SPANS[3][0] + 0x2010) + files)
    order, _, dump = trimmed(core, Sparse(spans, pages_of(SPANS)), 0)
    assert [row for row in core_file(tmp_path, dump).loads if not row.size] == []
    assert (big[0], big[0] + big[1]) in order.dropped


def test_absent_pages_of_the_vdso_are_not_zeros(tmp_path):
    vdso = (0x7F0000000000, 2 * PAGE, 2 * PAGE, 5)
    spans = [*SPANS, vdso]
    vector = note(6, struct.pack("<2Q", 33, vdso[0]))
    core = kernel_core(spans, status(SPANS[3][0] + 0x2010) + vector + ALL_FILES)
    _, _, dump = trimmed(core, Sparse(spans, [*pages_of(SPANS), vdso[0]]), 0)
    assert [(row.address, row.size) for row in core_file(tmp_path, dump).loads if row.flags == 5] == [
        (vdso[0], 2 * PAGE)
    ]


def test_memory_that_the_kernel_left_out_keeps_its_header(tmp_path):
    spans = [(FIRST, PAGE, 5 * PAGE, 5), *SPANS[1:], (0x7F0000000000, 0, 7 * PAGE, 5)]
    core = kernel_core(spans, status(SPANS[3][0] + 0x2010))
    order, _, dump = trimmed(core, Held(spans), 0)
    (tmp_path / "kernel").write_bytes(core)
    read = core_file(tmp_path, dump)
    assert (0x7F0000000000, 0, 7 * PAGE) in [(row.address, row.size, row.memory) for row in read.loads]
    assert_partition(CoreFile(tmp_path / "kernel"), read, order.dropped)


def test_process_that_was_killed_while_it_was_read_is_noticed():
    class Killed(Held):
        def read(self, address, size):
            return super().read(address, size) if self.reads < 4 else b""

    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    for memory, was_killed in ((Held(SPANS), False), (Killed(SPANS), True)):
        front = read_front(core)
        selection, state = Selection(front, memory, 1 << 20), ProcessState(front)
        selection.run(state)
        beyond = Nearby(selection, state, 1 << 20)
        beyond.run()
        assert beyond.was_killed == was_killed


def test_readers_learn_what_was_dropped():
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    order, _, dump = trimmed(core, Held(SPANS), 0)
    read = read_core(Forward(io.BytesIO(dump).read, 1 << 30))
    assert read.dropped == order.dropped != []
    assert read.expected_bytes == order.length
    assert read.where(order.dropped[0][0], 8) is None


LINUX = note(
    0x46494C45,
    struct.pack("<5Q", 1, PAGE, 1 << 40, (1 << 40) + PAGE, 0) + b"/lib/x86_64-linux-gnu/libc.so.6\0",
)
"""The note by which lldb recognizes a core of Linux."""
READERS = {
    "gdb": (["gdb", "-nx", "-batch", "-c", "CORE", "-ex", "x/gx ADDRESS"], "Cannot access memory"),
    "lldb": (["lldb", "--batch", "-c", "CORE", "-o", "memory read -s8 -c1 -fx ADDRESS"], "does not contain"),
    "drgn": (
        [
            str(Path(sys.executable).parent / "drgn"),
            "-q",
            "-c",
            "CORE",
            "-e",
            "print('0x%016x' % prog.read_u64(ADDRESS))",
        ],
        "FaultError",
    ),
}
"""The command that prints a word of memory, and a part of its answer where the memory is missing."""


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(command[0]) is None, reason=f"needs {name}"))
        for name, (command, _) in READERS.items()
    ],
)
def test_debuggers_report_dropped_memory_and_never_show_other_bytes(tmp_path, reader):
    kept, dropped, untouched = 0x7F0000000000, 0x7F0000001000, 0x7F0000002000
    notes = status(kept) + note(6, struct.pack("<4Q", 6, PAGE, 0, 0)) + LINUX
    front = read_front(kernel_core([(kept, 4 * PAGE, 4 * PAGE, 6)], notes))
    content = content_of(kept, PAGE)
    order = Trimmed(front, Content([(1, kept, content)], 1, [(1, untouched, untouched + PAGE)]), PAGE)
    (tmp_path / "core").write_bytes(order.head + content)
    command, missing = READERS[reader]

    def ask(address):
        words = [
            word.replace("CORE", str(tmp_path / "core")).replace("ADDRESS", hex(address)) for word in command
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr

    assert "0x00007f0000000000" in ask(kept)
    assert missing in ask(dropped)
    told = ask(untouched)
    assert ("0x0000000000000000" in told) == (reader == "gdb")
    assert (missing in told) == (reader != "gdb"), (
        "they report what the file does not hold, even if it is known"
    )


@pytest.mark.parametrize("count", [65_540])
def test_more_ranges_than_the_header_can_count_stay_readable(tmp_path, count):
    spans = [(FIRST + number * 2 * PAGE, PAGE, PAGE, 6) for number in range(count)]
    front = read_front(kernel_core(spans, note(1, b"x")))
    pieces = [(index, spans[index - 1][0], content_of(spans[index - 1][0], PAGE)) for index in (1, count)]
    order = Trimmed(front, Content(pieces, 1, [(9, spans[8][0], spans[8][0] + PAGE)]), PAGE)
    read = core_file(tmp_path, order.head + pieces[0][2] + pieces[1][2])
    assert [(row.address, row.size) for row in read.loads] == [
        (spans[0][0], PAGE),
        (spans[8][0], 0),
        (spans[-1][0], PAGE),
    ]
    everything = [(index, start, start + PAGE) for index, (start, _, _, _) in enumerate(spans, 1)]
    order = Trimmed(front, Content([], 0, everything), PAGE)
    assert len(core_file(tmp_path, order.head).loads) == count


def test_pieces_that_lie_or_overlap_are_refused():
    front = read_front(kernel_core(SPANS, note(1, b"x")))
    for pieces in (
        [(1, FIRST - PAGE, bytes(PAGE))],
        [(1, FIRST, bytes(PAGE)), (1, FIRST, bytes(PAGE))],
        [(1, FIRST + 0x7000, bytes(2 * PAGE))],
    ):
        with pytest.raises(UnsupportedError):
            Trimmed(front, Content(pieces, 0, []), PAGE)


def test_pages_that_alternate_make_no_more_headers_than_a_debugger_bears(tmp_path, monkeypatch):
    monkeypatch.setattr(nearby, "MAX_UNTOUCHED", 4)
    big = (0x7F0000000000, 64 * PAGE, 64 * PAGE, 6)
    spans = [*SPANS, big]
    odd = range(big[0] + PAGE, big[0] + big[1] - 8 * PAGE, 2 * PAGE)
    core = kernel_core(spans, status(SPANS[3][0] + 0x2010) + ALL_FILES)
    order, _, dump = trimmed(core, Sparse(spans, [*pages_of(SPANS), *odd]), 0)
    empty = [row for row in core_file(tmp_path, dump).loads if not row.size]
    assert len(empty) == 4
    assert max(row.memory for row in empty) == 8 * PAGE, "the largest keep theirs"
    assert len(order.dropped) > 4


@pytest.mark.parametrize("wide", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_kept_every_byte_is_accounted_for(tmp_path_factory, wide, data):
    spans, pages = data.draw(any_segments())
    core = kernel_core(spans, note(1, b"x"), wide=wide, machine=3)
    some = st.lists(st.sampled_from(pages), unique=True) if pages else st.just([])
    kept, zeros = data.draw(some), data.draw(some)
    pieces = [(index, page, content_of(page, PAGE)) for index, page in kept]
    untouched = [(index, page, page + PAGE) for index, page in zeros]
    vital = data.draw(st.integers(0, len(pieces)))
    order = Trimmed(read_front(core), Content(pieces, vital, untouched), PAGE)
    dump = order.head + b"".join(piece for _, _, piece in pieces)
    assert len(dump) == order.length
    assert order.vital_end == len(order.head) + vital * PAGE
    directory = tmp_path_factory.getbasetemp()
    (directory / "kernel").write_bytes(core)
    read = core_file(directory, dump)
    assert_content(read)
    assert_partition(CoreFile(directory / "kernel"), read, order.dropped)
    assert_readable_by_elfutils(read)
    assert sum(row.size for row in read.loads) == PAGE * len(pieces)

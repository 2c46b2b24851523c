"""The order of large dumps, on cores made here: what is vital, where everything lies, and what hostile input does."""

import contextlib
import struct
import tempfile
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.corepair import CoreFile, assert_same_memory

from core_dump_format import front as fronts
from core_dump_format.front import UnsupportedError, front_bytes, read_front
from core_dump_format.pages import Pages
from core_dump_format.reorder import Reordered
from core_dump_format.state import ProcessState
from core_dump_format.vital import Selection

PAGE = 4096
FIRST = 0x10000


def note(kind, content, owner=b"CORE\0"):
    return (
        struct.pack("<III", len(owner), len(content), kind)
        + owner
        + bytes(-len(owner) % 4)
        + content
        + bytes(-len(content) % 4)
    )


def status(sp, tls=0, pc=0):
    """Return the NT_PRSTATUS of a thread on x86-64."""
    registers = [0] * 27
    registers[16], registers[19], registers[21] = pc, sp, tls
    return note(1, bytes(112) + struct.pack("<27Q", *registers) + bytes(8))


def content_of(address, size):
    """Return memory whose every page differs."""
    return b"".join(struct.pack("<Q", page) * (PAGE // 8) for page in range(address, address + size, PAGE))


def kernel_core(spans, notes=b"", *, wide=True, machine=62, extra=()):
    """Return a core as the kernel writes it.

    Args:
        spans: (address, bytes in the core, bytes in memory, flags) of each segment, in the kernel's order.
        notes: the content of PT_NOTE.
        extra: (type, content) of segments behind the memory.
    """
    header, row = (64, 56) if wide else (52, 32)
    count = 1 + len(spans) + len(extra)
    notes_at = header + row * count
    data_at = -(-(notes_at + len(notes)) // PAGE) * PAGE

    def pack(kind, flags, offset, address, size, memory, alignment):
        if wide:
            return struct.pack("<IIQQQQQQ", kind, flags, offset, address, 0, size, memory, alignment)
        return struct.pack("<8I", kind, offset, address, 0, size, memory, flags, alignment)

    rows, at, memory = [pack(4, 0, notes_at, 0, len(notes), 0, 0)], data_at, []
    for address, size, whole, flags in spans:
        rows.append(pack(1, flags, at, address, size, whole, PAGE))
        memory.append(content_of(address, size))
        at += size
    for kind, content in extra:
        rows.append(pack(kind, 0, at, FIRST, len(content), 0, 0))
        memory.append(content)
        at += len(content)
    many = count >= 0xFFFF
    fields = (4, machine, 1, 0, header, at if many else 0, 0, header, row, min(count, 0xFFFF))
    fields += ((64 if wide else 40), 1, 0) if many else (0, 0, 0)
    word = "Q" if wide else "I"
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    head = ident + struct.pack(f"<HHI{word * 3}IHHHHHH", *fields) + b"".join(rows) + notes
    section = b""
    if many:
        section = struct.pack("<IIQQQQIIQQ" if wide else "<10I", 0, 0, 0, 0, 0, 1, 0, count, 0, 0)
    return head + bytes(data_at - len(head)) + b"".join(memory) + section


class Held(Pages):
    """The memory of a process that holds what its core holds, and more."""

    def __init__(self, spans, missing=(), words=None):
        self.spans, self.missing, self.words, self.reads = list(spans), set(missing), words or {}, 0

    def read(self, address, size):
        self.reads += 1
        for start, held, _, _ in self.spans:
            if start <= address < start + held:
                size = min(size, start + held - address)
                first = address // PAGE * PAGE
                for page in range(first, address + size, PAGE):
                    if page in self.missing:
                        size = max(0, page - address)
                        break
                data = bytearray(content_of(first, address - first + size))
                for place, value in self.words.items():
                    if first <= place <= first + len(data) - 8:
                        struct.pack_into("<Q", data, place - first, value)
                return bytes(data[address - first :][:size])
        return b""

    def resident(self, start, end):
        yield start, end


def assemble(core, order, pieces):
    """Return the dump: the new head, the vital pieces, and what is kept of the kernel's stream."""
    parts, at = [order.head, *(content for _, _, content in pieces)], 0
    for length, is_kept in order.runs():
        parts.append(core[at : at + length] if is_kept else b"")
        at += length
    return b"".join(parts)


def select(core, memory, limit=32 << 20):
    front = read_front(core)
    selection = Selection(front, memory, limit)
    selection.run(ProcessState(front))
    return front, selection


def assert_reordered(tmp_path, core, front, pieces):
    order = Reordered(front, pieces, PAGE)
    dump = assemble(core, order, pieces)
    assert len(dump) == order.length
    (tmp_path / "kernel").write_bytes(core)
    (tmp_path / "dump").write_bytes(dump)
    assert_same_memory(tmp_path / "kernel", tmp_path / "dump")
    return dump


SPANS = [(FIRST + number * 0x10000, 0x8000, 0x8000, 6) for number in range(6)]


def test_crashing_threads_stack_comes_first_and_all_memory_is_there_once(tmp_path):
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010) + status(SPANS[1][0] + 0x100))
    front, selection = select(core, Held(SPANS))
    assert selection.is_whole
    assert selection.pieces[0][1] == SPANS[3][0] + 0x1000
    dump = assert_reordered(tmp_path, core, front, selection.pieces)
    assert (
        content_of(SPANS[3][0] + 0x1000, PAGE) in dump[: Reordered(front, selection.pieces, PAGE).vital_end]
    )


def test_stack_that_has_overflowed_lies_above_its_stack_pointer():
    core = kernel_core(SPANS, status(SPANS[3][0] - 0x3000))
    _, selection = select(core, Held(SPANS))
    assert selection.pieces[0][1] == SPANS[3][0]


def test_segments_sorted_by_size_are_written_by_address(tmp_path):
    spans = sorted(SPANS, key=lambda span: span[0] % 7)
    spans[0] = (spans[0][0], 0x3000, 0x5000, 5)
    core = kernel_core(spans, status(spans[0][0] + 0x100))
    front, selection = select(core, Held(spans))
    assert_reordered(tmp_path, core, front, selection.pieces)


@pytest.mark.parametrize("count", [65_533, 65_535])
def test_more_segments_than_the_header_can_count_stay_readable(tmp_path, count):
    spans = [(FIRST + number * 2 * PAGE, PAGE, PAGE, 6) for number in range(count - 1)]
    spans[5] = (spans[5][0], 0, PAGE, 6)
    big = (spans[-1][0] + 2 * PAGE, 8 * PAGE, 9 * PAGE, 6)
    core = kernel_core([*spans[:-1], big], status(big[0] + 5 * PAGE))
    front, selection = select(core, Held([big]))
    assert_reordered(tmp_path, core, front, selection.pieces)


def test_tags_behind_the_memory_stay_there(tmp_path):
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010), extra=[(0x70000002, bytes(range(256)) * 16)])
    front, selection = select(core, Held(SPANS))
    dump = assert_reordered_with_tags(core, front, selection.pieces)
    assert dump.endswith(bytes(range(256)) * 16)
    assert CoreFile(write(tmp_path, dump)).rows[-1].offset == len(dump) - 4096


def write(tmp_path, dump):
    (tmp_path / "dump").write_bytes(dump)
    return tmp_path / "dump"


def assert_reordered_with_tags(core, front, pieces):
    order = Reordered(front, pieces, PAGE)
    dump = assemble(core, order, pieces)
    assert len(dump) == order.length
    return dump


def test_page_that_cannot_be_read_is_left_where_the_kernel_puts_it(tmp_path):
    core = kernel_core(SPANS, status(SPANS[3][0] + 0x2010))
    missing = SPANS[3][0] + 0x4000
    front, selection = select(core, Held(SPANS, {missing}))
    assert all(not start <= missing < start + len(content) for _, start, content in selection.pieces)
    assert any(start == missing + PAGE for _, start, _ in selection.pieces), "the next page is vital"
    assert_reordered(tmp_path, core, front, selection.pieces)


@pytest.mark.parametrize(
    "pieces",
    [
        [(1, FIRST - PAGE, bytes(2 * PAGE))],
        [(1, FIRST + 0x7000, bytes(2 * PAGE))],
        [(1, FIRST, bytes(2 * PAGE)), (1, FIRST + PAGE, bytes(PAGE))],
    ],
)
def test_pieces_beyond_their_segment_or_over_each_other_are_refused(pieces):
    front = read_front(kernel_core(SPANS, status(FIRST)))
    with pytest.raises(UnsupportedError):
        Reordered(front, pieces, PAGE)


def test_segments_with_a_gap_between_them_are_refused():
    core = bytearray(kernel_core(SPANS, status(FIRST)))
    offset_of_third = 64 + 3 * 56 + 8
    (offset,) = struct.unpack_from("<Q", core, offset_of_third)
    struct.pack_into("<Q", core, offset_of_third, offset + PAGE)
    with pytest.raises(UnsupportedError, match="do not follow one another"):
        read_front(core)


def test_vital_part_without_refused_pages_is_partial():
    memory = Held(SPANS)
    memory.refused = 1
    _, selection = select(kernel_core(SPANS, status(SPANS[3][0] + 0x2010)), memory)
    assert selection.pieces
    assert not selection.is_whole


def test_windows_shrink_before_a_thread_is_left_out():
    stacks = [(FIRST + number * 0x100000, 0x80000, 0x80000, 6) for number in range(200)]
    core = kernel_core(stacks, b"".join(status(start + 0x200, start + 0x7F000) for start, _, _, _ in stacks))
    _, selection = select(core, Held(stacks), 8 << 20)
    held = {start // 0x100000 for _, start, _ in selection.pieces}
    assert len(held) == 200
    assert sum(len(content) for _, _, content in selection.pieces) <= 8 << 20


def test_more_threads_than_pages_are_a_partial_vital_part():
    stacks = [(FIRST + number * 0x100000, 0x2000, 0x2000, 6) for number in range(600)]
    core = kernel_core(stacks, b"".join(status(start + 0x200) for start, _, _, _ in stacks))
    _, selection = select(core, Held(stacks), 1 << 20)
    assert not selection.is_whole
    assert sum(len(content) for _, _, content in selection.pieces) <= 1 << 20


def auxv(**values):
    keys = {"phdr": 3, "phnum": 5, "vdso": 33}
    return note(6, b"".join(struct.pack("<QQ", keys[key], value) for key, value in values.items()))


def loader(base, links):
    """Return words of memory: program headers at `base`, a dynamic section, r_debug, and the list of link_maps."""
    words = {base: 6, base + 16: 0, base + 56: 2, base + 72: 0x800, base + 96: 32}
    words |= {base + 0x800: 21, base + 0x808: base + 0xC00, base + 0xC00: 1, base + 0xC08: links[0]}
    for link, following in zip(links, [*links[1:], links[0]], strict=True):
        words |= {link: 0, link + 8: link + 0x200, link + 16: link + 0x400, link + 24: following}
    return words


def test_list_of_libraries_that_loops_is_walked_once():
    span = (FIRST, 0x100000, 0x100000, 6)
    links = [FIRST + 0x10000 + number * 0x2000 for number in range(50)]
    memory = Held([span], words=loader(FIRST, links))
    core = kernel_core([span], status(FIRST + 0xFF000) + auxv(phdr=FIRST, phnum=2))
    _, selection = select(core, memory)
    assert selection.pieces[0][1] == FIRST + 0xFF000 - PAGE, "the crashing thread's stack comes first"
    for link in links:
        assert any(start <= link < start + len(content) for _, start, content in selection.pieces)
    assert memory.reads < 1000


def test_pages_that_name_frames_are_in_the_order_of_their_addresses():
    """elfutils does not read a page if the adjacent next one has a lower offset."""
    spans = [(FIRST, 0x100000, 0x100000, 6), (0x7F0000000000, 0x2000, 0x2000, 5)]
    links = [FIRST + 0x10000 + number * PAGE for number in range(50)][::-1]
    memory = Held(spans, words=loader(FIRST, links))
    crashed = status(FIRST + 0xFF000, tls=FIRST + 0x5F000, pc=spans[1][0] + 0x1800)
    core = kernel_core(spans, crashed + auxv(phdr=FIRST, phnum=2, vdso=spans[1][0]))
    _, selection = select(core, memory)
    addresses = [start for _, start, _ in selection.pieces[1:]]
    named = addresses[: addresses.index(spans[1][0]) + 1]
    assert named == sorted(named)
    assert len(named) > len(links)
    assert not any(start == spans[1][0] + PAGE for start in addresses), "the vdso is in one piece"


def test_list_of_libraries_that_points_anywhere_costs_no_other_thread():
    spans = [(FIRST, 0xC00000, 0xC00000, 6), (0x7F0000000000, 0x10000, 0x10000, 6)]
    links = [FIRST + 0x10000 + number * 0x1000 for number in range(3000)]
    memory = Held(spans, words=loader(FIRST, links))
    threads = status(FIRST + 0xBF0000) + status(spans[1][0] + 0x100)
    core = kernel_core(spans, threads + auxv(phdr=FIRST, phnum=2))
    _, selection = select(core, memory, 4 << 20)
    assert any(start == spans[1][0] for _, start, _ in selection.pieces)


LIES = [
    note(6, b"\xff" * 64),
    note(6, struct.pack("<4Q", 3, 2**64 - 1, 5, 2**64 - 1)),
    note(0x46494C45, struct.pack("<QQ", 2**63, PAGE)),
    note(0x46494C45, struct.pack("<QQQQQ", 1, PAGE, 5, 4, 0)),
    note(0x46494C45, b"\1"),
    note(0x401, b""),
    note(0x200, bytes(7)),
    note(1, b"short"),
    struct.pack("<III", 2**32 - 1, 2**32 - 1, 1),
    struct.pack("<III", 5, 2**31, 1) + b"CORE\0\0\0\0",
    status(2**64 - 1, 2**64 - 1, 2**64 - 1),
]


@pytest.mark.parametrize("lie", LIES)
def test_notes_that_lie_cost_no_memory_of_the_dump(tmp_path, lie):
    core = kernel_core(SPANS, status(SPANS[0][0] + 0x100) + lie + status(SPANS[2][0] + 0x100))
    front, selection = select(core, Held(SPANS))
    assert_reordered(tmp_path, core, front, selection.pieces)


@st.composite
def any_segments(draw):
    """Draw the spans of some segments, in any order, and the pages that their core holds, with their segments."""
    gap = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2))
    filled = gap.filter(lambda each: each[1] + each[2])
    spans, at = [], FIRST
    for skip, size, beyond in draw(st.lists(filled, min_size=1, max_size=12)):
        at += skip * PAGE
        spans.append((at, size * PAGE, (size + beyond) * PAGE, 6))
        at += (size + beyond) * PAGE
    if draw(st.booleans()):
        spans = draw(st.permutations(spans))
    pages = [
        (index, page)
        for index, (start, size, _, _) in enumerate(spans, 1)
        for page in range(start, start + size, PAGE)
    ]
    return spans, pages


@pytest.mark.parametrize("wide", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pieces_of_any_segments_make_the_same_memory(wide, data):
    spans, pages = data.draw(any_segments())
    core = kernel_core(spans, note(1, b"x"), wide=wide, machine=3)
    front = read_front(core)
    chosen = data.draw(st.lists(st.sampled_from(pages), unique=True)) if pages else []
    pieces = [(index, address, content_of(address, PAGE)) for index, address in chosen]
    with tempfile.TemporaryDirectory() as directory:
        if pages:
            assert_reordered(Path(directory), core, front, pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6), st.integers(0, 9000))
def test_damaged_front_is_refused_or_keeps_every_byte(changes, size):
    core = bytearray(kernel_core(SPANS, status(SPANS[3][0] + 0x2010) + auxv(phdr=FIRST, phnum=3)))
    for at, value in changes:
        core[at] = value
    try:
        needed = front_bytes(core[:size])
        if needed > size:
            return
        front, selection = select(core[:size], Held(SPANS))
        order = Reordered(front, selection.pieces, PAGE)
    except (UnsupportedError, struct.error):
        return
    dump = assemble(core, order, selection.pieces)
    assert (
        len(dump) - order.vital_end + sum(len(c) for _, _, c in selection.pieces)
        >= len(core) - front.data_offset
    )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_anything_else_is_refused(data):
    for head in (data, b"\x7fELF\2\1\1" + data, b"\x7fELF\1\1\1" + data):
        with contextlib.suppress(UnsupportedError):
            assert front_bytes(head) > len(head)


def test_a_million_segments_are_refused_at_once():
    started = time.process_time()
    head = bytearray(kernel_core([], b""))
    struct.pack_into("<H", head, 56, 0xFFFF)
    struct.pack_into("<Q", head, 64 + 8, 64 + 56 * 1_000_000)
    with pytest.raises(UnsupportedError, match=str(fronts.MAX_SEGMENTS)):
        front_bytes(head)
    assert time.process_time() - started < 1


class Wild(Held):
    """Memory that is never the same twice: half of its words are addresses of it, or close to them."""

    def __init__(self, spans, random):
        super().__init__(spans)
        self.random = random

    def read(self, address, size):
        data = bytearray(super().read(address, size))
        for at in range(0, len(data) - 7, 8):
            start, held, _, _ = self.random.choice(self.spans)
            word = self.random.choice((start + self.random.randrange(held), self.random.getrandbits(64)))
            struct.pack_into("<Q", data, at, word)
        return bytes(data)

    def resident(self, start, end):
        middle = self.random.randrange(start, end + 1, PAGE)
        for first, last in ((start, middle), (middle + PAGE, end)):
            if first < last:
                yield first, last


@settings(max_examples=30, deadline=None)
@given(st.integers(0), st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 5), max_size=5))
def test_memory_that_changes_and_points_anywhere_costs_neither_a_byte_nor_a_limit(seed, lies):
    limit = 40 * PAGE
    notes = b"".join(status(*threads) + auxv(phdr=phdr, phnum=phnum) for *threads, phdr, phnum in lies)
    stack = status(SPANS[0][0] + 0x1000, SPANS[1][0] + 0x1000, SPANS[2][0])
    files = struct.pack("<8Q", 2, PAGE, *SPANS[3][:2], 0, *SPANS[4][:2], 0) + b"/a\0/a\0"
    core = kernel_core(SPANS, stack + notes + auxv(phdr=SPANS[5][0], phnum=9) + note(0x46494C45, files))
    memory = Wild(SPANS, Random(seed))
    front, selection = select(core, memory, limit)
    assert sum(len(content) for _, _, content in selection.pieces) <= limit
    assert memory.reads < 20_000
    order = Reordered(front, selection.pieces, PAGE)
    assert len(assemble(core, order, selection.pieces)) == order.length

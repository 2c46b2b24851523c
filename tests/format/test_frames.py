"""Frames: found by unwind information, frame pointers and call instructions, bounded whatever the process contains."""

import contextlib
import os
import struct
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_dump_format.cfi import Common, Function, unwind
from core_dump_format.cursor import UnwindError
from core_dump_format.expression import evaluate
from core_dump_format.frames import Place, choose, decode, encode, find_places, own_places
from core_dump_format.machine import MACHINES, call_before, follows_system_call
from core_dump_format.objectfile import Budget, ObjectFile
from core_dump_format.runtime import is_runtime, readable
from core_dump_format.state import AARCH64, X86_64
from core_dump_format.walk import MAX_STEPS, Mapping, Process, Walk

X86, ARM = MACHINES[64, X86_64], MACHINES[64, AARCH64]
CODE, STACK = 0x40_0000, 0x7FFF_0000_0000
SOURCE = """
#include <string.h>
char *volatile nowhere; volatile long sink;
__attribute__((noinline)) long parse(const char *t) { return strlen(t) + 1; }
int main(void) { sink = parse(nowhere); return 1; }
"""


class Fake(Process):
    """A process made of pieces of memory; executable ones hold the code of files that cannot be read otherwise."""

    def __init__(self, machine, code, memory, objects=()):
        mappings = [Mapping(start, start + len(content), 0, name) for start, (name, content) in code.items()]
        super().__init__(machine, mappings)
        self.pieces = {start: content for start, (_, content) in code.items()} | memory
        self.objects = dict(objects)

    def is_code(self, address):
        return self.mapping_at(address) is not None

    def read(self, address, size):
        for start, content in self.pieces.items():
            if start <= address < start + len(content):
                return content[address - start : address - start + size]
        return b""

    def object_of(self, mapping):
        return self.objects.get(mapping.start)


def words(*values, machine=X86):
    return b"".join(value.to_bytes(machine.word_bytes, "little") for value in values)


def calls(at, target):
    """Return an x86 call of a target, which ends at an address."""
    return b"\xe8" + struct.pack("<i", target - at)


def program(*returns, size=0x1000):
    """Return code with a call before each (offset, offset of the called function)."""
    code = bytearray(b"\x90" * size)
    for at, target in returns:
        code[at - 5 : at] = calls(at, target)
    return bytes(code)


def walk(process, registers):
    return [frame.address for frame in Walk(process).run(registers)]


def test_word_counts_only_if_a_call_precedes_the_address_that_it_holds():
    code = {CODE: ("app", program((0x200, 0x100), (0x300, 0x180)))}
    stack = words(CODE + 0x250, 7, CODE + 0x200, STACK, CODE + 0x123, CODE + 0x300, 0)
    process = Fake(X86, code, {STACK: stack})
    found = walk(process, {16: CODE + 0x110, 7: STACK, 6: 0})
    assert found == [CODE + 0x110, CODE + 0x200, CODE + 0x300]


def test_frame_pointers_are_followed_where_they_hold():
    code = {CODE: ("app", program((0x200, 0x100), (0x300, 0x180), (0x400, 0x280)))}
    stack = words(CODE + 0x400, 0, STACK + 0x20, CODE + 0x200, 0, CODE + 0x300)
    process = Fake(X86, code, {STACK: stack})
    assert walk(process, {16: CODE + 0x110, 7: STACK, 6: STACK + 0x10}) == [
        CODE + 0x110,
        CODE + 0x200,
        CODE + 0x300,
    ]


def test_call_of_nothing_leads_to_its_caller():
    process = Fake(X86, {CODE: ("app", program((0x200, 0)))}, {STACK: words(CODE + 0x200)})
    assert walk(process, {16: 0, 7: STACK, 6: 0}) == [0, CODE + 0x200]


def signal_frame(machine, sp, pc, fp=0):
    """Return the words of a signal frame from the stack pointer of the handler's caller on."""
    content = bytearray(machine.mark_at + 8)
    content[machine.mark_at :] = machine.mark
    for number, value in ((machine.sp, sp), (machine.pc, pc), (machine.fp, fp)):
        at = machine.mark_at + machine.saved_at + 8 * machine.saved.index(number)
        content[at : at + 8] = value.to_bytes(8, "little")
    return bytes(content)


def test_signal_frame_leads_to_what_the_handler_interrupted():
    code = {CODE: ("app", program((0x200, 0x100), (0x300, 0x180)))}
    handler = words(0, CODE + 0x900) + signal_frame(X86, STACK + 0x8000, CODE + 0x180)
    memory = {STACK: handler, STACK + 0x8000: words(5, CODE + 0x300)}
    frames = Walk(Fake(X86, code, memory)).run({16: CODE + 0x120, 7: STACK, 6: 0})
    assert [(frame.address - CODE, frame.in_handler, frame.is_exact) for frame in frames] == [
        (0x120, True, True),
        (0x180, False, True),
        (0x300, False, False),
    ]


def test_arm_frames_follow_link_register_frame_pointer_and_signal_frame():
    def call(at, target):
        return (0x25 << 26 | (target - at + 4) // 4 & 0x3FFFFFF).to_bytes(4, "little")

    code = bytearray(0x1000)
    for at in (0x200, 0x300, 0x400):
        code[at - 4 : at] = call(at, 0x100)
    signed = 0xAB << 48
    memory = {STACK: words(STACK + 0x20, signed | CODE + 0x200, 0, 0, 0, CODE + 0x300)}
    process = Fake(ARM, {CODE: ("app", bytes(code))}, memory)
    assert walk(process, {32: CODE + 0x110, 31: STACK, 29: STACK, 30: 0})[:3] == [
        CODE + 0x110,
        CODE + 0x200,
        CODE + 0x300,
    ]
    memory = {STACK: signal_frame(ARM, STACK + 0x8000, CODE + 0x180, STACK + 0x8000)}
    memory[STACK + 0x8000] = words(0, CODE + 0x400)
    process = Fake(ARM, {CODE: ("app", bytes(code))}, memory)
    assert walk(process, {32: CODE + 0x110, 31: STACK, 29: 0, 30: 0}) == [
        CODE + 0x110,
        CODE + 0x180,
        CODE + 0x400,
    ]


@pytest.mark.parametrize(
    ("code", "target"),
    [
        ("90 90 90 e8 fb 0f 00 00", 0x1FFB),
        ("90 90 90 90 90 90 ff d0", None),
        ("90 90 90 90 90 41 ff d4", None),
        ("90 90 90 90 90 ff 50 18", None),
        ("90 90 90 90 ff 54 24 08", None),
        ("90 90 ff 15 01 02 03 04", None),
        ("90 90 ff 90 01 02 03 04", None),
        ("90 ff 94 c8 01 02 03 04", None),
    ],
)
def test_each_form_of_call_is_recognised(code, target):
    found = call_before(X86, bytes.fromhex(code), 0x1000)
    assert found is not None
    assert found.target == target


@pytest.mark.parametrize(
    "code", ["90 90 90 90 90 90 90 90", "e9 00 00 00 00 90 90 90", "90 90 90 90 90 90 ff e0", ""]
)
def test_what_is_no_call_is_not_recognised(code):
    assert call_before(X86, bytes.fromhex(code), 0x1000) is None


def test_system_call_before_the_address_means_that_the_thread_asked_for_its_signal():
    assert follows_system_call(X86, bytes.fromhex("909090909090 0f05"))
    assert follows_system_call(ARM, bytes.fromhex("00000000 010000d4"))
    assert not follows_system_call(X86, bytes(8))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A program without frame pointers, and its core as gdb would see it: a stack made by its own call."""
    directory = tmp_path_factory.mktemp("frames")
    (directory / "a.c").write_text(SOURCE)
    command = [
        "gcc",
        "-w",
        "-O2",
        "-no-pie",
        "-fomit-frame-pointer",
        "-o",
        directory / "a",
        directory / "a.c",
    ]
    subprocess.run(command, check=True)
    return directory / "a"


def test_unwind_information_and_symbols_are_read_from_the_file(built):
    content = built.read_bytes()
    found = ObjectFile(lambda offset, size: content[offset : offset + size])
    listed = subprocess.run(["nm", built], capture_output=True, text=True, check=True).stdout
    places = {line.split()[2]: int(line.split()[0], 16) for line in listed.splitlines() if " T " in line}
    for name in ("parse", "main"):
        assert found.name_at(places[name] + 2) == name.encode()
        assert found.function_start(places[name] + 2) == places[name]
    stack = {STACK + 8 * number: value for number, value in enumerate([0x1234, 0x5678])}
    function = found.function_at(places["parse"])
    caller = unwind(function, places["parse"], {7: STACK, 16: places["parse"]}, 7, stack.__getitem__)
    assert (caller[16], caller[7]) == (0x1234, STACK + 8)
    assert (
        found.build_id().hex()
        in subprocess.run(["readelf", "-n", built], capture_output=True, text=True, check=True).stdout
    )


def test_stripped_program_still_tells_where_functions_begin(built, tmp_path):
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, built], check=True)
    whole, content = built.read_bytes(), stripped.read_bytes()
    first = ObjectFile(lambda offset, size: whole[offset : offset + size])
    second = ObjectFile(lambda offset, size: content[offset : offset + size])
    main = first.address_of(0x1000) + 0x60
    assert second.function_start(main) == first.function_start(main)
    assert second.name_at(main) == b""


def test_symbols_of_all_files_share_one_budget(built):
    content = built.read_bytes()
    budget = Budget(100)
    found = ObjectFile(lambda offset, size: content[offset : offset + size], budget)
    assert found.name_at(found.address_of(0x1000) + 0x60) == b""
    assert budget.left == 100


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_hostile_file_ends_in_an_answer_or_an_error_of_its_own(built, data):
    content = bytearray(built.read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, len(content) - 8) | st.integers(0, 1000))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8)]) | st.binary(min_size=8, max_size=8)
        )
    address = data.draw(st.sampled_from([0x401000, 0x401120, 0x401030, 0, 2**64 - 1]))
    began = time.monotonic()
    with contextlib.suppress(ValueError, struct.error):
        found = ObjectFile(
            lambda offset, size: bytes(content[offset : offset + size]) if offset < 1 << 63 else b""
        )
        found.name_at(address)
        found.build_id()
        stack = os.urandom(4096)
        process = Fake(X86, {0x401000: ("a", bytes(0x1000))}, {STACK: stack}, {0x401000: found})
        Walk(process).run(dict.fromkeys(range(16), STACK) | {16: address})
    assert time.monotonic() - began < 10


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=64), st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_hostile_unwind_programs_end(common, program, address):
    with contextlib.suppress(UnwindError):
        shared = Common(b"\1zR\0\1\x78\x10\1\x1b" + common)
        function = Function(shared, struct.pack("<iI", 0, 0x1000) + b"\0" + program, 0)
        unwind(function, address % 0x1000, dict.fromkeys(range(17), address), 7, lambda at: at ^ address)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_hostile_expressions_end(content):
    with contextlib.suppress(UnwindError):
        assert 0 <= evaluate(content, dict.fromkeys(range(17), 2**63), lambda at: at) < 2**64


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.integers(0, 2**64 - 1) | st.integers(STACK, STACK + 4096) | st.just(CODE + 0x200), max_size=500
    )
)
def test_hostile_stacks_end(values):
    for machine in (X86, ARM):
        stack = words(*values) + machine.mark
        process = Fake(machine, {CODE: ("app", program((0x200, 0x100)))}, {STACK: stack, STACK - 4096: stack})
        registers = dict.fromkeys(range(33), STACK) | {machine.pc: CODE + 0x110}
        assert len(Walk(process).run(dict(registers))) <= MAX_STEPS
        find_places(process, registers, has_files=False)


def test_frames_that_only_carry_out_a_death_are_marked():
    assert is_runtime("libc.so.6", "strlen")
    assert is_runtime("app", "core::panicking::panic_fmt")
    assert is_runtime("app", "runtime.gopanic")
    assert not is_runtime("app", "main.index")
    assert not is_runtime("libcurl.so.4", "curl_easy_perform")


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (b"parse", "parse"),
        (b"_ZN4core9panicking9panic_fmt17h0123456789abcdefE", "core::panicking::panic_fmt"),
        (b"_ZN12_GLOBAL__N_15parseEPKc", "_GLOBAL__N_1::parse"),
        (b"_ZN4nodeL5AbortEv", "node::Abort"),
        (b"_ZSt9terminatev", "std::terminate"),
        (b"_RNvNtCsjrHSEGnQ3l9_3std7process5abort", "std::process::abort"),
        (b"_RNCNvNtCs1_3std9panicking13panic_handler0B5_", "std::panicking::panic_handler::closure"),
        (b"main.(*square).area", "main.(*square).area"),
        (b"_Z", "_Z"),
        (b"_ZN99999999999", "9999999"),
        (b"a b\xff\n=", "a_b__="),
    ],
)
def test_symbols_are_readable(symbol, name):
    assert readable(symbol) == name


PLACES = [
    Place("libc.so.6", 0x8AEEC, "", is_runtime=True),
    Place("libc.so.6", 0x26472, "abort", is_runtime=True),
    Place("app", 0x1226, "parse"),
    Place("app", 0x1300, "main"),
]


def test_frames_survive_their_text():
    text = encode(PLACES)
    assert text == "~libc.so.6+0x8aeec ~+0x26472=abort app+0x1226=parse +0x1300=main"
    places, is_deep = decode(text)
    assert [place.text() for place in places] == [place.text() for place in PLACES]
    assert not is_deep
    assert own_places(places, is_deep=False) == ["app+0x1226", "app+0x1300"]


def test_names_give_way_before_frames_do():
    text = encode(PLACES, limit=60)
    assert text == "~libc.so.6+0x8aeec ~+0x26472=abort app+0x1226=parse +0x1300"
    assert own_places(decode(text)[0], is_deep=False) == ["app+0x1226", "app+0x1300"]
    assert len(encode(PLACES, limit=20)) <= 20


def test_unfinished_recursion_is_one_group_wherever_it_ended():
    def overflow(first, turns):
        places = [Place("app", 0x10 + first)]
        return places + [Place("app", (0x100, 0x200)[(first + turn) % 2]) for turn in range(turns)]

    one, other = (own_places(choose(overflow(n, 20 + n), is_deep=True), is_deep=True) for n in (0, 1))
    assert one == other == ["app+0x100", "app+0x200"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_decoded(text):
    places, _ = decode(text)
    assert all(len(place.where) <= 400 for place in places)

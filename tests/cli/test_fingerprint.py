"""Fingerprints: pure, bounded, never an exception for what is in a core."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import cores

from core_dump_collector.fingerprint import fingerprint, fingerprint_of_attributes, fingerprint_of_file
from core_dump_format.core import read_build_ids, read_core
from core_dump_format.elf import NotACoreError
from core_dump_format.stream import Forward
from core_dumps.where import where

EXE, LIB, STACK = 0x5000_0000_0000, 0x7000_0000_0000, 0x7FFF_0000_0000
BUILD_ID = bytes(range(20))
SHAPE = cores.Shape()


def first_page():
    """Return an ELF header page with a build ID."""
    told = SHAPE.note(3, BUILD_ID, owner=b"GNU\0")
    return (SHAPE.header(count=1, kind=3) + SHAPE.row(cores.PT_NOTE, 4, 120, 120, len(told)) + told).ljust(
        4096, b"\0"
    )


def core(*, slide=0, pc=0x1234, signal=11, stack=(), fp=0, tid=7, gap=0, exe_path=b"/usr/bin/app"):
    """Return a core of one thread; `slide` moves everything, as address space randomisation does."""
    exe, lib, sp = EXE + slide, LIB + slide, STACK + slide
    notes = SHAPE.status(tid, signal, [(16, exe + pc), (19, sp), (4, fp and sp + fp)])
    notes += SHAPE.note(cores.AUXV, SHAPE.words(9, exe + 0x1000, 0, 0))
    notes += SHAPE.files((exe, exe + 0x4000, 0, exe_path), (lib, lib + 0x4000, 0, b"/usr/lib/libc.so.6"))
    notes += SHAPE.note(cores.SIGINFO, SHAPE.ints(signal, 0, 1, 0) + SHAPE.words(0))
    bases = {"exe": exe, "lib": lib, "sp": sp, "": 0}
    words = SHAPE.words(*(bases[base] + value for base, value in stack))
    segments = [(exe, first_page(), 5, 0x4000), (lib, b"", 5, 0x4000), (sp, words, 6, 0x10000)]
    rows = SHAPE.row(cores.PT_NOTE, 0, 64 + 56 * 4, 0, len(notes))
    body = b""
    for address, content, flags, size in segments:
        rows += SHAPE.row(cores.PT_LOAD, flags, 4096 + len(body), address, len(content), size)
        body += content + (bytes(gap) if flags == 5 else b"")
    return (SHAPE.header(count=4) + rows + notes).ljust(4096, b"\0") + body


def of(content, **bounds):
    return fingerprint(io.BytesIO(content).read, **bounds)


CALLERS = [("exe", 0x2000), ("", 5), ("lib", 0x3000), ("sp", 8)]


def test_same_crash_has_the_same_fingerprint_at_other_addresses():
    found = of(core(stack=CALLERS))
    assert found.build_id == BUILD_ID.hex()
    assert found.frames == "app+0x1234 app+0x2000"
    assert of(core(stack=CALLERS, slide=0x7654_3000, tid=99)) == found


def test_another_place_signal_or_caller_is_another_crash():
    crashes = [
        core(stack=CALLERS),
        core(stack=CALLERS, pc=0x1238),
        core(stack=CALLERS, signal=6),
        core(stack=CALLERS[2:]),
    ]
    assert len({of(crash).id for crash in crashes}) == len(crashes)


def test_program_replaced_while_it_ran_gives_the_same_fingerprint():
    assert of(core(stack=CALLERS, exe_path=b"/usr/bin/app (deleted)")) == of(core(stack=CALLERS))


def test_frame_pointers_win_over_words_that_lie_about():
    chain = [("exe", 0x3F00), ("sp", 32), ("exe", 0x2222), ("", 0), ("sp", 48), ("exe", 0x1111), ("", 0)]
    chain += [("exe", 0x3333)]
    assert of(core(stack=chain, fp=8)).frames == "app+0x1234 app+0x2222 app+0x1111 app+0x3333"


def test_bound_costs_frames_and_not_the_fingerprint():
    far = core(stack=CALLERS, gap=1_000_000)
    assert of(far, most_bytes=500_000).frames == "app+0x1234"
    assert of(far).frames == "app+0x1234 app+0x2000"


@pytest.mark.parametrize("compress", [lambda content: content, gzip.compress], ids=["raw", "gzip"])
def test_dump_on_disk_is_read_without_moving_the_descriptor(tmp_path, compress):
    content = core(stack=CALLERS, gap=3_000_000)
    path = tmp_path / "dump"
    path.write_bytes(compress(content))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert fingerprint_of_file(descriptor) == of(content)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    finally:
        os.close(descriptor)


def test_damaged_gzip_gives_what_lies_before_the_damage(tmp_path):
    packed = gzip.compress(core(stack=CALLERS) + os.urandom(2_000_000))
    path = tmp_path / "dump.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with path.open("rb") as file:
        assert fingerprint_of_file(file.fileno()) == of(core(stack=CALLERS))


def test_deadline_holds_against_a_stream_without_end():
    began = time.monotonic()
    endless = io.BytesIO(core(gap=1 << 20)[:-1])
    assert fingerprint(lambda n: endless.read(n) or bytes(4096), seconds=0.2, most_bytes=1 << 60) is not None
    assert time.monotonic() - began < 5


def test_what_is_no_core_has_none():
    assert of(b"") is None
    assert of(b"\x7fELF") is None
    assert of(b"no core at all" * 100) is None
    assert of(core()[:300]) is None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_lying_cores_never_raise(data):
    content = bytearray(core(stack=CALLERS))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(content), 1400) - 8))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 8]) | st.binary(min_size=8, max_size=8)
        )
    cut = data.draw(st.integers(0, len(content)))
    of(bytes(content[:cut]))
    source = Forward(io.BytesIO(bytes(content)).read, 1 << 30)
    with contextlib.suppress(NotACoreError):
        read_build_ids(read_core(source), source)


FRAMES = "~libc.so.6+0x8aeec ~+0x26472=abort app+0x1226=parse +0x1300=main"


def known(**fields):
    return fingerprint_of_attributes({"exe": "/usr/bin/app", "signal": 6, "frames": FRAMES} | fields)


def test_frames_of_the_helper_make_the_fingerprint_and_no_dump_is_read():
    found = known(build_id=BUILD_ID.hex(), machine="x86-64")
    assert found.frames == "~libc.so.6+0x8aeec ~libc.so.6+0x26472=abort app+0x1226=parse app+0x1300=main"
    assert found.fields()["fingerprint_version"] == 2
    assert found.fields()["build_id"] == BUILD_ID.hex()
    assert fingerprint_of_attributes({"exe": "/usr/bin/app"}) is None
    assert fingerprint_of_attributes({"frames": "no frame at all"}) is None


def test_c_library_and_names_do_not_change_the_fingerprint():
    same = known(frames="~libc.so.6+0x1111 app+0x1226 app+0x1300")
    assert same.id == known().id
    others = [known(frames="app+0x1227 +0x1300"), known(signal=11), known(exe="/usr/bin/other")]
    assert len({known().id, *(other.id for other in others)}) == 4


def test_where_is_the_first_frame_of_the_program_itself():
    assert where(FRAMES) == "parse (app+0x1226) < main"
    assert where("~libc.so.6+0x8aeec ~+0x26472=abort") == "libc.so.6+0x8aeec < abort"
    assert where("app+0x10=f +0x20=f ...") == "f (app+0x10) < f < ..."
    assert where("app+0x1234 app+0x2000") == "app+0x1234 < app+0x2000"
    assert where("") == ""


def test_fingerprints_of_two_versions_are_two_groups(cli, gz):
    for number, more in enumerate([{}, {"fingerprint_version": 2}]):
        fields = {"exe": "/usr/bin/app", "signal": 11, "fingerprint": "ab" * 8, "frames": FRAMES}
        cli.put(f"n/core-app-177200000{number}-5-11.gz", gz(b"x"), fields | more)
    done = cli.run("list", "--group")
    assert done.stdout.count("abababababababab") == 2
    assert "fingerprints of versions 1 and 2" in done.stderr
    assert "parse (app+0x1226) < main" in done.stdout
    info = cli.run("info", "--json=short", "pid=5", "core-app-1772000001-5-11.gz")
    assert '"fingerprint_version": 2' in info.stdout

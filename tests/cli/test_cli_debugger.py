"""What a debugger is given: a core that cannot steer the terminal, the right program, and nothing that runs code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.collector import wait_until
from tests.support.cores import AARCH64, AUXV, PRPSINFO, PRSTATUS, Shape, build
from tests.support.front import Reply, cut, error, front
from tests.support.gdb import crash

from core_dump_format.stream import Seekable
from core_dumps import debuginfod
from core_dumps.buildid import read_build_id
from core_dumps.neutral import neutralise, without_controls
from core_dumps.wanted import read_modules

NAME = "node-7/core-app-1700000001-1-11.gz"
PROGRAM = os.path.realpath(sys.executable)
STEER = b"\x1b]0;owned\x07\x1b[31m\xc2\x9b2J\xe2\x80\xae"
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")


def process_note(shape, name, arguments):
    return shape.note(PRPSINFO, bytes(40) + name.ljust(16, b"\0")[:16] + arguments.ljust(80, b"\0")[:80])


def hostile_core(gz):
    shape = Shape()
    path = b"/bin/" + STEER
    files = shape.files((0x400000, 0x401000, 0, path))
    status = shape.note(PRSTATUS, bytes(12) + b"\x0b" + bytes(19) + b"\x01" + bytes(303))
    notes = status + process_note(shape, STEER, b"app " + STEER) + files
    return gz(build(shape, notes, [(0x400000, bytes(4096), True)]))


def test_controls_become_question_marks_and_nothing_moves():
    for text in (b"plain", "b\u00f6rse\u65e5".encode(), b"a\0b\0"):
        assert without_controls(text) == text
    changed = without_controls(STEER + b"\0x")
    assert len(changed) == len(STEER) + 2
    assert changed.endswith(b"\0x")
    assert changed.replace(b"\0", b"").decode().isprintable()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lying_core_is_not_fatal_and_only_its_controls_change(tmp_path, data):
    content = bytearray(hostile_core(bytes))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, 900))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 8]) | st.binary(min_size=8, max_size=8)
        )
    path = tmp_path / "core"
    path.write_bytes(content)
    with path.open("rb") as file:
        neutralise(str(path), Seekable(file.fileno()))
    changed = path.read_bytes()
    assert len(changed) == len(content)
    assert all(new in {old, ord("?")} for new, old in zip(changed, content, strict=True))
    read_modules(str(path), None, [])


@needs_gdb
def test_names_and_arguments_of_a_process_cannot_steer_the_terminal(cli, gz):
    cli.put(NAME, hostile_core(gz))
    done = cli.run(
        "debug",
        "-A",
        "-batch -ex 'info proc' -ex 'info files'",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert "app ?]0;owned" in said
    assert not set("\x1b\x07\x9b\u202e") & set(said)


@needs_gdb
def test_gdb_runs_no_script_of_the_working_directory(cli, gz, tmp_path):
    cli.put(NAME, hostile_core(gz))
    (tmp_path / ".gdbinit").write_text("set auto-load safe-path /\n")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / ".gdbinit").write_text(f"shell touch {tmp_path}/ran\n")
    done = cli.run(
        "debug", "-A", "-batch -ex 'show libthread-db-search-path'", cwd=cwd, stdin=subprocess.DEVNULL
    )
    assert not (tmp_path / "ran").exists()
    assert "$sdir" in done.stdout
    assert "$pdir" not in done.stdout


def entry_of(path):
    with open(path, "rb") as file:
        return struct.unpack_from("<Q", file.read(64), 24)[0]


@pytest.fixture
def without_files(tmp_path):
    """A core of PROGRAM without NT_FILE, as the kernel writes it if the list is over 4 MiB."""
    shape, base = Shape(), 0x555555554000
    with open(PROGRAM, "rb") as file:
        page = file.read(4096)
    position_independent = struct.unpack_from("<H", page, 16)[0] == 3
    base = base if position_independent else 0x400000
    entry = base + entry_of(PROGRAM) if position_independent else entry_of(PROGRAM)
    notes = shape.status(1) + shape.note(AUXV, shape.words(9, entry))
    path = tmp_path / "core"
    path.write_bytes(build(shape, notes, [(base, page, True)]))
    return str(path)


def test_program_is_found_without_the_list_of_mapped_files(without_files, tmp_path):
    assert read_build_id(PROGRAM)
    found = read_modules(without_files, PROGRAM, [])
    assert found.executable.build_id == read_build_id(PROGRAM)
    assert found.executable.found == PROGRAM
    assert not found.has_files
    other = read_modules(without_files, "/bin/sh", [])
    assert other.executable.found != "/bin/sh", "another program has another build ID"


def test_program_that_was_replaced_is_found_below_a_sysroot(tmp_path):
    shape = Shape()
    with open(PROGRAM, "rb") as file:
        page = file.read(4096)
    mapped = shape.files((0x400000, 0x401000, 0, b"/srv/app (deleted)"))
    core = tmp_path / "core"
    core.write_bytes(build(shape, shape.status(1) + mapped, [(0x400000, page, True)]))
    place = tmp_path / "root" / "srv" / "app"
    place.parent.mkdir(parents=True)
    place.symlink_to("/real")
    (tmp_path / "root" / "real").write_bytes(Path(PROGRAM).read_bytes())
    found = read_modules(str(core), None, [str(tmp_path / "root")])
    assert found.executable.found == str(tmp_path / "root" / "real")


@needs_gdb
def test_every_sysroot_reaches_gdb(cli, gz, tmp_path):
    build_directory = tmp_path / "built"
    build_directory.mkdir()
    (build_directory / "lib.c").write_text("void die(volatile int *at) { *at = 1; }\n")
    (build_directory / "main.c").write_text("void die(volatile int *);\nint main() { die(0); }\n")
    compile_ = ["gcc", "-g", "-O0", "-o"]
    library, program = build_directory / "libdie.so", build_directory / "app"
    subprocess.run([*compile_, library, build_directory / "lib.c", "-shared", "-fPIC"], check=True)
    link = [program, build_directory / "main.c", library, f"-Wl,-rpath,{build_directory}"]
    subprocess.run([*compile_, *link], check=True)
    core = tmp_path / "core"
    crash(program, core)
    cli.put(NAME, gz(core.read_bytes()), {"bytes": core.stat().st_size})
    for root, file in (("one", program), ("two", library)):
        place = tmp_path / root / str(file).lstrip("/")
        place.parent.mkdir(parents=True)
        file.rename(place)
    done = cli.run("bt", "--sysroot", tmp_path / "one", "--sysroot", tmp_path / "two")
    assert re.search(r"#0 .* die .*lib\.c:1", done.stdout)
    assert re.search(r"#1 .* main .*main\.c:2", done.stdout)


def fake(directory, name, frame):
    """Put a debugger into a directory that prints its name and a frame."""
    program = directory / name
    program.write_text(f"#!/bin/sh\necho '{frame}'\necho 'this is {name}'\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def tools(cli, tmp_path):
    """A directory in front of PATH."""
    directory = tmp_path / "tools"
    directory.mkdir()
    cli.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
    return directory


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the foreign machine is AArch64")
def test_core_of_another_machine_is_named_and_opened_with_gdb_multiarch(cli, gz, tools):
    shape = Shape(machine=AARCH64)
    cli.put(NAME, gz(build(shape, shape.status(1), [(0x400000, bytes(4096), True)])))
    assert "Machine: aarch64" in cli.run("info").stdout
    fake(tools, "gdb", "#0  0x0 in ?? ()")
    done = cli.run("bt", code=1)
    assert "this core is of aarch64" in done.stderr
    assert "gdb-multiarch" in done.stderr
    fake(tools, "gdb-multiarch", "#0  0x1 in main ()")
    assert "this is gdb-multiarch" in cli.run("bt").stdout


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("#0  0x0000000000001234 in ?? ()", 1),
        ("#0  <unavailable> in ?? ()", 1),
        ("#1  <signal handler called>", 1),
        ("no frames at all", 1),
        ("#2  0x0000000000001234 in <T as core::any::Any>::type_id () at a.rs:3", 0),
        ("#1  0x0000000000001234 in die (at=0x0) at a.c:3", 0),
        ("#0  main () at a.c:3", 0),
        ("    frame #0: 0x1234 app`main at a.c:3", 0),
    ],
)
def test_backtrace_without_a_resolved_address_is_a_failure(cli, gz, tools, frame, code):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    fake(tools, "gdb", frame)
    done = cli.run("bt", code=code)
    assert ("no address could be resolved" in done.stderr) == bool(code)


def test_cache_that_cannot_be_made_is_named_with_its_setting(cli, gz, tools, tmp_path):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    fake(tools, "gdb", "#0  main ()")
    (tmp_path / "file").touch()
    cli.environ["CORE_DUMPS_CACHE"] = str(tmp_path / "file" / "cache")
    assert "set CORE_DUMPS_CACHE" in cli.run("bt", code=2).stderr
    cli.environ["CORE_DUMPS_CACHE"] = str(tmp_path / "file")
    assert "set CORE_DUMPS_CACHE" in cli.run("bt", code=2).stderr
    del cli.environ["CORE_DUMPS_CACHE"]
    cli.environ["XDG_CACHE_HOME"] = "relative"
    cli.run("bt")
    assert not (tmp_path / "relative").exists()
    assert list((tmp_path / ".cache" / "core-dumps").glob("*.core"))


def test_file_that_the_user_names_is_used_with_a_warning(cli, gz, tools):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    (tools / "gdb").write_text("#!/bin/sh\necho '#0  main ()'\necho \"$@\"\n")
    (tools / "gdb").chmod(0o755)
    done = cli.run("bt", "--exe", "/bin/sh")
    assert "--exec=/bin/sh" in done.stdout
    assert "nothing proves that /bin/sh is the executable" in done.stderr
    assert "--exe" in cli.run("bt", "--exe", "/nowhere", code=2).stderr


def test_backtrace_begins_with_its_first_thread(cli, gz, tools):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    lines = ["[New LWP 7]", "Core was generated by x.", "#0  main ()", "Thread 1 (LWP 7):"]
    script = "".join(f"echo '{line}'\n" for line in lines) + "printf '#0  main () at a.c:3\\n\\tx\\n'\n"
    (tools / "gdb").write_text(f"#!/bin/sh\n{script}")
    (tools / "gdb").chmod(0o755)
    assert cli.run("bt").stdout == "Thread 1 (LWP 7):\n#0  main () at a.c:3\n        x\n"


def test_ctrl_c_is_for_the_debugger_alone(cli, gz, tools, tmp_path):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    script = "#!/bin/sh\ntrap 'echo interrupted' INT\ntouch ready\nwhile [ ! -e go ]; do sleep 0.05; done\nexit 7\n"
    (tools / "gdb").write_text(script)
    (tools / "gdb").chmod(0o755)
    command = [sys.executable, "-m", "core_dumps.cli", "debug"]
    options = {"env": cli.variables(), "cwd": tmp_path, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, process_group=0, **options) as process:
        wait_until((tmp_path / "ready").exists, 30, "the debugger")
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        (tmp_path / "go").touch()
        assert process.wait(30) == 7


def test_all_threads_are_counted(cli, gz):
    shape = Shape()
    notes = b"".join(shape.status(number) for number in range(1, 6002))
    cli.put(NAME, gz(build(shape, notes, [(0x400000, bytes(4096), True)])))
    text = cli.run("info").stdout
    assert "6001 threads" in text
    assert "and 5937 more" in text


@pytest.mark.parametrize(
    ("reply", "seconds", "found"),
    [
        (lambda body: Reply(200, body), 60, True),
        (lambda body: cut(Reply(200, body), len(body) - 1), 60, False),
        (lambda body: Reply(200, body), 0, False),
        (lambda _: error(404, "NotFound", "no"), 60, False),
    ],
    ids=["whole", "cut", "late", "unknown"],
)
def test_executable_of_a_debuginfod_server_is_used_only_if_it_is_whole_and_in_time(
    tmp_path, monkeypatch, reply, seconds, found
):
    monkeypatch.setattr(debuginfod, "DOWNLOAD_SECONDS", seconds)
    body = Path(PROGRAM).read_bytes()
    known = read_build_id(PROGRAM)
    with front("http://unused", lambda _: reply(body)) as server:
        monkeypatch.setenv("DEBUGINFOD_URLS", server)
        path = debuginfod.debuginfod(known, str(tmp_path))
    assert (path is not None) == found
    assert os.listdir(tmp_path) == ([f"{known}.executable"] if found else [])


def test_debuginfod_server_that_does_not_answer_is_not_asked_for_each_library(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("DEBUGINFOD_URLS", address)
        monkeypatch.setattr(debuginfod, "TIMEOUT_SECONDS", 0.2)
        monkeypatch.setattr(debuginfod, "FETCHERS", 2)
        assert debuginfod.fetch_all([f"{number:040x}" for number in range(50)], str(tmp_path)) == {}
    assert 1 <= capsys.readouterr().err.count(address) <= 2


def test_endless_backtrace_is_written_as_it_comes(cli, gz, tools, tmp_path):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    (tools / "gdb").write_text("#!/bin/sh\nwhile echo 'Thread 1 (LWP 7):'; do :; done\n")
    (tools / "gdb").chmod(0o755)
    command = [sys.executable, "-m", "core_dumps.cli", "bt"]
    options = {
        "env": cli.variables(),
        "cwd": tmp_path,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
    }
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline() == b"Thread 1 (LWP 7):\n"
        process.stdout.close()
        assert process.wait(30) == 141

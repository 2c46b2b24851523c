"""Backtraces without gdb: drgn reads the same tree."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli_debugger import tools  # noqa: F401  a fixture
from tests.cli.test_cli_modules import NAME, Crashed, frames, needs_gdb
from tests.support.cores import I386, Shape, build
from tests.support.gdb import crash

from core_dumps import buildid
from core_dumps import tools as choice
from core_dumps.errors import UsageError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("drgn") is None, reason="drgn has wheels only for Linux on x86-64"
)
DEEP = "int deep(int n) { volatile char b[64]; b[0] = n; return deep(n + 1) + b[0]; }\n"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    if shutil.which("gdb") is None:
        pytest.skip("needs gdb: apt-get install gdb")
    return Crashed(tmp_path_factory.mktemp("crashed"))


def functions(lines):
    """Return number, address, function and line of each frame; both debuggers print these."""
    form = re.compile(r"#(\d+) +(?:0x([0-9a-f]+) in )?(\S+) \(.*\) at (?:.*/)?([^/ ]+)$")
    return [form.match(line).groups() for line in lines]


@needs_gdb
def test_backtrace_has_the_functions_and_lines_of_gdb(crashed, cli, monkeypatch):
    monkeypatch.setattr(buildid.Search, "find", lambda _, module: module)  # this machine has the C library
    crashed.put(cli)
    done = cli.run("bt", "--debugger", "drgn")
    assert re.match(r"Thread 1 \(LWP \d+\):\n#0  0x", done.stdout)
    assert [(number, *rest) for number, _, *rest in functions(frames(done.stdout))] == [
        (number, *rest) for number, _, *rest in functions(crashed.backtrace)
    ]
    assert "missing" not in done.stderr


@needs_gdb
def test_program_without_build_id_is_used_under_its_name(cli, tmp_path):
    crashed = Crashed(tmp_path, "-Wl,--build-id=none")
    crashed.put(cli)
    text = cli.run("bt", "--debugger", "drgn").stdout
    assert re.search(r"#0 .* in die \(\) at .*lib\.c:1\n#1 .* in main \(\) at .*main\.c:2\n", text)


def test_drgn_is_taken_where_gdb_is_missing_and_a_note_says_so(cli, gz, monkeypatch):
    cli.put(NAME, gz(build(Shape(), Shape().status(1), [(0x400000, bytes(4096), True)])))
    cli.environ["PATH"] = "/nowhere"
    done = cli.run("bt", code=1)
    assert "gdb is not installed: using drgn" in done.stderr
    assert "no address could be resolved" in done.stderr
    assert "#0  0x" in done.stdout
    assert "gdb, drgn, lldb, eu-stack or the path of one" in cli.run("bt", "--debugger", "gdb", code=2).stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install drgn" in cli.run("bt", code=2).stderr
    assert "drgn is not installed" in cli.run("bt", "--debugger", "drgn", code=2).stderr
    monkeypatch.undo()
    assert "/nowhere/drgn is not installed" in cli.run("bt", "--debugger", "/nowhere/drgn", code=2).stderr
    for debugger in ("drgn", str(Path(sys.executable).parent / "drgn")):
        assert "drgn takes none" in cli.run("bt", "--debugger", debugger, "-A", "x", code=2).stderr


def test_debugger_is_chosen_in_one_order(tools, monkeypatch):  # noqa: F811
    for program in ("lldb", "eu-stack", "gdb"):
        (tools / program).write_text("#!/bin/sh\n")
        (tools / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    assert choice.choose(None, str) == "gdb"
    (tools / "gdb").unlink()
    assert choice.choose(None, str) == "drgn"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choice.choose(None, str) == "lldb"
    (tools / "lldb").unlink()
    assert choice.choose(None, str) == "eu-stack"
    (tools / "eu-stack").unlink()
    with pytest.raises(UsageError, match="install gdb"):
        choice.choose(None, str)


@needs_gdb
def test_nothing_of_the_working_directory_is_imported(crashed, cli, tmp_path):
    crashed.put(cli)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for name in ("drgn.py", "json.py", "core_dumps.py", "sitecustomize.py"):
        (cwd / name).write_text("import pathlib; pathlib.Path('ran').touch()\n")
    assert "in main ()" in cli.run("bt", "--debugger", "drgn", cwd=cwd).stdout
    script = "-e 'print(prog.crashed_thread().stack_trace())'"
    cli.run("debug", "--debugger", "drgn", "-A", script, cwd=cwd)
    assert not (cwd / "ran").exists()


@needs_gdb
@pytest.mark.parametrize("debugger", ["gdb", "drgn", "lldb", "eu-stack"])
def test_stack_overflow_ends_with_a_note_in_every_debugger(cli, tmp_path, debugger):
    if debugger != "drgn" and shutil.which(debugger) is None:
        pytest.skip(f"needs {debugger}")
    (tmp_path / "deep.c").write_text(DEEP + "int main(void) { return deep(0); }\n")
    program, core = tmp_path / "deep", tmp_path / "core"
    subprocess.run(["gcc", "-g", "-O0", "-w", "-o", program, tmp_path / "deep.c"], check=True)
    crash(program, core)
    cli.put(NAME.removesuffix(".gz"), core.read_bytes(), {"bytes": core.stat().st_size})
    lines = cli.run("bt", "--debugger", debugger).stdout.splitlines()
    assert lines[-1] == "(more frames follow; a backtrace has at most 256 of a thread)"
    assert "#255" in lines[-2]
    assert len(re.findall(r"^ *(?:\* )?(?:frame )?#\d+", "\n".join(lines), re.MULTILINE)) == 256


@needs_gdb
def test_name_that_is_no_text_is_escaped_and_costs_no_frame(cli, tmp_path):
    """The program chooses the bytes of a name; the bytes of a library's path depend on the locale of its user."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    sources = {
        "lib": "int die(int *at) { return *at; }",
        "odd": "int die(); int die_BAD() { return die(0) + 1; }",
    }
    sources["main"] = "int die_BAD();\nint main(void) { return die_BAD() + 1; }"
    lib, odd, main = (tmp_path / f"{name}.c" for name in sources)
    for path, text in zip((lib, odd, main), sources.values(), strict=True):
        path.write_text(text)
    program, core, library = tmp_path / "app", tmp_path / "core", folder + b"/libdie.so"
    link = ["-o", program, main, tmp_path / "odd.o", library, b"-Wl,-z,now,-rpath," + folder]
    for words in (
        ["-shared", "-fPIC", "-o", library, lib],
        ["-c", "-o", tmp_path / "odd.o", odd],
        ["-g", *link],
    ):
        subprocess.run(["gcc", "-w", "-O0", *words], check=True)
    crash(program, core)
    program.write_bytes(program.read_bytes().replace(b"die_BAD", b"d\xff\x1b[31m"))
    cli.put(NAME.removesuffix(".gz"), core.read_bytes(), {"bytes": core.stat().st_size})
    cli.environ["PYTHONIOENCODING"] = "ascii"
    done = cli.run("bt", "--debugger", "drgn")
    first, second, third = frames(done.stdout)[:3]
    assert re.search(r"^#0 .* in \?\? \(\) from .*\\xff/libdie\.so$", first)
    assert re.search(r"^#1 .* in d\\xff\\x1b\[31m \(\) from .*/app$", second)
    assert re.search(r"^#2 .* in main \(\) at .*main\.c:2$", third)


def test_core_that_drgn_cannot_read_is_one_line(cli, gz, tmp_path):
    shape = Shape(bits=32, machine=I386)
    cli.put(NAME, gz(build(shape, shape.status(1), [(0x400000, bytes(4096), True)])))
    done = cli.run("bt", "--debugger", "drgn", code=1)
    assert "Traceback" not in done.stdout + done.stderr
    command = [sys.executable, "-P", "-m", "core_dumps.drgnstacks", os.devnull, str(tmp_path), "", "", "9"]
    done = subprocess.run(command, capture_output=True, text=True, env=cli.variables(), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"drgn: .*\n", done.stderr)


@needs_gdb
def test_json_has_the_lines_of_each_thread(crashed, cli):
    crashed.put(cli)
    (found,) = json.loads(cli.run("bt", "--debugger", "drgn", "--json=short").stdout)
    assert (found["debugger"], found["problem"]) == ("drgn", None)
    (thread,) = found["backtrace"]
    assert re.fullmatch(r"Thread 1 \(LWP \d+\)", thread["thread"])
    assert [line[:2] for line in thread["frames"]] == ["#0", "#1"]

"""What docs/languages.md says about each language, tried: `make test-programs`, which installs the languages."""

import os
import subprocess
import sys
import zipfile

import pytest
from tests.kernel.conftest import attributes, core_of
from tests.support import pystack
from tests.support.collector import wait_until
from tests.support.fetched import write_by_address

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(300),
]
GO = """
package main

func inner(p *int) int { return *p }

func main() { println(inner(nil)) }
"""
JAVA = """
public class Crash {
    static void inner() throws Exception {
        var field = sun.misc.Unsafe.class.getDeclaredField("theUnsafe");
        field.setAccessible(true);
        ((sun.misc.Unsafe) field.get(null)).putAddress(0, 1);
    }
    public static void main(String[] arguments) throws Exception { inner(); }
}
"""
DOTNET = """
class Crash {
    static void inner() { throw new System.InvalidOperationException("x"); }
    static void Main() { inner(); }
}
"""
DOTNET_VERSION = """{"runtimeOptions": {
  "framework": {"name": "Microsoft.NETCore.App", "version": "3.1.0"},
  "configProperties": {"System.Globalization.Invariant": true}
}}"""
NODE = "function inner() { throw new Error('x') } inner()"
PYTHON = "import ctypes\ndef inner():\n    ctypes.string_at(0)\ninner()\n"
RUST = """
#[inline(never)]
fn inner(values: &[u32], at: usize) -> u32 { values[at] }
fn main() { println!("{}", inner(&[1, 2], std::env::args().count() + 4)); }
"""


def said_by(*command, **how):
    """Return what a program prints, its errors included."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120, **how
    )
    return done.stdout


def run(node, *command, name, **how):
    """Run a program to its end and return what it prints."""
    process = node.start(
        *command,
        name=name,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=node.directory,
        **how,
    )
    return process.communicate(timeout=120)[0]


def core(node):
    """Return the path of the core in the only dump, as `core-dumps get` writes it."""
    wait_until(lambda: [name for name in node.names() if not name.endswith(".partial")], 120, "the dump")
    node.settle()
    assert attributes(node.dump()).get("truncated") is None
    path = node.directory / "core"
    write_by_address(core_of(node.dump()), path)
    return path


def test_go_dumps_with_gotraceback_and_delve_names_the_function(node):
    (node.directory / "crash.go").write_text(GO)
    program = node.directory / "crashgo"
    environment = os.environ | {"GOCACHE": str(node.directory / "cache")}
    subprocess.run(
        ["go", "build", "-o", program, "crash.go"], cwd=node.directory, env=environment, check=True
    )
    with node.installed():
        run(node, program, name=b"crashgo")
        node.settle()
        assert not node.names(), "by default, Go prints the goroutines and exits"
        run(node, program, name=b"crashgo", env=environment | {"GOTRACEBACK": "crash"})
        path = core(node)
    told = said_by(
        "dlv", "core", program, path, "--allow-non-terminal-interactive=true", input="stack 30\nquit\n"
    )
    assert "in main.main" in told


def test_java_prints_its_report_and_jhsdb_reads_the_dump(node):
    (node.directory / "Crash.java").write_text(JAVA)
    subprocess.run(["javac", "-nowarn", "Crash.java"], cwd=node.directory, check=True, capture_output=True)
    with node.installed():
        report = run(node, "java", "-XX:+ErrorFileToStdout", "Crash", name=b"java")
        path = core(node)
    assert "Native frames" in report
    assert "Crash.inner()V" in report
    executable = os.path.realpath("/usr/bin/java")
    assert "- Crash.inner()" in said_by("jhsdb", "jstack", "--exe", executable, "--core", path)


def test_node_dumps_an_uncaught_exception_if_told_to(node):
    with node.installed():
        run(node, "node", "-e", NODE, name=b"node")
        node.settle()
        assert not node.names(), "by default, Node prints the exception and exits"
        run(node, "node", "--abort-on-uncaught-exception", "-e", NODE, name=b"node")
        path = core(node)
    told = said_by("gdb", "-nx", "-batch", "-ex", "bt", os.path.realpath("/usr/bin/node"), path)
    assert "v8::internal::Isolate::Throw" in told


def test_python_prints_its_stack_and_pystack_reads_the_dump(node):
    program, tool = pystack.PYTHON, pystack.install(node.directory)
    (node.directory / "crash.py").write_text(PYTHON)
    with node.installed():
        told = run(node, program, "-X", "faulthandler", "crash.py", name=os.path.basename(program).encode())
        path = core(node)
    assert "in inner" in told
    told = pystack.stacks(tool, path)
    assert told.count("Traceback for thread") == 1
    assert "in inner" in told
    assert "ctypes.string_at(0)" in told


def dotnet(directory):
    """Return .NET's program, from the package of Python that holds its runtime, and build crash.dll for it."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", directory, "dotnetcore2==3.1.23"], check=True)
    with zipfile.ZipFile(next(directory.glob("dotnetcore2-*.whl"))) as wheel:
        wheel.extractall(directory)
    place = directory / "dotnetcore2/bin"
    library = next(place.glob("shared/Microsoft.NETCore.App/*/System.Private.CoreLib.dll"))
    for program in (place / "dotnet", library.parent / "createdump"):
        program.chmod(0o755)
    (directory / "crash.cs").write_text(DOTNET)
    (directory / "crash.runtimeconfig.json").write_text(DOTNET_VERSION)
    compiler = ["mcs", "-nostdlib", "-noconfig", f"-r:{library}", "-out:crash.dll", "crash.cs"]
    subprocess.run(compiler, cwd=directory, check=True)
    return place / "dotnet"


def test_dotnet_prints_its_stack_dumps_and_writes_a_dump_of_its_own_if_told_to(node):
    program = dotnet(node.directory)
    own = {"COMPlus_DbgEnableMiniDump": "1", "COMPlus_DbgMiniDumpName": str(node.directory / "own")}
    with node.installed():
        told = run(node, program, "crash.dll", name=b"dotnet", env=os.environ | own)
        path = core(node)
    assert "at Crash.inner()" in told
    assert (node.directory / "own").read_bytes()[:4] == b"\x7fELF"
    assert "libcoreclr.so" in said_by("gdb", "-nx", "-batch", "-ex", "bt", program, path)


def test_rust_dumps_a_panic_if_it_aborts(node):
    (node.directory / "crash.rs").write_text(RUST)

    def build(*options):
        subprocess.run(
            ["rustc", "-C", "debuginfo=line-tables-only", *options, "-o", "crashrs", "crash.rs"],
            cwd=node.directory,
            check=True,
        )

    with node.installed():
        build()
        run(node, "./crashrs", name=b"crashrs")
        node.settle()
        assert not node.names(), "by default, a panic unwinds the thread and the process exits"
        build("-C", "panic=abort")
        run(node, "./crashrs", name=b"crashrs")
        path = core(node)
    told = said_by("gdb", "-nx", "-batch", "-ex", "bt", node.directory / "crashrs", path)
    assert "crash::inner" in told
    assert "crash.rs:3" in told

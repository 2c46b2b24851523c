"""Dumps of programs that people run, cut after their vital part: `make test-programs`, which installs them."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from tests.kernel.conftest import attributes
from tests.kernel.test_vital import (
    SOURCE,
    assert_every_cut_gives_the_backtraces,
    backtraces,
)
from tests.support import kernel
from tests.support.collector import wait_until
from tests.support.corepair import assert_same_memory

pytestmark = [
    pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs"),
    pytest.mark.timeout(600),
]
MAPS = SOURCE.with_name("maps.cpp")
PYTHON = """
import ctypes, os, threading
memory = [os.urandom(4096) for _ in range(5000)]
for _ in range(300):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
ctypes.string_at(8)
"""
JAVA = """
public class Culprit {
    static void deep(int depth) throws Exception {
        if (depth > 0) { deep(depth - 1); return; }
        System.out.println("ready");
        Thread.sleep(600000);
    }
    public static void main(String[] arguments) throws Exception {
        byte[][] memory = new byte[100][1 << 20];
        deep(30);
        System.out.println(memory.length);
    }
}
"""
NODE = "let a=[];for(let i=0;i<1e6;i++)a.push({i});function f(n){if(n)f(n-1);else process.abort()};f(10)"


def run(node, *command, name, **how):
    """Run a program until it has crashed."""
    process = node.start(*command, name=name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    process.wait(timeout=120)


def eight_threads(node):
    program = kernel.build(SOURCE, node.directory / "vital", "-pthread")
    run(node, program, "24", "8", name=b"vital")
    return program


def static_binary(node):
    program = kernel.build(SOURCE, node.directory / "vital", "-pthread", "-static")
    run(node, program, "24", "3", name=b"vital")
    return program


def binary_of_32_bits(node):
    program = kernel.build(SOURCE, node.directory / "vital", "-pthread", "-m32")
    run(node, program, "24", "3", name=b"vital")
    return program


def many_mappings(node):
    program = node.directory / "maps"
    subprocess.run(["g++", "-g", "-O1", "-w", "-o", program, MAPS], check=True)
    run(node, program, "50000", name=b"maps")
    return program


def python(node):
    run(node, "/usr/bin/python3", "-c", PYTHON, name=b"python3")
    return "/usr/bin/python3"


def node_js(node):
    run(node, "/usr/bin/node", "-e", NODE, name=b"node")
    return "/usr/bin/node"


def java(node):
    (node.directory / "Culprit.java").write_text(JAVA)
    process = node.start(
        "/usr/bin/java", "Culprit.java", name=b"java", cwd=node.directory, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGABRT)
    process.communicate(timeout=120)
    return os.path.realpath("/usr/bin/java")


def redis(node):
    socket = node.directory / "redis.sock"
    command = [
        "/usr/bin/redis-server",
        "--port",
        "0",
        "--unixsocket",
        socket,
        "--dir",
        node.directory,
        "--save",
        "",
    ]
    process = node.start(*command, name=b"redis-server", stdout=subprocess.DEVNULL)

    def send(*words):
        done = subprocess.run(
            ["redis-cli", "-s", socket, *words], capture_output=True, text=True, check=False
        )
        return done.stdout

    wait_until(lambda: "PONG" in send("ping"), 30, "Redis")
    send("debug", "populate", "300000")
    process.send_signal(signal.SIGSEGV)
    process.wait(timeout=120)
    return "/usr/bin/redis-server"


def own_namespaces(node):
    program = kernel.build(SOURCE, node.directory / "vital", "-pthread")
    node.expect(b"vital", 2)
    inside = [
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--mount",
        "--uts",
        "--fork",
        "sh",
        "-c",
        '"$@"; :',
        "sh",
    ]
    subprocess.run([*inside, program, "24", "3"], check=False, timeout=60)
    return program


def without_arguments(program, core):
    """Return backtraces without arguments: those of just-in-time compiled frames are guesses of gdb."""
    return re.sub(r"\(.*\)", "()", backtraces(program, core))


GUESSED = {java, node_js}


@pytest.mark.parametrize(
    "crash",
    [
        eight_threads, static_binary, binary_of_32_bits, many_mappings, own_namespaces,
        python, node_js, java, redis,
    ],
)  # fmt: skip
def test_program_has_every_backtrace_wherever_its_dump_is_cut(node, crash):
    with node.installed(COMPRESSOR="gzip"):
        node.keep_copy()
        program = crash(node)
        wait_until(lambda: any(not name.endswith(".partial") for name in node.names()), 200, "the dump")
        node.settle()
    found = attributes(node.dump())
    assert found["vital"] == b"whole"
    assert found["bytes"] == found["expected_bytes"]
    assert int(found["vital_bytes"]) < 10 << 20
    read = without_arguments if crash in GUESSED else backtraces
    told = assert_every_cut_gives_the_backtraces(node, program, read)
    assert told.count("\n#") > 3
    assert_same_memory(node.directory / "copy", node.directory / "core")
    if shutil.which("eu-stack"):
        assert_eu_stack_agrees(node, program)


def assert_eu_stack_agrees(node, program):
    """Compare elfutils' frames of the whole dump with those of its half."""
    core = node.directory / "core"
    command = ["eu-stack", "--core", core, "--executable", program]
    told = subprocess.run(command, capture_output=True, check=False).stdout
    os.truncate(core, core.stat().st_size // 2)
    assert subprocess.run(command, capture_output=True, check=False).stdout == told
    assert told.count(b"#") > 3

"""Programs that people run, each made to crash: `make test-programs` installs them.

Each is a generator. Its first value is the executable, for a debugger: everything is built and started by then. When
it is resumed, the program crashes; when it is closed, the program's server ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import kernel
from tests.support.cleanup import temporary_directory
from tests.support.collector import wait_until

SUPPORT = Path(__file__).parent
INNER_PIDS = {2}
"""Of processes in namespaces of their own."""
NO_OUTPUT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
PYTHON = """
import ctypes, os, threading
memory = [os.urandom(4096) for _ in range(5000)]
threading.stack_size(512 << 10)
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
NGINX = """
daemon off;
user root;
worker_processes 1;
error_log DIRECTORY/error.log;
pid DIRECTORY/nginx.pid;
events { worker_connections 100000; }
http { access_log off; server { listen unix:DIRECTORY/nginx.sock; } }
"""
PAGE = "data:text/html,<script>let a=[];for(let i=0;i<1e6;i++)a.push({i});document.title='ready'</script>"


def crash_now(node: Any, culprit: Callable[[Any], Iterator[Path]]) -> Path:
    """Crash a program at once; return the path of the executable when the kernel has written its core."""
    steps = culprit(node)
    program = next(steps)
    next(steps)
    for process in node.started:
        process.wait(timeout=300)
    killed = [pid for _, pid in node.crashes if pid not in INNER_PIDS]
    wait_until(lambda: all(is_gone(pid) for pid in killed), 300, "the core")
    steps.close()  # type: ignore[attr-defined]  # a generator
    return program


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, whether its parent has noticed or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def run(node: Any, *command: object, name: bytes, **how: Any) -> None:
    """Start a program that crashes of its own accord."""
    node.start(*node.inside, *command, name=name, **NO_OUTPUT, **how)


def kill(node: Any, pid: int, number: int = signal.SIGSEGV) -> None:
    """Crash a running process."""
    node.expect(Path(f"/proc/{pid}/comm").read_bytes()[:-1], pid)
    os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Return the pids of the children of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


@contextlib.contextmanager
def server(*command: object, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server; it and its children are killed at the end."""
    process = subprocess.Popen(
        [str(word) for word in command], start_new_session=True, **{**NO_OUTPUT, **how}
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def eight_threads(node: Any, *flags: str, arguments: tuple[str, ...] = ("24", "8")) -> Iterator[Path]:
    """Crash a C program with eight threads."""
    program = kernel.build(SUPPORT / "vital.c", node.directory / "vital", "-pthread", *flags)
    yield program
    run(node, program, *arguments, name=b"vital")
    yield program


def static_binary(node: Any) -> Iterator[Path]:
    """Crash a program without shared libraries."""
    return eight_threads(node, "-static", arguments=("24", "3"))


def binary_of_32_bits(node: Any) -> Iterator[Path]:
    """Crash an i386 program."""
    return eight_threads(node, "-m32", arguments=("24", "3"))


def own_namespaces(node: Any) -> Iterator[Path]:
    """Crash a process that is PID 2 of its own namespaces."""
    program = kernel.build(SUPPORT / "vital.c", node.directory / "vital", "-pthread")
    yield program
    node.expect(b"vital", 2)
    spaces = ["--user", "--map-root-user", "--pid", "--mount", "--uts", "--fork"]
    run(node, "unshare", *spaces, "sh", "-c", '"$@"; :', "sh", program, "24", "3", name=b"unshare")
    yield program


def run_cpp(node: Any, name: str, argument: str) -> Iterator[Path]:
    """Build and run a C++ program that crashes of its own accord."""
    program: Path = node.directory / name
    subprocess.run(["g++", "-g", "-O1", "-w", "-o", program, SUPPORT / f"{name}.cpp"], check=True)
    yield program
    run(node, program, argument, name=name.encode())
    yield program


def cpp(node: Any) -> Iterator[Path]:
    """Crash a C++ program by an exception."""
    return run_cpp(node, "throw", "30")


def many_mappings(node: Any) -> Iterator[Path]:
    """Crash a C++ program with 50,000 mappings."""
    return run_cpp(node, "maps", "50000")


def golang(node: Any) -> Iterator[Path]:
    """Crash a Go program."""
    program: Path = node.directory / "culprit"
    caches = {"GOCACHE": str(node.directory / "go"), "GOFLAGS": "-mod=mod", "HOME": str(node.directory)}
    command: list[Any] = ["/usr/bin/go", "build", "-o", program, SUPPORT / "culprit.go"]
    subprocess.run(command, check=True, env=os.environ | caches)
    yield program
    run(node, program, name=b"culprit", env=os.environ | {"GOTRACEBACK": "crash"})
    yield program


def rust(node: Any) -> Iterator[Path]:
    """Crash a Rust program."""
    program: Path = node.directory / "culprit"
    command: list[Any] = [
        shutil.which("rustc"),
        "-g",
        "-O",
        "-C",
        "panic=abort",
        "-o",
        program,
        SUPPORT / "culprit.rs",
    ]
    subprocess.run(command, check=True)
    yield program
    run(node, program, name=b"culprit")
    yield program


def python(node: Any) -> Iterator[Path]:
    """Crash CPython with 300 threads."""
    yield Path("/usr/bin/python3")
    run(node, "/usr/bin/python3", "-c", PYTHON, name=b"python3")
    yield Path("/usr/bin/python3")


def node_js(node: Any) -> Iterator[Path]:
    """Crash Node."""
    yield Path("/usr/bin/node")
    run(node, "/usr/bin/node", "-e", NODE, name=b"node")
    yield Path("/usr/bin/node")


def java(node: Any) -> Iterator[Path]:
    """Crash OpenJDK."""
    (node.directory / "Culprit.java").write_text(JAVA)
    command = [*node.inside, "/usr/bin/java", "-Xmx256m", "Culprit.java"]
    process = node.start(
        *command, name=b"java", cwd=node.directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    yield Path(os.path.realpath("/usr/bin/java"))
    process.send_signal(signal.SIGABRT)
    yield Path(os.path.realpath("/usr/bin/java"))


@contextlib.contextmanager
def redis_server(node: Any) -> Iterator[tuple[int, Callable[..., str]]]:
    """Run Redis with 300,000 keys; yield its pid and a function that sends it a command."""
    socket = node.directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", socket, "--dir", node.directory, "--save", ""]
    options += ["--enable-debug-command", "yes"]
    with server(*node.inside, "/usr/bin/redis-server", *options) as process:

        def send(*words: str) -> str:
            command: list[Any] = ["redis-cli", "-s", socket, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return str(done.stdout)

        wait_until(lambda: "PONG" in send("ping"), 30, "Redis")
        assert "OK" in send("debug", "populate", "300000")
        yield process.pid, send


def redis(node: Any) -> Iterator[Path]:
    """Crash Redis."""
    with redis_server(node) as (pid, _):
        yield Path("/usr/bin/redis-server")
        kill(node, pid)
        yield Path("/usr/bin/redis-server")


def redis_child(node: Any) -> Iterator[Path]:
    """Crash the child that writes a snapshot of Redis."""
    with redis_server(node) as (pid, send):
        send("config", "set", "rdb-key-save-delay", "1000000")
        send("bgsave")
        wait_until(lambda: children(pid), 30, "the child")
        yield Path("/usr/bin/redis-server")
        kill(node, children(pid)[0])
        yield Path("/usr/bin/redis-server")


def nginx(node: Any) -> Iterator[Path]:
    """Crash a worker of nginx."""
    config = node.directory / "nginx.conf"
    config.write_text(textwrap.dedent(NGINX).replace("DIRECTORY", str(node.directory)))
    with server(*node.inside, "/usr/sbin/nginx", "-c", config, "-p", node.directory) as process:
        wait_until(lambda: (node.directory / "nginx.sock").exists() and children(process.pid), 30, "nginx")
        yield Path("/usr/sbin/nginx")
        kill(node, children(process.pid)[0])
        yield Path("/usr/sbin/nginx")


def postgresql(node: Any) -> Iterator[Path]:
    """Crash a backend of PostgreSQL that runs a query."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with temporary_directory("cdh-pg-", "/var/tmp") as data:
        subprocess.run(["chown", "postgres:", data], check=True)
        subprocess.run(
            [*user, binaries / "initdb", "-N", "-D", data / "db"], check=True, cwd=data, **NO_OUTPUT
        )
        options = ["-D", data / "db", "-k", data, "-c", "listen_addresses=", "-c", "shared_buffers=32MB"]
        with server(*node.inside, *user, binaries / "postgres", *options, cwd=data):
            query: list[Any] = [*user, "psql", "-h", data, "-d", "postgres", "-Atc"]
            work = "create temporary table t as select generate_series(1, 300000) n; select pg_sleep(600)"

            def asked(text: str) -> str:
                done = subprocess.run([*query, text], capture_output=True, text=True, check=False, cwd=data)
                return str(done.stdout).strip()

            wait_until(lambda: asked("select 1") == "1", 30, "PostgreSQL")
            with server(*query, work, cwd=data):
                find = "select pid from pg_stat_activity where query like '%pg_sleep(600)' and wait_event = 'PgSleep'"
                wait_until(lambda: asked(find), 30, "the query")
                yield binaries / "postgres"
                kill(node, int(asked(find)))
                yield binaries / "postgres"


def chromium(node: Any) -> Iterator[Path]:
    """Crash the process of Chromium that renders a page."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-breakpad", "--no-first-run"]
    flags += ["--disable-dev-shm-usage", f"--user-data-dir={node.directory / 'profile'}"]
    with server(*node.inside, "/usr/bin/chromium", *flags, PAGE) as process:
        wait_until(lambda: renderers(process.pid), 60, "the page")
        yield Path("/usr/lib/chromium/chromium")
        kill(node, renderers(process.pid)[0])
        yield Path("/usr/lib/chromium/chromium")


def renderers(session: int) -> list[int]:
    """Return the pids of the processes of a session that have rendered a page."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_renderer = b"--type=renderer" in (entry / "cmdline").read_bytes()
            resident = int((entry / "statm").read_text().split()[1]) * 4096
            if is_renderer and resident > 100 << 20 and os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
    return found


GUESSED = {java, node_js, chromium, golang}
"""Arguments of just-in-time compiled frames are guesses of gdb; it shows the heap to which those of Go point."""

SHARED = {postgresql, chromium}
"""Other processes change memory that they share with the one that crashed."""
ALL = [
    eight_threads, static_binary, binary_of_32_bits, own_namespaces, cpp, many_mappings, golang, rust, python,
    node_js, java, redis, redis_child, nginx, postgresql, chromium,
]  # fmt: skip

"""Programs that are deleted, replaced, in memory alone or without build ID have their backtraces from the bucket."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid

import pytest
from tests.cli.conftest import Cli
from tests.integration.test_modules import IMPATIENT, MODULES
from tests.kernel.test_modules import frames
from tests.support import s3
from tests.support.collector import running, wait_until

from core_dumps import buildid

PROGRAM = """
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static int reserve(int *stock, int count) { return *stock -= count; }
int main(int count, char **words)
{
    if (!strcmp(words[1], "deleted") && unlink(words[0]))
        return 1;
    if (!strcmp(words[1], "replaced") && rename(words[2], words[0]))
        return 1;
    return reserve(0, count);
}
"""
IN_MEMORY = """
import os, sys
file = os.memfd_create("secret")
os.write(file, open(sys.argv[1], "rb").read())
os.execve(file, ["in-memory", "in-memory"], os.environ)
"""
GO = (
    "package main\nfunc reserve(stock *int, count int) { *stock -= count }\nfunc main() { reserve(nil, 2) }\n"
)


def build(node):
    """Build the programs; return the command line of each by its name."""
    (node.directory / "app.c").write_text(PROGRAM)
    for name in ("deleted", "replaced", "in-memory", "unnamed", "other"):
        flags = (
            ["-Wl,--build-id=none"] if name == "unnamed" else [f"-Wl,--build-id=0x{name.encode().hex():0<40}"]
        )
        command = ["gcc", "-g", "-O0", "-w", *flags, "-o", name, "app.c"]
        subprocess.run(command, cwd=node.directory, check=True)
    other, plain = node.directory / "other", ("deleted", "replaced", "unnamed")
    commands = {name: [node.directory / name, name, other] for name in plain}
    commands["in-memory"] = [sys.executable, "-c", IN_MEMORY, node.directory / "in-memory"]
    if shutil.which("go"):
        (node.directory / "main.go").write_text(GO)
        environ = os.environ | {"HOME": str(node.directory), "GOCACHE": str(node.directory / "cache")}
        go = ["go", "build", "-ldflags=-buildid=", "-o", "gopher", "main.go"]
        subprocess.run(go, cwd=node.directory, env=environ, check=True)
        commands["gopher"] = [node.directory / "gopher"]
    return commands


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")
def test_program_that_nothing_names_has_its_backtrace(node, seaweed, bucket, tmp_path, monkeypatch):
    prefix = f"odd-{uuid.uuid4().hex[:8]}"
    environ = seaweed.environ(s3.WRITER) | MODULES | {"BUCKET_NAME": f"s3://{s3.BUCKET}/{prefix}"}
    commands, pids = build(node), {}
    with running(node.watch_dir, environ, tmp_path, program=IMPATIENT):
        directory = node.watch_dir / ".modules"
        wait_until((directory / "collector").exists, 60, "the collector's mark")
        with node.installed():
            for name, command in commands.items():
                comm = b"memfd:secret" if name == "in-memory" else name.encode()
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                process = node.start(*command, name=comm, env={"GOTRACEBACK": "crash"}, **quiet)
                process.wait(timeout=60)
                pids[name] = process.pid
            node.settle()
        lists = len(commands)
        wait_until(
            lambda: (
                sum(key.endswith(".modules.json") for key in s3.keys_in(bucket, prefix=f"{prefix}/")) == lists
            ),
            200,
            "the lists",
        )
        wait_until(lambda: not list(directory.glob("module-*")), 200, "the modules")
    for name in ("unnamed", "in-memory", "gopher"):
        (node.directory / name).unlink(missing_ok=True)
    # a machine that has none of the files
    monkeypatch.setattr(buildid.Search, "find", lambda _, module: module)
    cli = Cli(seaweed, prefix, tmp_path)
    for name, pid in pids.items():
        done = cli.run("bt", pid)
        assert "missing" not in done.stderr
        assert "not found" not in done.stderr
        found = frames(done.stdout)
        if name == "gopher":
            assert found[0].startswith("#0  runtime.raise ()"), name
        else:
            assert found[0].startswith("#0  "), name
            assert "in reserve (stock=0x0, count=" in found[0], name
            assert "in main (" in found[1], name

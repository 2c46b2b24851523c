"""The helper as a process, fed as the kernel feeds it, without a crash."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support import kernel

from core_dump_helper.records import Records, open_state


@dataclass
class Station:
    """An installed helper with its watch directory."""

    directory: Path
    watch_dir: Path
    settings: dict[str, object] = field(default_factory=dict)
    python: str = sys.executable
    pigz: tuple[str, ...] | None = None
    edits: list[tuple[str, str, str]] = field(default_factory=list)
    """Module, old and new text: changes to the installed copy."""

    def command(self, *arguments, name="app"):
        """Install; return the command line, as the kernel would make it for this very process."""
        given = {"WATCH_DIR": self.watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 0, "COMPRESSOR": "gzip"}
        kernel.install_helper(self.directory, given | self.settings, self.python)
        program = self.directory / "core-dump-helper"
        if self.pigz is not None:
            module = self.directory / "core_dump_helper/compress.py"
            kernel.replace(module, "\nPIGZ = ", f"\nPIGZ = {self.pigz!r}\nOLD_PIGZ = ")
        for module, old, new in self.edits:
            kernel.replace(self.directory / "core_dump_helper" / module, old, new)
        usual = [
            f"-P{os.getpid()}",
            "-p7",
            f"-u{os.getuid()}",
            f"-g{os.getgid()}",
            "-s11",
            "-t1700000000",
            "-c0",
        ]
        return [program, *(arguments or (*usual, "-d1", "-F", "-hnode")), "--", *name.split("\0")]

    def start(self, *arguments, name="app", **how):
        """Start the helper; feed its `stdin`."""
        how = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {}} | how
        return subprocess.Popen(self.command(*arguments, name=name), cwd="/", **how)

    def run(self, core, *arguments, name="app", **how):
        """Feed a core to the helper; return what it logged."""
        with self.start(*arguments, name=name, **how) as process:
            _, logged = process.communicate(core, timeout=60)
        return logged.decode()

    def names(self):
        """Return all names in the watch directory except the helper's state."""
        return sorted(name for name in os.listdir(self.watch_dir) if name != ".helper")

    def dump(self):
        """Return the path of the only dump."""
        (name,) = self.names()
        return self.watch_dir / name

    def core(self):
        """Return the core in the only dump."""
        return gzip.decompress(self.dump().read_bytes())

    def attributes(self, path=None):
        """Return the attributes of a dump, the only one by default."""
        path, prefix = path or self.dump(), "user.coredump."
        return {
            n[len(prefix) :]: os.getxattr(path, n).decode()
            for n in os.listxattr(path)
            if n.startswith(prefix)
        }

    def records(self):
        """Return the records of what was refused."""
        files = [path for path in (self.watch_dir / ".helper").iterdir() if len(path.name) == 24]
        return [dict(line.split("=", 1) for line in path.read_text().split()) for path in files]


@pytest.fixture
def station(tmp_path, watch_dir):
    """A helper with an empty watch directory."""
    return Station(tmp_path, watch_dir)


@pytest.fixture
def directory(watch_dir):
    """The descriptor of an empty watch directory."""
    descriptor = os.open(watch_dir, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def records(directory):
    """The helper's state in an empty watch directory."""
    found = Records(open_state(directory))
    yield found
    os.close(found.directory)

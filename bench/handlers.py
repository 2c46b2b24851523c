"""What the kernel pipes a core into: ours with each compressor, the peers, and a reader that discards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import isal
from tests.support import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.cgroup import Group

SYSTEMD_STORE = Path("/var/lib/systemd/coredump")
SYSTEMD_SOCKET = Path("/run/systemd/coredump")
PYTHON = os.path.realpath(
    sys.executable
)  # not the virtual environment's link: the helper has no site-packages
BIG_PIPE = "import fcntl,os;fcntl.fcntl(0,1031,1<<20);"
DISCARD = BIG_PIPE + "b=[bytearray(1<<20)]\nwhile os.readv(0,b):pass"


@dataclass(frozen=True)
class Handler:
    """One way to take a core: its pattern, without the `|` of a program, and how people would write it."""

    name: str
    pattern: str
    command: str
    pipe_limit: int = 0
    most_rounds: int = 3
    """One where it takes long, and differs too much for noise to matter."""
    writes: bool = True

    @property
    def kernel_pattern(self) -> str:
        """Return the pattern as the kernel takes it."""
        return self.pattern if self.pattern.startswith("@") else "|" + self.pattern


class Workshop:
    """The directory that holds programs, configurations and what the handlers write."""

    def __init__(self, root: Path, group: Group | None) -> None:
        """Make the directories; with a group, every handler is counted in it (by a shell line: 1 ms)."""
        self.root, self.out, self._group = root, root / "out", group
        self.out.mkdir(mode=0o700, exist_ok=True)

    def script(self, name: str, command: str) -> str:
        """Write a shell script that becomes `command`; return its path."""
        path = self.root / (name + ("" if self._group else "-bare"))
        join = self._group.join if self._group else ":"
        path.write_text(f"#!/bin/sh\n{join}\nexec {command}\n")
        path.chmod(0o700)
        return str(path)

    def limit(self) -> Handler:
        """Read and discard: what the kernel needs."""
        program = self.script("limit", f"{PYTHON} -IS -c '{DISCARD}'")
        described = "a reader of 1 MiB blocks that keeps nothing"
        return Handler("kernel, discarded", program, described, writes=False)

    def manual(self) -> Handler:
        """The classic manual's pattern, as printed (its unquoted here-document mended)."""
        tail = "core-%e-%t-%p-%s.gz"
        command = f"/bin/sh -c $@ -- eval exec /usr/bin/pigz > {{}}/{tail}"
        prefix = self.script("in", '"$@"') + " " if self._group else ""
        pattern = prefix + command.format(self.out)
        return Handler("manual: sh + pigz", pattern, command.format("/core_dumps"), most_rounds=1)

    def pigz(self) -> Handler:
        """Pigz alone."""
        return Handler(
            "bare pigz -1",
            self.script("pigz", f"/usr/bin/pigz -1 > {self.out}/$$.gz"),
            "pigz -1 > FILE",
            most_rounds=1,
        )

    def raw(self) -> Handler:
        """No compression at all."""
        return Handler("cat > FILE", self.script("raw", f"/bin/cat > {self.out}/$$.gz"), "cat > FILE")

    def igzip(self) -> Handler:
        """ISA-L's own program behind a pipe of 1 MiB."""
        resized = f'{PYTHON} -IS -c \'{BIG_PIPE}os.execv("/usr/bin/igzip",["igzip","-1","-c"])\''
        program = self.script("igzip", f"{resized} > {self.out}/$$.gz")
        return Handler("bare igzip -1", program, "F_SETPIPE_SZ 1 MiB; igzip -1 -c > FILE")

    def ours(self, compressor: str, buffer_bytes: int | None = None, **settings: object) -> Handler:
        """The helper, installed as its users have it, with one compressor and perhaps other settings."""
        program = self.root / "h"
        if not program.exists():
            kernel.install_helper(self.root, {}, PYTHON)
            (self.root / kernel.HELPER.name).rename(program)  # a short path: the kernel takes 127 bytes
        name = compressor if buffer_bytes is None else f"{compressor}-{buffer_bytes >> 20}"
        name += "".join(key[0].lower() for key in settings)  # the kernel takes 127 bytes of pattern
        conf = self.root / f"{name}.conf"
        lines = {
            "WATCH_DIR": self.out,
            "COMPRESSOR": compressor,
            "RATE_LIMIT": 0,
            "KEEP_FREE_PERCENT": 1,  # or a full machine would measure refusals
            "VITAL_LIMIT": 0,
            "PYTHON_PATH": Path(isal.__file__).parent.parent,
        }
        if buffer_bytes is not None:
            lines["BUFFER_BYTES"] = buffer_bytes
        kernel.write_config(conf, lines | settings)
        command = f"{program} -C{conf}"
        pattern = self.script(f"o-{name}", command + ' "$@"') if self._group else command
        label = f"ours, {compressor}" + ("" if buffer_bytes is None else f", buffer {buffer_bytes >> 20} MiB")
        label += "".join(f", {key}={value}" for key, value in settings.items())
        return Handler(
            label,
            f"{pattern} {kernel.ARGUMENTS}",
            f"core-dump-helper {kernel.ARGUMENTS} with COMPRESSOR={compressor}",
            most_rounds=3 if compressor in {"auto", "isal"} else 1,
        )

    @contextlib.contextmanager
    def listening(self, compressor: str) -> Iterator[Handler]:
        """Run the helper behind a socket, with the settings of `ours`."""
        ours = self.ours(compressor)
        path = self.root / "s" / compressor
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)
        join = self._group.join if self._group else ":"
        line = f"{join}; exec {self.root / 'h'} --listen {path} -C{self.root}/{compressor}.conf"
        server = subprocess.Popen(["/bin/sh", "-c", line], stderr=subprocess.DEVNULL)
        try:
            while not path.exists():
                time.sleep(0.01)
            pattern = f"@@{path}"
            yield Handler(ours.name + ", socket", pattern, "core-dump-helper --listen", most_rounds=9)
        finally:
            server.kill()
            server.wait()

    def trimming(self, budget_mib: int = 64) -> Handler:
        """The helper that trims each dump to a budget; 64 MiB is its default."""
        whole = self.ours("auto")
        conf = self.root / f"trim{budget_mib}.conf"
        settings = f"RULES=trim\nTRIM_BUDGET_BYTES={budget_mib << 20}\n"
        conf.write_text((self.root / "auto.conf").read_text() + settings)
        conf.chmod(0o644)
        command = f"{self.root / 'h'} -C{conf}"
        pattern = self.script(f"o-trim{budget_mib}", command + ' "$@"') if self._group else command
        described = f"core-dump-helper {kernel.ARGUMENTS} with RULES=trim"
        return Handler("ours, trimmed", f"{pattern} {kernel.ARGUMENTS}", described, whole.pipe_limit)

    def calibrate(self) -> tuple[float, str]:
        """Run `--calibrate` for the configuration of auto; return seconds and its choice."""
        self.ours("auto")
        begin = time.perf_counter()
        subprocess.run(
            [self.root / "h", "--calibrate", f"-C{self.root}/auto.conf"],
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin, (self.root / "compressor").read_text().strip()

    @contextlib.contextmanager
    def systemd(self) -> Iterator[Handler]:
        """systemd-coredump of Debian with its defaults; its socket is served as its unit says."""
        program = self._unpack_systemd()
        SYSTEMD_SOCKET.unlink(missing_ok=True)
        serve = [shutil.which("systemd-socket-activate"), "--accept", "--seqpacket", "-l", SYSTEMD_SOCKET]
        join = self._group.join if self._group else ":"
        line = f"{join}; exec nice -n 9 {' '.join(map(str, serve))} {program}"
        before = set(SYSTEMD_STORE.glob("*"))
        server = subprocess.Popen(["/bin/sh", "-c", line], stderr=subprocess.DEVNULL)
        try:
            while not SYSTEMD_SOCKET.exists():
                time.sleep(0.01)
            arguments = "%P %u %g %s %t 9223372036854775808 %h %d"
            pattern = (
                self.script("sysd", f'{program} "$@"') if self._group else str(program)
            ) + f" {arguments}"
            yield Handler(
                "systemd-coredump", pattern, f"systemd-coredump {arguments}", pipe_limit=16, most_rounds=1
            )
        finally:
            server.terminate()
            server.wait()
            SYSTEMD_SOCKET.unlink(missing_ok=True)
            for path in set(SYSTEMD_STORE.glob("*")) - before:
                path.unlink()

    def _unpack_systemd(self) -> Path:
        """Fetch the package of the installed systemd's version and unpack it: its set-up would change this machine."""
        link = self.root / "sd"
        target = self.root / "systemd"
        if not target.exists():
            version = subprocess.check_output(["dpkg-query", "-W", "-f${Version}", "systemd"], text=True)
            command = ["apt-get", "download", "-q", f"systemd-coredump={version}"]
            subprocess.run(
                command, cwd=self.root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            package = next(self.root.glob("systemd-coredump_*.deb"))
            subprocess.run(["dpkg-deb", "-x", package, target], check=True)
            SYSTEMD_STORE.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target / "lib/systemd/systemd-coredump")
        return link

    def clean(self) -> int:
        """Remove what handlers wrote; return its bytes."""
        total = 0
        for place in (self.out, SYSTEMD_STORE):
            for path in place.glob("core*" if place == SYSTEMD_STORE else "*.gz*"):
                total += path.stat().st_size
                path.unlink()
        for path in self.out.glob("core-*"):
            total += path.stat().st_size
            path.unlink()
        return total

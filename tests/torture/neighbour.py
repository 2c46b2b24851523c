"""A hostile user of the watch directory: `python -m tests.torture.neighbour SEED WATCH_DIR OUTSIDE JOURNAL`.

The program starts as root, opens its journal and becomes an unprivileged user. Until its standard input ends, it
plants, renames, links, truncates and deletes files at random. Before each act on another's dump it writes the names to
the journal, and after it the outcome, so that the run knows which dumps this user has touched.

Every file that it plants starts with MARK; a hard or symbolic link may also lead to files outside that hold SECRET.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import random
import select
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from core_dump_format.attributes import ATTRIBUTE_PREFIX, UPLOAD_RECORD
from core_dump_format.names import parse_name, unpartial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER = 65534
MARK = b"PLANTED-BY-A-NEIGHBOUR\n"
SECRET = b"SECRET-OUTSIDE-THE-DIRECTORY\n"
FORGED = "/forged-by-a-neighbour"
"""Value of the forged attributes; it must not appear in any metadata object."""
FIRST_PID = 9_000_000_000
"""The neighbour's own files have pids that no process has; a dump that it renames gets one too."""
MOST_FILES = 400
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.012
SUFFIXES = ("", ".gz", ".gz", ".gz", ".partial", ".gz.partial", ".gz.json", ".zst", "-1.gz")


class Neighbour:
    """The hostile user; the current directory is the watch directory."""

    def __init__(self, dice: random.Random, outside: Path, journal: int) -> None:
        """Store the dice, its own directory outside and the descriptor of the journal."""
        self.dice, self.outside, self.journal = dice, outside, journal
        self.count = 0
        self.done: Counter[str] = Counter()
        self.held: list[int] = []

    def annoy(self) -> None:
        """Do one thing at random."""
        acts = (
            self.plant,
            self.collide,
            self.change_own,
            self.delete_own,
            self.meddle_with_state,
            self.attack,
        )
        (act,) = self.dice.choices(acts, weights=(25, 30, 15, 20, 6, 3))
        with contextlib.suppress(OSError):
            act()
            self.done[act.__name__] += 1

    def own_name(self, suffix: str | None = None) -> str:
        """Return a new name, most often one of the grammar."""
        self.count += 1
        chosen = self.dice.choice(SUFFIXES) if suffix is None else suffix
        if suffix is None and self.dice.random() < 0.1:
            return f"core.{self.count}{chosen}"
        return f"core-app-{int(time.time())}-{FIRST_PID + self.count}-11{chosen}"

    def names_of(self, *, own: bool) -> list[str]:
        """Return the names of this user's entries, or of root's dumps."""
        found = []
        with os.scandir(".") as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    mine = entry.stat(follow_symlinks=False).st_uid == USER
                    if mine == own and (own or entry.name.startswith("core")):
                        found.append(entry.name)
        return sorted(found)

    def plant(self) -> None:
        """Plant something under a name of this user's own."""
        if len(os.listdir(".")) < MOST_FILES:
            self.plant_at(self.own_name())

    def collide(self) -> None:
        """Plant something where the helper or collector is about to create or rename a file of its own."""
        if victims := self.names_of(own=False):
            name = self.dice.choice(victims)
            final = unpartial(name)
            stem = final.removesuffix(".gz")
            taken = [f"{stem}-1.gz", f"{final}.json", stem, f"{stem}-1.gz.partial"]
            self.plant_at(final if final != name else self.dice.choice(taken))

    def plant_at(self, name: str) -> None:
        """Plant a file, link, FIFO, socket or directory; never replace a file that has this name."""
        plants = (self.file, self.symlink, self.hard_link, os.mkfifo, self.listen, self.directory)
        (plant,) = self.dice.choices(plants, weights=(50, 12, 8, 10, 5, 15))
        plant(name)
        self.done[plant.__name__] += 1

    def file(self, name: str) -> None:
        """Create a file with forged attributes and maybe keep it open, or lease it."""
        content = MARK * self.dice.choice((0, 1, 1, 100, 20_000))
        if name.endswith(".gz") and self.dice.random() < 0.5:
            content = gzip.compress(content)
        descriptor = os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self.dice.choice((0o600, 0o666))
        )
        os.write(descriptor, content)
        if self.dice.random() < 0.6:
            self.forge(descriptor, name, content)
        if self.dice.random() < 0.2:
            self.hold(descriptor)
        else:
            os.close(descriptor)

    def forge(self, descriptor: int, name: str, content: bytes) -> None:
        """Set attributes and an upload record that claim another's dump."""
        claimed = self.dice.choice(self.names_of(own=False) or [name])
        named = parse_name(unpartial(claimed))
        forged = {"exe": FORGED, "comm": FORGED, "cmdline": FORGED, "truncated": "killed", "salvaged": "1"}
        forged |= {"pid": str(named.pid if named else 1), "container_id": "f" * 64, "pod_uid": "f" * 32}
        forged |= {"sensitive": FORGED, "hostname": FORGED}
        for attribute in self.dice.sample(sorted(forged), 4):
            os.setxattr(descriptor, ATTRIBUTE_PREFIX + attribute, forged[attribute].encode())
        record = {
            "state": self.dice.choice(("sending", "sent", "unproven", "stored")),
            "key": f"node-1/{self.dice.choice((claimed, name))}",
            "modified_ns": os.fstat(descriptor).st_mtime_ns,
            "size": len(content),
            "crc32": zlib.crc32(content),
            "upload_id": self.dice.choice(("", "0" * 32)),
            "part_bytes": 5 << 20,
        }
        os.setxattr(descriptor, UPLOAD_RECORD, json.dumps(record).encode())

    def hold(self, descriptor: int) -> None:
        """Keep a file open for writing for a while, half of them with a lease or a lock."""
        self.held.append(descriptor)
        if len(self.held) > 8:
            os.close(self.held.pop(0))
        if self.dice.random() < 0.3:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif self.dice.random() < 0.3:
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, 23)  # SIGURG, which is ignored, instead of SIGIO
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def symlink(self, name: str) -> None:
        """Link to a file outside, or to another's dump."""
        targets = [
            str(self.outside / "secret"),
            str(self.outside / "own"),
            str(self.outside),
            name,
            "/dev/zero",
        ]
        os.symlink(self.dice.choice(targets + self.names_of(own=False)[:3]), name)

    def hard_link(self, name: str) -> None:
        """Give this user's file outside one more name."""
        os.link(self.outside / "own", name)

    def listen(self, name: str) -> None:
        """Create a socket."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)

    def directory(self, name: str) -> None:
        """Move a directory that holds a file in from outside; a file that has this name stays."""
        self.count += 1
        made = self.outside / f"directory-{self.count}"
        made.mkdir()
        (made / "core-app-1700000000-1-11.gz").write_bytes(MARK)
        made.rename(name)

    def change_own(self) -> None:
        """Truncate or extend a file of this user's own; another's cannot be opened."""
        if names := self.names_of(own=True):
            name = self.dice.choice(names)
            descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                size = os.fstat(descriptor).st_size
                if os.fstat(descriptor).st_nlink == 1:
                    os.ftruncate(descriptor, self.dice.randint(0, size))
            finally:
                os.close(descriptor)

    def delete_own(self) -> None:
        """Rename or delete an entry that nobody else can have given its name."""
        mine = [name for name in self.names_of(own=True) if is_own_name(name)]
        if not mine:
            return
        name = self.dice.choice(mine)
        if os.path.isdir(name) and not os.path.islink(name):
            os.rename(name, self.outside / f"{name}-{self.count}")
        elif self.dice.random() < 0.5:
            os.rename(name, self.own_name())
        else:
            os.unlink(name)

    def meddle_with_state(self) -> None:
        """Move the helper's or collector's own directory away and put something else there."""
        name = self.dice.choice((".helper", ".helper", "quarantine"))
        self.count += 1
        if os.path.lexists(name):
            os.rename(name, f".{name.strip('.')}-{self.count}")
        elif self.dice.random() < 0.7:
            self.plant_at(name)

    def attack(self) -> None:
        """Rename, replace, link or delete a dump of root's."""
        victims = self.names_of(own=False)
        if not victims:
            return
        name, other = self.dice.choice(victims), self.dice.choice(victims)
        box = f".box-{self.count}"
        new = self.own_name(self.dice.choice((".gz", ".gz.partial")))
        kind = self.dice.choice(("delete", "move", "hide", "swap", "replace", "carry", "link"))
        match kind:
            case "delete":
                self.touch(kind, [name], lambda: os.unlink(name))
            case "move" | "swap" | "hide":
                to = {"move": new, "swap": other, "hide": f".hidden-{self.count}"}[kind]
                self.touch(kind, [name, to], lambda: os.rename(name, to))
            case "replace":
                Path(".own").write_bytes(MARK)
                self.touch(kind, [name], lambda: os.rename(".own", name))
            case "carry":
                os.mkdir(box)
                self.touch(kind, [name], lambda: os.rename(name, f"{box}/{name}"))
            case _:
                self.touch(kind, [name, new], lambda: os.link(name, new))

    def touch(self, kind: str, names: list[str], act: Callable[[], object]) -> None:
        """Note the names, act, and note the outcome: a single system call that fails has changed nothing."""
        self.note(kind, names, "begun")
        try:
            act()
        except OSError as error:
            self.note(kind, names, errno.errorcode.get(error.errno or 0, "error"))
        else:
            self.note(kind, names, "done")
            self.done[kind] += 1

    def note(self, kind: str, names: list[str], outcome: str) -> None:
        """Append a line to the journal."""
        os.write(self.journal, json.dumps([self.count, kind, names, outcome]).encode() + b"\n")


def is_own_name(name: str) -> bool:
    """Tell whether only the neighbour can have made the name."""
    parsed = parse_name(unpartial(name).removesuffix(".json").removesuffix(".zst"))
    return parsed.pid >= FIRST_PID if parsed else name.startswith("core.")


def make_outside(scratch: Path) -> Path:
    """Make the neighbour's own directory, beside a file of root's that it can only link to."""
    scratch.chmod(0o711)
    outside = scratch / "outside"
    outside.mkdir()
    for name in ("secret", "own"):
        (outside / name).write_bytes(SECRET)
    (outside / "secret").chmod(0o600)
    os.chown(outside / "own", USER, USER)
    os.chown(outside, USER, USER)
    return outside


@contextlib.contextmanager
def harassed(watch_dir: Path, seed: int, scratch: Path) -> Iterator[None]:
    """Run the neighbour during the block; it must not have failed by itself."""
    command = [sys.executable, "-m", "tests.torture.neighbour", str(seed), str(watch_dir)]
    command += [str(scratch / "outside"), str(scratch / "journal")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)
    assert process.returncode == 0


def become_user() -> None:
    """Give up every privilege; the current directory and open descriptors stay."""
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    with open("/proc/self/status") as file:
        assert "CapEff:\t0000000000000000" in file.read()


def main() -> int:
    """Annoy until the standard input ends."""
    seed, watch_dir, outside, journal = sys.argv[1:]
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.chdir(watch_dir)
    become_user()
    neighbour = Neighbour(random.Random(int(seed)), Path(outside), descriptor)
    pause = random.Random(int(seed))
    while not select.select([sys.stdin], [], [], pause.uniform(SHORTEST_PAUSE, LONGEST_PAUSE))[0]:
        neighbour.annoy()
    sys.stdout.write(f"the neighbour: {dict(neighbour.done)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The fixed set of bugs on which fingerprints are measured: programs in several languages, each with several bugs.

`make test-fingerprints` crashes each with different amounts of memory, whole and truncated, and compares all pairs.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("bugs")
ENVIRONMENT = {
    **os.environ,
    "GOTRACEBACK": "crash",
    "GOCACHE": "/tmp/go-cache",
    "ASAN_OPTIONS": "abort_on_error=1",
}


@dataclass(frozen=True)
class Program:
    """One program of the set."""

    name: str
    bugs: int
    command: str
    """How a bug is run; `{bug}`, `{mib}`, `{here}` (where it was built) and `{sources}` are replaced."""
    build: str = ""

    def prepare(self, directory: Path) -> bool:
        """Build it; return False where its compiler or interpreter is missing."""
        for line in filter(None, [self.build, self.command]):
            words = line.format(bug=0, mib=0, here=directory, sources=SOURCES).split()
            if not words[0].startswith(str(directory)) and not shutil.which(words[0]):
                return False
        if self.build:
            words = self.build.format(here=directory, sources=SOURCES).split()
            subprocess.run(words, check=True, capture_output=True, env=ENVIRONMENT, cwd=directory)
        return True

    def start(self, bug: int, mib: int, directory: Path) -> list[str]:
        """Return the command that runs a bug."""
        return self.command.format(bug=bug, mib=mib, here=directory, sources=SOURCES).split()


OWN = "{here}/%s {bug} {mib}"
PROGRAMS = (
    Program("c-fp", 15, OWN % "c-fp", "gcc -w -O1 -fno-omit-frame-pointer -o {here}/c-fp {sources}/bugs.c"),
    Program(
        "c-nofp", 15, OWN % "c-nofp", "gcc -w -O2 -fomit-frame-pointer -o {here}/c-nofp {sources}/bugs.c"
    ),
    Program("c-static", 7, OWN % "c-static", "gcc -w -O2 -static -s -o {here}/c-static {sources}/bugs.c"),
    Program("c-m32", 7, OWN % "c-m32", "gcc -w -O1 -m32 -o {here}/c-m32 {sources}/bugs.c"),
    Program("cpp", 10, OWN % "cpp", "g++ -O2 -pthread -o {here}/cpp {sources}/bugs.cpp"),
    Program("rust", 8, OWN % "rust", "rustc -O -C panic=abort -o {here}/rust {sources}/bugs.rs"),
    Program("go", 9, OWN % "go", "go build -o {here}/go {sources}/bugs.go"),
    Program("asan", 5, OWN % "asan", "gcc -O1 -g -fsanitize=address -o {here}/asan {sources}/asan.c"),
    Program("python3", 7, "/usr/bin/python3 {sources}/bugs.py {bug} {mib}"),
    Program("node", 4, "/usr/bin/node --max-old-space-size=64 {sources}/bugs.js {bug} {mib}"),
    Program(
        "java",
        4,
        "/usr/bin/java -Xmx600m -XX:+CrashOnOutOfMemoryError -XX:ErrorFile=/dev/null -cp {here} Bugs {bug} {mib}",
        "javac -nowarn -d {here} {sources}/Bugs.java",
    ),
    Program("redis-server", 3, "sh {sources}/redis.sh {here} {bug} {mib}"),
)


@dataclass(frozen=True)
class Found:
    """The fingerprint of one dump."""

    program: str
    bug: int
    kind: str
    """Memory touched, and whether the dump is whole."""
    fingerprint: str
    frames: str


def matrix(found: list[Found]) -> tuple[str, float, float]:
    """Return a table of pairs, and the parts of pairs that are right: one bug together, different bugs apart."""
    counts: list[Counter[str]] = [Counter() for _ in range(4)]
    together, both, apart, other = counts
    for first, second in itertools.combinations(found, 2):
        if first.program != second.program:
            continue
        is_same = first.fingerprint == second.fingerprint
        if first.bug == second.bug:
            together[first.program] += is_same
            both[first.program] += 1
        else:
            apart[first.program] += not is_same
            other[first.program] += 1
    lines = [f"{'program':14}{'dumps':>6}{'groups':>8}{'bugs':>6}{'one bug together':>20}{'bugs apart':>14}"]
    for name in dict.fromkeys(each.program for each in found):
        mine = [each for each in found if each.program == name]
        groups, bugs = len({each.fingerprint for each in mine}), len({each.bug for each in mine})
        same, different = f"{together[name]}/{both[name]}", f"{apart[name]}/{other[name]}"
        lines.append(f"{name:14}{len(mine):6}{groups:8}{bugs:6}{same:>20}{different:>14}")
    parts = [
        sum(right.values()) / max(1, sum(all_.values())) for right, all_ in ((together, both), (apart, other))
    ]
    bugs = len({(each.program, each.bug) for each in found})
    lines.append(f"{bugs} bugs, {len(found)} dumps: together {parts[0]:.1%}, apart {parts[1]:.1%}")
    return "\n".join(lines), parts[0], parts[1]


def exceptions(found: list[Found]) -> list[str]:
    """Return a line for each bug that has several groups, and for each group of several bugs."""
    lines = []
    bugs: dict[tuple[str, int], list[Found]] = {}
    groups: dict[tuple[str, str], list[Found]] = {}
    for each in found:
        bugs.setdefault((each.program, each.bug), []).append(each)
        groups.setdefault((each.program, each.fingerprint), []).append(each)
    for (name, bug), mine in bugs.items():
        if len({each.fingerprint for each in mine}) > 1:
            lines += [f"split: {name} {bug} {each.kind}: {each.frames}" for each in mine]
    for (name, identity), mine in groups.items():
        if len({each.bug for each in mine}) > 1:
            several = sorted({each.bug for each in mine})
            lines.append(f"merged: {name} {identity} {several}: {mine[0].frames}")
    return lines

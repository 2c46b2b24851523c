"""Changes one line that decides about a loss at a time, and reports which changes the tests notice: `make mutants`.

`mutants.toml` lists the changes. Each is made in a copy of the tree, where only the tests that it names run. The exit
code is 1 if a change survives, or if its text does not stand exactly once in its file any more.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cleanup import exit_on_signals, temporary_directory

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
PACKAGES = ("format", "helper", "collector", "cli")
SECONDS = 600
"""Longest run of the tests of one mutant; a mutant that hangs them is caught."""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".*cache", "__pycache__", ".hypothesis", "dist", "build")
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other means that the mutant or its list of tests is wrong."""


@dataclass(frozen=True)
class Mutant:
    """One change and the tests that should notice it."""

    name: str
    """What is lost, or called whole, by mistake."""
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest: files, or `file -k expression`."""

    def text(self, root: Path) -> str:
        """Return the changed text of its file.

        Raises:
            ValueError: the old text does not stand there exactly once.
        """
        text = (root / self.path).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.path} holds its text {text.count(self.old)} times")
        return text.replace(self.old, self.new)


def load(path: Path = LIST) -> list[Mutant]:
    """Read the list; a group of mutants shares its file and its tests."""
    groups: list[dict[str, Any]] = tomllib.loads(path.read_text())["group"]
    return [
        Mutant(
            each["name"], group["path"], each["old"], each["new"], tuple(each.get("tests", group["tests"]))
        )
        for group in groups
        for each in group["mutant"]
    ]


def changed_texts(mutants: Sequence[Mutant]) -> tuple[list[str], list[str]]:
    """Return the changed text of each mutant's file, and a line for each mutant that does not fit any more."""
    texts, stale = [], []
    for mutant in mutants:
        try:
            texts.append(mutant.text(ROOT))
        except ValueError as error:
            stale.append(str(error))
    return texts, stale


def pytest(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a tree, with the packages of that tree."""
    paths = os.pathsep.join(str(tree / package) for package in PACKAGES)
    environ = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=tree, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def run(tree: Path, original: Path, tests: Sequence[str]) -> str:
    """Run tests in a tree, one entry after the other, until one fails; return the verdict.

    A test that fails in the original tree too has noticed nothing: it is passed over.
    """
    unreliable = ""
    for entry in tests:
        place, _, expression = entry.partition(" -k ")
        try:
            done = pytest(tree, *place.split(), *(["-k", expression] if expression else []))
        except subprocess.TimeoutExpired:
            return "caught (hung)"
        if done.returncode not in {PASSED, FAILED}:
            return f"WRONG: pytest exited with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if failed and pytest(original, failed[1]).returncode == PASSED:
            return f"caught by {failed[1].rpartition('::')[2]}"
        if failed:
            unreliable = f"; {failed[1]} fails without the change too"
    return "SURVIVED" + unreliable


def main() -> int:
    """Try every mutant, or those whose name matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name matches this regular expression")
    parser.add_argument("--check", action="store_true", help="check the list, run nothing")
    options = parser.parse_args()
    mutants = [mutant for mutant in load() if re.search(options.only, mutant.name)]
    texts, stale = changed_texts(mutants)
    if stale:
        sys.stdout.write("".join(f"STALE: {line}\n" for line in stale))
        return 1
    verdicts: list[str] = []
    exit_on_signals()
    with temporary_directory("mutants-") as directory:
        tree, original = directory / "tree", directory / "original"
        for copy in (tree, original):
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
        for mutant, text in zip(mutants, texts, strict=True):
            if options.check:
                continue
            begin = time.monotonic()
            (tree / mutant.path).write_text(text)
            verdicts.append(run(tree, original, mutant.tests))
            shutil.copy(original / mutant.path, tree / mutant.path)
            sys.stdout.write(f"{time.monotonic() - begin:5.0f} s  {mutant.name}: {verdicts[-1]}\n")
            sys.stdout.flush()
    caught = sum(verdict.startswith("caught") for verdict in verdicts)
    sys.stdout.write(f"{len(mutants)} mutants, {caught} caught\n")
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs a program from an image of its own: a mount namespace in which the program and its libraries are copies.

`python images.py COMMAND...` copies them into a tmpfs, mounts them over the host's, and becomes the command. When its
last process has ended, no file of the image is left. Each copy of an ELF file has a tail that the host's file has not,
so it has another SHA-256 and works the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TAIL = b"\nof an image"
PLACE = Path("/mnt")


def prefix() -> list[str]:
    """Return the beginning of a command that runs in an image."""
    return ["unshare", "--mount", "--propagation", "private", sys.executable, "-I", __file__]


def is_elf(path: Path) -> bool:
    """Tell whether a file is a program or a library."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def trees(words: list[str]) -> list[Path]:
    """Return the programs that a command names, and the folders from which they load more."""
    found = []
    for word in filter(os.path.isabs, words):
        path = Path(os.path.realpath(word))
        if path.is_file() and is_elf(path):
            found.append(path)
        if path.name == "java":
            found[-1] = path.parents[1]
        elif path.name == "chromium":
            found.append(Path("/usr/lib/chromium"))
        elif path.name.startswith("python3"):
            found.append(Path("/usr/lib") / path.name / "lib-dynload")
    return found + [Path(os.path.realpath(path)) for path in Path("/usr/lib").glob("*/libnss_systemd.so*")]


def files(tree: Path) -> Iterator[Path]:
    """Yield all ELF files of a tree."""
    for path in tree.rglob("*") if tree.is_dir() else [tree]:
        if path.is_file() and not path.is_symlink() and is_elf(path):
            yield path


def libraries(programs: list[Path]) -> set[Path]:
    """Return the libraries that programs are linked with."""
    told = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    return {Path(os.path.realpath(path)) for path in re.findall(r"(/\S+) \(0x", told)}


def mount(*words: object) -> None:
    """Mount something."""
    subprocess.run(["mount", *map(str, words)], check=True)


def main(words: list[str]) -> None:
    """Make the image and become the command."""
    mount("-t", "tmpfs", "-o", "mode=755", "image", PLACE)
    wanted = trees(words)
    linked = libraries([path for tree in wanted for path in files(tree)])
    wanted += [path for path in linked if not any(path.is_relative_to(tree) for tree in wanted)]
    for number, original in enumerate(wanted):
        copy = PLACE / str(number)
        if original.is_dir():
            shutil.copytree(original, copy, symlinks=True)
        else:
            shutil.copy2(original, copy)
        for path in files(copy):
            with path.open("ab") as file:
                file.write(TAIL)
        mount("--bind", copy, original)
    os.execvp(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1:])

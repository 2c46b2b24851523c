#!/usr/bin/env python3
"""Print user data for a Bottlerocket node: a TOML of this folder with its bootstrap script put in.

usage: bottlerocket/render.py {file,dd,socket} > user-data.toml      (Python 3.11, no packages)
"""

from __future__ import annotations

import base64
import os
import sys
import tomllib

FOLDER = os.path.dirname(os.path.abspath(__file__))
PATTERN_LIMIT = 127
"""Bytes that the kernel keeps of kernel.core_pattern (core(5)); the rest is cut without a word."""


def script(way: str) -> str:
    """Return the bootstrap script for one way, in base64."""
    with open(os.path.join(FOLDER, "bootstrap", "prepare.sh"), encoding="utf-8") as file:
        first, rest = file.read().split("\n", 1)
    return base64.b64encode(f"{first}\nset -- {way}\n{rest}".encode()).decode()


def render(name: str) -> str:
    """Return the whole TOML.

    Raises:
        ValueError: it is no TOML, or its pattern is one that the kernel or the node would spoil.
    """
    with open(os.path.join(FOLDER, f"{name}.toml"), encoding="utf-8") as file:
        text = file.read()
    text = text.replace("@USER_DATA_FILE@", script("file")).replace("@USER_DATA_DD@", script("dd"))
    pattern = tomllib.loads(text)["settings"]["kernel"]["sysctl"]["kernel.core_pattern"]
    if len(pattern.encode()) > PATTERN_LIMIT:
        raise ValueError(
            f"{name}.toml: the pattern has {len(pattern.encode())} bytes, the kernel takes {PATTERN_LIMIT}"
        )
    if '"' in pattern or "\\" in pattern:
        raise ValueError(
            f"{name}.toml: the node's own template takes neither quotes nor backslashes in the pattern"
        )
    return text


def main() -> int:
    """Run as the command line says."""
    if len(sys.argv) != 2 or sys.argv[1] not in {"file", "dd", "socket"}:  # noqa: PLR2004
        sys.stderr.write(__doc__ or "")
        return 2
    try:
        sys.stdout.write(render(sys.argv[1]))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Print user data for a Bottlerocket node: a TOML file of this folder, completed with its bootstrap script.

usage: bottlerocket/render.py {socket,dd,file} > user-data.toml      (Python 3.11, no packages)
"""

from __future__ import annotations

import base64
import os
import sys
import tomllib

FOLDER = os.path.dirname(os.path.abspath(__file__))
WAYS = ("socket", "dd", "file")
PATTERN_LIMIT = 127
"""Bytes of kernel.core_pattern that the kernel keeps (core(5)); it cuts longer patterns without an error."""


def script(way: str) -> str:
    """Return the bootstrap script for one way, encoded in base64."""
    with open(os.path.join(FOLDER, "bootstrap", "prepare.sh"), encoding="utf-8") as file:
        first, rest = file.read().split("\n", 1)
    return base64.b64encode(f"{first}\nset -- {way}\n{rest}".encode()).decode()


def render(name: str) -> str:
    """Return the complete TOML text.

    Raises:
        ValueError: the text is not TOML, or the kernel or the node would change its pattern.
    """
    with open(os.path.join(FOLDER, f"{name}.toml"), encoding="utf-8") as file:
        text = file.read()
    for way in WAYS:
        text = text.replace(f"@USER_DATA_{way.upper()}@", script(way))
    pattern = tomllib.loads(text)["settings"]["kernel"]["sysctl"]["kernel.core_pattern"]
    if len(pattern.encode()) > PATTERN_LIMIT:
        raise ValueError(
            f"{name}.toml: the pattern has {len(pattern.encode())} bytes, the kernel takes {PATTERN_LIMIT}"
        )
    if '"' in pattern or "\\" in pattern:
        raise ValueError(
            f"{name}.toml: the pattern holds quotes or backslashes, which the node's own template cannot write"
        )
    return text


def main() -> int:
    """Print the user data that the command line asks for; return the exit code."""
    way = sys.argv[1] if len(sys.argv) == 2 else ""  # noqa: PLR2004
    if way not in WAYS:
        sys.stderr.write(__doc__ or "")
        return 2
    try:
        sys.stdout.write(render(way))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

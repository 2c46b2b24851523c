"""Owns the start of `core-dumps`: it needs packages that a node does without, and says how to install them."""

from __future__ import annotations

import sys

_EXTRA = {"elftools": "pyelftools", "rich": "rich", "typer": "typer"}
"""Modules of the extra `cli`, and the names of their distributions."""


def main() -> None:
    """Run `core-dumps`, or print what to install."""
    try:
        from core_dumps.cli import main as run  # noqa: PLC0415  fails without the extra
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(
            f"core-dumps: the package {_EXTRA[error.name]} is not installed: pip install {' '.join(_EXTRA.values())}\n"
        )
        sys.exit(2)
    run()

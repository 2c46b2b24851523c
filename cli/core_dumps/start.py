"""Owns the start of `core-dumps`: it needs packages that a node does without, and says how to install them."""

from __future__ import annotations

import sys

_EXTRA = frozenset({"typer", "rich", "elftools"})
"""Packages of the extra `cli`."""


def main() -> None:
    """Run `core-dumps`, or print what to install."""
    try:
        from core_dumps.cli import main as run  # noqa: PLC0415  fails without the extra
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(
            f"core-dumps: the package {error.name} is not installed: pip install 'core-dump-handler[cli]'\n"
        )
        sys.exit(2)
    run()

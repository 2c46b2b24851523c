"""Turns the command line of `core-dumps` into calls, in coredumpctl's words; each command is a function elsewhere."""

from __future__ import annotations

import gc
import sys

import typer

from core_dumps import debugging, filing, listing, opening, show
from core_dumps.app import app
from core_dumps.options import ending

COMMANDS = (listing, opening, debugging, filing)
"""The modules whose import adds commands to the app."""


@app.command(hidden=True)
def man() -> None:
    """Print the manual page."""
    from core_dumps import manpage  # noqa: PLC0415  other commands do not need it

    with ending():
        typer.echo(manpage.render(typer.main.get_command(app)), nl=False)
        sys.stdout.flush()


def main() -> None:
    """Run `core-dumps`.

    A listing makes some 100,000 objects that live until the end; searching them for garbage would take most of its
    time.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    show.never_fail_on_a_character()
    app(prog_name="core-dumps")


if __name__ == "__main__":
    main()

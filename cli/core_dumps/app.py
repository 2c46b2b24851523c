"""Owns the program's command group: its help, its version, and `list` if no command is given."""

from __future__ import annotations

from typing import Annotated

import typer

from core_dumps import __version__

app = typer.Typer(
    name="core-dumps",
    help="Find the core dumps of a fleet in their bucket, and open them in a debugger.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


def _version(asked: bool) -> None:  # noqa: FBT001  called by typer
    if asked:
        typer.echo(f"core-dumps {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _app(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001, FBT002  its callback ends the program
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        command = typer.main.get_command(app).commands["list"]  # type: ignore[attr-defined]
        with command.make_context("core-dumps list", []) as sub:
            command.invoke(sub)

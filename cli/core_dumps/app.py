"""Owns the program's command group: its help, its version, and `list` if no command is given."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import Annotated, Any

import typer
import typer.core

from core_dumps import version as own_version

_ORDER = ("list", "info", "bt", "debug", "get", "modules", "debuginfod", "stats", "share", "rm", "man")


class _Group(typer.core.TyperGroup):
    """The commands in the order in which a developer meets them."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  click's settings
        super().__init__(**settings)
        self.commands = {name: self.commands[name] for name in _ORDER} | dict(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  likewise
        """Accept options before the command, as coredumpctl does; without a command, run `list`."""
        if not args and not ctx.resilient_parsing:  # the completion of an empty line offers all commands
            args = ["list"]
        own = {name for option in self.get_params(ctx) for name in option.opts}
        if args and args[0].startswith("-") and args[0].partition("=")[0] not in own:
            valued = self._valued()
            before_dashes = takewhile("--".__ne__, ["", *args])
            words = ["" if before in valued else word for before, word in pairwise(before_dashes)]
            at = next((n for n, word in enumerate(words) if word in self.commands), None)
            args = ["list", *args] if at is None else [args[at], *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)

    def _valued(self) -> set[str]:
        """Return the options that take the next word."""
        options = [option for command in self.commands.values() for option in command.params]
        return {name for option in options if not getattr(option, "is_flag", True) for name in option.opts}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002  likewise
        return list(self.commands)


app = typer.Typer(
    name="core-dumps",
    cls=_Group,
    help="Find the core dumps of a fleet in their bucket, and open them in a debugger.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


def _version(asked: bool) -> None:  # noqa: FBT001  called by typer
    if asked:
        typer.echo(f"core-dumps {own_version()}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[  # noqa: FBT002  its callback ends the program
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Take the options of the program itself."""

"""Owns the manual page, which is made from the texts of --help, so that the two cannot differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core_dumps import version

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOOT = """\
.SH MATCH
A number is a PID. A word that begins with a slash is the path of an executable. \\fIfield\\fR=\\fIvalue\\fR compares a
field of the metadata (docs/contracts.md lists them). Any other word is the name of a command, thread, executable, pod,
container, node, host, key or file. Values may be shell patterns such as \\fIcheckout\\-*\\fR. Values of one field are
alternatives; different fields must all hold. Commands for one dump take the newest that matches.
.SH TIME
\\fIyesterday\\fR, \\fItoday\\fR, \\fInow\\fR, \\fI\\-2h\\fR, \\fI3 days ago\\fR, \\fI2025\\-06\\-30\\fR,
\\fI2025\\-06\\-30 14:00\\fR, \\fI14:00\\fR, \\fI@1751284800\\fR; without a zone in local time.
.SH EXIT STATUS
0 success; 1 no dump matches, or the command failed; 2 the command line is wrong; 130 interrupted by Ctrl\\-C;
141 the reader of the output went away.
.SH ENVIRONMENT
BUCKET_NAME, KEY_TEMPLATE, AWS_* as boto3 reads them, DEBUGINFOD_URLS, NO_COLOR, and CORE_DUMPS_CACHE (default
~/.cache/core\\-dumps; files unused for a week are deleted).
.SH SEE ALSO
coredumpctl(1), gdb(1), core(5)
"""


def render(group: Any) -> str:  # noqa: ANN401  typer's own copy of click has no public types
    """Return the page in man(7) format."""
    lines = [f'.TH CORE\\-DUMPS 1 "" "core\\-dumps {version()}" "User Commands"', ".SH NAME"]
    lines += [f"core\\-dumps \\- {_roff(group.help).rstrip('.').lower()}", ".SH SYNOPSIS", ".nf"]
    commands = [(name, c) for name, c in group.commands.items() if not c.hidden]
    lines += [
        f"\\fBcore\\-dumps {_roff(name)}\\fR [\\fIOPTION\\fR...] [\\fIMATCH\\fR...]" for name, _ in commands
    ]
    shared = _shared([command for _, command in commands])
    lines += [".fi", ".SH COMMANDS"]
    for name, command in commands:
        lines += [f".SS {_roff(name)}", _roff(command.help)]
        lines += [line for option in command.params if _key(option) not in shared for line in _option(option)]
    lines.append(".SH OPTIONS OF EVERY COMMAND")
    lines += [line for option in commands[0][1].params if _key(option) in shared for line in _option(option)]
    return "\n".join(lines) + "\n" + _FOOT


def _shared(commands: list[Any]) -> set[str]:
    """Return the options that all commands share."""
    return set.intersection(*({_key(option) for option in command.params} for command in commands))


def _key(option: Any) -> str:  # noqa: ANN401  likewise
    return " ".join(option.opts)


def _option(option: Any) -> Iterator[str]:  # noqa: ANN401  likewise
    if option.param_type_name == "argument":
        return
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in sorted(option.opts, key=len))
    value = "" if option.is_flag else f" \\fI{_roff(option.metavar or option.name.upper())}\\fR"
    yield ".TP"
    yield names + value
    yield _roff(option.help or "") + "."


def _roff(text: str) -> str:
    """Return text escaped for troff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped

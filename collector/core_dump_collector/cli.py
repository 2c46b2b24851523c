"""Turns the command line into a call and an exit code: 0 done, 1 a check failed, 2 bad configuration."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from core_dump_collector import __version__
from core_dump_collector.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001  argparse exports no other name

OK = 0
FAILED = 1
BAD_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `core-dump-collector`; return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "run":
                return _run(options)
            case "check":
                return _check(options)
            case "configure-host":
                return _configure_host(options)
            case _:
                return _settings()
    except ConfigError as error:
        if sys.stderr is not None:
            sys.stderr.write(f"core-dump-collector: {error}\n")
        return BAD_CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="core-dump-collector",
        description="Upload the core dumps of this node to S3, and delete each only when S3 has it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_with_settings(commands, "run", "collect dumps until SIGTERM")
    command = _add_with_settings(
        commands, "check", "verify this node and the bucket, and say what to do about each failure"
    )
    command.add_argument(
        "--crash", action="store_true", help="let a process of this program crash, and follow its dump"
    )
    command = commands.add_parser(
        "configure-host",
        help="install the helper on a Kubernetes node (docs/kubernetes.md)",
        allow_abbrev=False,
    )
    command.add_argument("root", metavar="ROOT", help="where the host's / is mounted")
    command.add_argument("--force", action="store_true", help="replace the handler of somebody else")
    command.add_argument(
        "--watch-dir",
        metavar="DIR",
        default=os.environ.get("WATCH_DIR", ""),
        help="the directory for dumps on the host [$WATCH_DIR, else as the host's helper.conf says]",
    )
    command.add_argument(
        "--restore", action="store_true", help="remove the helper and restore the former core pattern"
    )
    commands.add_parser("settings", help="print every setting as a Markdown table")
    return parser


def _add_with_settings(commands: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command that takes a directory and every setting."""
    from core_dump_collector import config  # noqa: PLC0415  workers import this module too

    command = commands.add_parser(
        name,
        help=text,
        usage="%(prog)s WATCH_DIR [--SETTING VALUE]...   (-h lists the settings; --bucket-name is required)",
        description=f"{text[0].upper()}{text[1:]}. Each flag is also an environment variable (BUCKET_NAME for "
        "--bucket-name); AWS_REGION, AWS_PROFILE and other AWS_* variables are used as well.",
        allow_abbrev=False,
    )
    command.add_argument("watch_dir", metavar="WATCH_DIR", help="directory where the dumps arrive")
    for field, info in config.Settings.model_fields.items():
        default = config.default_text(info)
        explained = f"{info.description} [{default}]" if default else str(info.description)
        names = ["--" + name.replace("_", "-") for name in config.names_of(field)]
        command.add_argument(*names, metavar="VALUE", help=explained.replace("`", "").replace("%", "%%"))
    return command


def _flags(options: argparse.Namespace) -> dict[str, str]:
    return {
        name: value
        for name, value in vars(options).items()
        if value is not None and name not in {"command", "watch_dir", "crash"}
    }


def _run(options: argparse.Namespace) -> int:
    from core_dump_collector import config, logs  # noqa: PLC0415  likewise
    from core_dump_collector.daemon import Daemon  # noqa: PLC0415

    settings = config.load(_flags(options))
    writer = logs.configure(settings)
    try:
        clean = Daemon(options.watch_dir, settings, writer).run()
    finally:
        writer.drain()
    if not clean:
        os._exit(OK)  # the interpreter would wait for a worker that a frozen file system holds
    return OK


def _check(options: argparse.Namespace) -> int:
    from core_dump_collector import check, config  # noqa: PLC0415  likewise

    settings = config.load(_flags(options))
    good = True
    for finding in check.check(options.watch_dir, settings, crash=options.crash):
        good &= finding.level is not check.Level.FAIL
        sys.stdout.write(f"{finding.level.value:4}  {finding.text}\n")
        sys.stdout.flush()
    return OK if good else FAILED


def _configure_host(options: argparse.Namespace) -> int:
    from core_dump_collector.node import host  # noqa: PLC0415  likewise

    given: list[str] = []
    if not options.restore:
        given += ["--force"] * options.force
        given += ["--watch-dir", options.watch_dir] if options.watch_dir else []
    return host.configure(options.root, restore=options.restore, options=given)


def _settings() -> int:
    from core_dump_collector import config  # noqa: PLC0415  likewise

    sys.stdout.write(config.render_markdown())
    return OK


if __name__ == "__main__":
    sys.exit(main())

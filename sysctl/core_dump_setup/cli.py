"""Turns the command line into a run: exit code 0 done, 1 failed and undone, 2 wrong usage."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from core_dump_setup import boot, cgroup, commands, kernel, release
from core_dump_setup.errors import SetupError
from core_dump_setup.files import RECORD, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

DESCRIPTION = """Make the kernel start core-dump-helper at every crash, prove that it works, and undo it.

Without --root this host is set up, its running kernel included. In a chroot, a container or an image build, where the
kernel would not find the helper, only files are prepared and the pattern is set at the next boot.
"""
COMMANDS = {
    "install": "copy the files of a checkout, then activate",
    "activate": "save the core pattern in use, set ours for now and every boot, crash a process and find its dump",
    "test": "crash a throw-away process and find its dump",
    "deactivate": "put the saved pattern back, if the one in use is ours",
    "uninstall": "deactivate, then remove the files; dumps and helper.conf stay",
    "cgroup": "make the cgroup that helpers move into; core-dump-cgroup.service does it at every boot",
}
OPTIONS = {
    "--force": (("install", "activate"), "replace the handler of somebody else; uninstalling restores it"),
    "--no-test": (("install", "activate"), "crash no process"),
    "--keep-test-dump": (("install", "activate", "test"), "leave the dump of the test to the collector"),
    "--purge": (
        ("uninstall",),
        "also remove helper.conf, edited files, and the watch directory when it is empty",
    ),
    "--dry-run": (("install", "activate", "deactivate", "uninstall"), "only say what would be done"),
    "--host": (("install", "uninstall"), "fail where the running kernel cannot be set"),
}
FILES = (
    *commands.CONFIGURATION,
    boot.FILE,
    boot.MASKED,
    boot.SHARE + "/" + boot.NAME,
    cgroup.UNIT,
    kernel.SAVED,
    RECORD,
    commands.CALIBRATION,
)


def main(arguments: list[str]) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    if os.geteuid() != 0:
        sys.stderr.write("core-dump-setup: root is needed: sudo core-dump-setup %s\n" % options.command)
        return 1
    tree = Tree(options.root, dry_run=options.dry_run)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    os.umask(0o022)
    try:
        tree.lock()
        tree.remove_leftovers(*FILES)
        release.remove_leftovers(tree)
        _run(options, tree)
    except (SetupError, OSError) as error:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        sys.stderr.write("core-dump-setup: %s\n" % error)
        failures = tree.undo()
        for failure in failures:
            sys.stderr.write("core-dump-setup: could not be undone: %s\n" % failure)
        if options.command in ("install", "activate") and not failures:
            sys.stderr.write("core-dump-setup: everything is as it was before\n")
        return 1
    finally:
        tree.unlock()
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    raise SetupError("interrupted by signal %d" % number)


def _run(options: argparse.Namespace, tree: Tree) -> None:
    wanted = commands.Options(
        force=options.force,
        test=not options.no_test,
        keep_dump=options.keep_test_dump,
        purge=options.purge,
        host=options.host,
    )
    setup = commands.Setup(tree, _checkout(), wanted)
    step = {
        "install": setup.install,
        "activate": setup.activate,
        "test": setup.prove,
        "deactivate": setup.deactivate,
        "uninstall": setup.uninstall,
        "cgroup": setup.prepare_cgroup,
    }
    step[options.command]()


def _checkout() -> str:
    """Return the checkout that this program lies in, or nothing where it is installed."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return root if os.path.isfile(os.path.join(root, "sysctl", "install.sh")) else ""


def _root(text: str) -> str:
    """Check --root: any directory, `/` included; the running kernel is left alone."""
    if not text:
        raise argparse.ArgumentTypeError("takes a directory, not an empty name")
    if os.path.lexists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError("%s is not a directory" % text)
    return os.path.realpath(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="core-dump-setup", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {name[2:].replace("-", "_"): False for name in OPTIONS}
    parser.set_defaults(root="", **defaults)
    commands_ = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands_.required = True
    for command, text in COMMANDS.items():
        sub = commands_.add_parser(
            command, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        for name, (where, explained) in OPTIONS.items():
            if command in where:
                sub.add_argument(name, action="store_true", help=explained)
        if command not in ("test", "cgroup"):
            sub.add_argument(
                "--root",
                metavar="DIR",
                type=_root,
                default=argparse.SUPPRESS,
                help="prepare files below DIR; leave the kernel alone",
            )
    return parser

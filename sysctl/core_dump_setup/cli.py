"""Turns the command line into a run: exit code 0 done, 1 failed and undone, 2 wrong usage."""

from __future__ import annotations

import argparse
import os
import subprocess

from core_dump_setup import boot, commands, interrupts, kernel, listener, location, reassert, release
from core_dump_setup.errors import SetupError, complain, escape_unprintable, warn
from core_dump_setup.files import RECORD, Tree

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
    "reassert": "give the pattern back if something else took it and REASSERT=yes; core-dump-reassert.timer does it",
    "use-socket": "let the kernel send cores to the socket; core-dump-listener.service does it when it is ready",
    "use-pipe": "let the kernel start the helper; core-dump-listener.service does it before it ends",
    "cgroup": "make the cgroup that helpers move into; core-dump-cgroup.service does it at every boot",
}
OPTIONS = {
    "--force": (
        ("install", "activate"),
        "replace any handler, not only the distribution's; uninstalling restores it",
    ),
    "--socket": (
        ("install", "activate"),
        "receive cores over a socket, from Linux 6.16 on; stays so until deactivate",
    ),
    "--no-test": (("install", "activate"), "crash no process"),
    "--keep-test-dump": (("install", "activate", "test"), "leave the dump of the test to the collector"),
    "--purge": (
        ("uninstall",),
        "also remove helper.conf, edited files, and the watch directory when it is empty",
    ),
    "--dry-run": (("install", "activate", "deactivate", "uninstall"), "only say what would be done"),
    "--host": (("install", "uninstall"), "fail where the running kernel cannot be set"),
}
WITHOUT_LOCK = ("use-socket", "use-pipe")
"""Commands of a unit that `activate` starts and waits for."""
EXPECTED = (SetupError, OSError, subprocess.SubprocessError, interrupts.Interrupted, KeyboardInterrupt)
"""Errors that need no traceback."""
FILES = (
    *commands.CONFIGURATION,
    boot.FILE,
    *(boot.MASKED + name for name in boot.SERVICES),
    boot.SHARE + "/" + boot.NAME,
    *(path for path, _ in commands.UNITS),
    location.DROP_IN,
    kernel.SAVED,
    reassert.TIMES,
    RECORD,
    commands.CALIBRATION,
)


def main(arguments: list[str]) -> int:
    """Run one command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dry_run and options.watch_dir:
        parser.error("--dry-run cannot show what --watch-dir changes: it reads WATCH_DIR from helper.conf")
    escape_unprintable()
    if os.geteuid() != 0:
        complain("root is needed: sudo core-dump-setup " + options.command)
        return 1
    tree = Tree(options.root, dry_run=options.dry_run)
    os.umask(0o022)
    if options.command in WITHOUT_LOCK:
        return _switch(options.command, tree)
    interrupts.catch()
    try:
        tree.lock()
        tree.remove_leftovers(*FILES)
        release.remove_leftovers(tree)
        _run(options, tree)
        interrupts.ignore()
    except BaseException as error:
        interrupts.ignore()
        if tree.is_final:
            warn("everything is in place, but the last step failed: %r" % error)
            return 0
        _undo(tree, error, options.command)
        if not isinstance(error, EXPECTED):
            raise
        return 1
    finally:
        tree.unlock()
    return 0


def _switch(command: str, tree: Tree) -> int:
    """Change the core pattern for a unit that the run with the lock has started; return the exit code."""
    try:
        if command == "use-socket":
            listener.use_socket()
        else:
            setup = commands.Setup(tree, "", commands.Options())
            listener.use_pipe(boot.ours(tree, setup.shipped(boot.NAME))[0])
    except EXPECTED as error:
        complain(str(error) or type(error).__name__)
        return 1
    return 0


def _undo(tree: Tree, error: BaseException, command: str) -> None:
    """Undo a run that failed and say what remains of it."""
    complain(str(error) or type(error).__name__)
    changed, failures = tree.is_changed(), tree.undo()
    for failure in failures:
        complain("could not be undone: " + failure)
    if command in ("install", "activate") and changed and not failures:
        complain("everything is as it was before")


def _run(options: argparse.Namespace, tree: Tree) -> None:
    wanted = commands.Options(
        force=options.force,
        test=not options.no_test,
        keep_dump=options.keep_test_dump,
        purge=options.purge,
        host=options.host,
        watch_dir=options.watch_dir,
        socket=options.socket,
    )
    setup = commands.Setup(tree, _checkout(), wanted)
    step = {
        "install": setup.install,
        "activate": setup.activate,
        "test": setup.prove,
        "deactivate": setup.deactivate,
        "uninstall": setup.uninstall,
        "reassert": setup.reassert,
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


def _directory(text: str) -> str:
    """Check --watch-dir: a path that systemd understands as the helper does."""
    try:
        location.check(text)
    except SetupError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="core-dump-setup", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {name[2:].replace("-", "_"): False for name in OPTIONS}
    parser.set_defaults(root="", watch_dir="", **defaults)
    commands_ = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands_.required = True
    for command, text in COMMANDS.items():
        sub = commands_.add_parser(
            command, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        for name, (where, explained) in OPTIONS.items():
            if command in where:
                sub.add_argument(name, action="store_true", help=explained)
        if command in ("install", "activate"):
            sub.add_argument(
                "--watch-dir",
                metavar="DIR",
                type=_directory,
                default=argparse.SUPPRESS,
                help="set WATCH_DIR in helper.conf: the helper, the collector's unit and tmpfiles.d follow it",
            )
        if command not in ("test", "cgroup", "reassert", *WITHOUT_LOCK):
            sub.add_argument(
                "--root",
                metavar="DIR",
                type=_root,
                default=argparse.SUPPRESS,
                help="prepare files below DIR; leave the kernel alone",
            )
    return parser

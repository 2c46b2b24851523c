"""Receive one core dump from the kernel, compress it, and publish it complete in the watch directory.

The kernel starts this program at every crash, as root, in the initial namespaces, without environment variables. Only
descriptor 0 (the core) and, on some kernels, descriptor 3 (a pidfd) are open: core(5). It imports little because it
starts so often. The crashed process chooses every argument and all of /proc/PID. See docs/helper.md.
"""

from __future__ import annotations

import sys

from core_dump_helper.crash import parse_arguments
from core_dump_helper.handler import Handler
from core_dump_helper.settings import CONFIG, Settings
from core_dump_helper.system import log, secure_process

VERSION = "0.1.0"
"""Of the whole project: pyproject.toml reads it here."""
HELP = """core-dump-helper: the kernel starts it through kernel.core_pattern, once for each crash.

  core-dump-helper [-C<path>] -P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e   < core
  core-dump-helper --listen PATH [-C<path>] [-R<path>]   receive cores over a socket; make the file -R when ready
  core-dump-helper --calibrate [-C<path>]   measure the compressors of this host and remember the fastest
  core-dump-helper --check [-C<path>]       tell whether a crash on this host would leave a dump
  core-dump-helper --help | --version       print this text or the version

-C<path> names another configuration file than /etc/core-dump-handler/helper.conf. Its settings and their defaults:
"""


def run_tool(argv: list[str], config: str) -> int:
    """Run a command that the kernel does not start; return its exit code."""
    name = argv[0]
    if name == "--copy-modules":  # modules.Capture starts it
        from core_dump_helper.modulecopy import copy

        return copy(config, *map(int, argv[-2:]))
    if name == "--check":
        from core_dump_helper.check import check

        return check(config)
    from core_dump_helper.calibrate import calibrate

    return calibrate(config)


def main() -> int:
    """Run one command; return its exit code, which the kernel ignores."""
    argv = sys.argv[1:]
    if not argv or argv[0] == "--help":
        print(HELP + "".join("  %s=%s\n" % item for item in Settings.defaults().items()), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print("core-dump-helper", VERSION)
        return 0
    crash = parse_arguments(argv)
    if argv[0] == "--listen":
        from core_dump_helper.listen import listen

        return listen(argv[1:], crash.config)
    if argv[0] in ("--calibrate", "--check", "--copy-modules"):
        return run_tool(argv, crash.config or CONFIG)
    try:
        core = secure_process()
    except OSError as error:
        log("%s; no dump: %s" % (crash.sentence(), error), 3)
        return 1
    return Handler(crash, core).handle()

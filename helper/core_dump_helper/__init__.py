"""Take one core dump from the kernel's pipe, compress it, and publish it whole in the watch directory.

The kernel starts this program at every crash, as root, in the initial namespaces, with no environment and with only
descriptor 0 (the core) and perhaps 3 (a pidfd) open: core(5). It imports little because it starts so often.
Every argument, and all of /proc/PID, is chosen by whoever crashed. docs/helper.md says more.
"""

from __future__ import annotations

import sys

from core_dump_helper.handler import Handler
from core_dump_helper.settings import CONFIG, Settings, parse_arguments
from core_dump_helper.system import Refused, log, secure_process

VERSION = "0.1.0"
HELP = """core-dump-helper: started by the kernel through kernel.core_pattern, once for each crash.

  core-dump-helper [-C<path>] -P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e   < core
  core-dump-helper --calibrate [-C<path>]   measure the compressors of this host and remember the fastest
  core-dump-helper --help | --version

-C<path> names another configuration file than /etc/core-dump-handler/helper.conf. Its keys and their defaults:
"""


def main() -> int:
    """Do what the command line says; the kernel ignores the exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] == "--help":
        print(HELP + "".join("  %s=%s\n" % item for item in Settings.defaults().items()), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print("core-dump-helper", VERSION)
        return 0
    if argv[0] == "--calibrate":
        from core_dump_helper.calibrate import calibrate

        return calibrate(parse_arguments(argv[1:]).get("C") or CONFIG)
    try:
        Handler(argv, secure_process()).run()
    except Refused as refused:
        log("no dump: " + ": ".join(filter(None, refused.args)))
        return 1
    except Exception as error:  # noqa: BLE001 - nobody reads a traceback here; our end releases the process
        log("no dump: %s: %s" % (type(error).__name__, error), 3)
        return 1
    return 0

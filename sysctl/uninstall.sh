#!/bin/sh
# Gives the kernel the core pattern that was there before (if ours is in use) and removes what install.sh installed.
# sysctl/uninstall.sh --help lists the options; docs/amazon-linux.md explains it.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
/usr/bin/python3 -ISc 'import sys; sys.exit(sys.version_info < (3, 7))' 2>/dev/null ||
    { echo "uninstall.sh: /usr/bin/python3, 3.7 or newer, is needed" >&2; exit 1; }
exec /usr/bin/python3 -IS "$here/core-dump-setup" uninstall "$@"

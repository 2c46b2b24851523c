#!/bin/sh
# Installs the helper on this host and makes the kernel use it. Safe to run again: it upgrades in place.
# sysctl/install.sh --help lists the options; docs/amazon-linux.md explains it.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
/usr/bin/python3 -ISc 'import sys; sys.exit(sys.version_info < (3, 7))' 2>/dev/null ||
    { echo "install.sh: the helper needs /usr/bin/python3, 3.7 or newer: install python3 with yum, dnf or apt-get" >&2; exit 1; }
exec /usr/bin/python3 -IS "$here/core-dump-setup" install "$@"

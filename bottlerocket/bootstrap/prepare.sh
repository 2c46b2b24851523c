#!/bin/sh
# Makes the directory for core dumps on a Bottlerocket node; a failure stops the boot (essential = true) and says why.
# file: anybody may create a file, nobody may list or touch another's (1733). dd: root alone (0700).
set -eu
way=${1:-${CORE_DUMP_WAY:-dd}}
root=${CORE_DUMP_ROOT:-/.bottlerocket/rootfs}
directory=$root/var/core_dumps

fail() { echo "core-dumps bootstrap: $*" >&2; exit 1; }
case $way in
file) mode=1733 ;;
dd) mode=0700 ;;
*) fail "way '$way': must be file or dd" ;;
esac
[ -d "$root/var" ] && [ ! -h "$root/var" ] || fail "$root/var is not a directory: not a bootstrap container?"
[ ! -h "$directory" ] || fail "$directory is a symbolic link"
mkdir -p "$directory" || fail "cannot create $directory"
chown 0:0 "$directory" || fail "cannot give $directory to root"
chmod "$mode" "$directory" || fail "cannot set mode $mode of $directory"
found=$(stat -c '%a %u %g' "$directory")
[ "$found" = "${mode#0} 0 0" ] || fail "$directory has $found in place of ${mode#0} 0 0"
echo "core-dumps bootstrap: $directory is ready for $way"

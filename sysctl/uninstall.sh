#!/bin/sh
# Puts the kernel's old core pattern back (if the one in use is ours) and removes what install.sh installed.
# Dumps and helper.conf stay unless --purge is given; --purge removes a watch directory only when it is empty.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
purge=no root='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
    --purge) purge=yes ;;
    --dry-run) dry_run=--dry-run ;;
    --root) [ $# -gt 1 ] || { echo "uninstall.sh: --root takes a directory" >&2; exit 2; }; root=${2%/}; shift ;;
    *) echo "usage: uninstall.sh [--purge] [--dry-run] [--root DIR]" >&2; exit 2 ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || { echo "uninstall.sh: root is needed: sudo $0" >&2; exit 1; }
sh "$here/core-dump-setup" deactivate ${dry_run:+"$dry_run"} ${root:+--root "$root"}
remove() { if [ -n "$dry_run" ]; then echo "uninstall.sh: would remove $*"; else rm -f "$@"; fi; }
remove_empty() { [ -n "$dry_run" ] || rmdir "$@" 2>/dev/null || :; }

program=$root/usr/libexec/core-dump-handler
remove -r "$program"/[0-9]*-*
remove "$program/core-dump-helper" "$program/core-dump-setup" \
    "$root/usr/share/core-dump-handler/69-core-dump.conf" "$root/etc/tmpfiles.d/core-dump-handler.conf" \
    "$root/etc/security/limits.d/69-core-dump.conf" "$root/var/lib/core-dump-handler/compressor"
if [ "$purge" = yes ]; then
    directory=$(sed -n 's/^[[:space:]]*WATCH_DIR[[:space:]]*=[[:space:]]*//p' \
        "$root/etc/core-dump-handler/helper.conf" 2>/dev/null | tail -n 1)
    directory=$root${directory:-/core_dumps}
    remove "$root/etc/core-dump-handler/helper.conf"
    if [ -z "$dry_run" ] && [ -d "$directory/.helper" ]; then rm -rf "$directory/.helper"; fi
    remove_empty "$directory"
    [ ! -d "$directory" ] || echo "uninstall.sh: $directory still holds dumps"
fi
remove_empty "$program" "$root/usr/share/core-dump-handler"
remove_empty "$root/etc/core-dump-handler"
remove_empty "$root/var/lib/core-dump-handler"

#!/bin/sh
# Prepares the directories for core dumps on a Bottlerocket node: /var/core_dumps, root's alone for socket and dd (0700),
# or open to every process that creates files but lists none for file (1733); for socket also /var/core-dump-listener.
# Repairs a wrong owner or mode, moves away a file that has the name, and says so. Anything else is an error, which stops
# the boot only where essential = true is set.
set -eu
way=${1:-${CORE_DUMP_WAY:-dd}}
root=${CORE_DUMP_ROOT:-/.bottlerocket/rootfs}

say() { echo "core-dumps bootstrap: $*"; }
fail() { say "$*" >&2; exit 1; }
state() { stat -c '%a %u %g' "$directory"; }
prepare() {
    directory=$root/$1 mode=$2
    [ ! -h "$directory" ] || fail "$directory is a symbolic link: remove it, or make it a directory"
    if [ -e "$directory" ] && [ ! -d "$directory" ]; then
        mv "$directory" "$directory.moved-$(date +%s)" || fail "$directory is not a directory and cannot be moved away"
        say "moved a file away that was at $directory"
    fi
    if [ ! -d "$directory" ]; then
        mkdir "$directory" || fail "cannot create $directory"
        before="$mode 0 0"
    else
        before=$(state)
    fi
    # A numeric mode leaves the set-group-ID bit of a directory alone (chmod(1)): it is cleared by name.
    chown 0:0 "$directory" || fail "cannot give $directory to root"
    chmod a-s "$directory" || fail "cannot clear the set-ID bits of $directory"
    chmod "$mode" "$directory" || fail "cannot set mode $mode of $directory"
    [ "$(state)" = "$mode 0 0" ] || fail "$directory has $(state) instead of $mode 0 0 (mode, owner, group)"
    [ "$before" = "$mode 0 0" ] || say "repaired $directory: it had $before (mode, owner, group)"
    say "$directory is ready for $way"
}
[ -d "$root/var" ] && [ ! -h "$root/var" ] || fail "$root/var is not a directory: not a bootstrap container?"
case $way in
file) prepare var/core_dumps 1733 ;;
dd) prepare var/core_dumps 700 ;;
socket)
    prepare var/core_dumps 700
    prepare var/core-dump-listener 700
    ;;
*) fail "way '$way': must be socket, dd or file" ;;
esac
# Since Linux 6.15 the kernel can write small segments first: then stacks come before heaps, and a core that is cut short
# has them. Here and not in the node's settings, because an older kernel refuses those, and the boot fails.
sort=$root/proc/sys/kernel/core_sort_vma
if [ -e "$sort" ] && ! echo 1 2>/dev/null >"$sort"; then
    say "cannot set kernel.core_sort_vma: a core that is cut short will lack its stacks"
fi

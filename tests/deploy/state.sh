#!/bin/sh
# Functions of the scripts that run in a virtual machine: the state after a command, in lines that a test reads.
state() { # TAG: where a crash would go now
    pattern=$(cat /proc/sys/kernel/core_pattern)
    case $pattern in
    '|'*core-dump-helper*) /usr/libexec/core-dump-handler/core-dump-helper --version >/dev/null 2>&1 &&
        echo "$1 ours" || echo "$1 BROKEN" ;;
    *) echo "$1 $pattern" ;;
    esac
}
run() { # TAG COMMAND...
    tag=$1; shift
    "$@" >/tmp/said 2>&1
    echo "$tag exit $?"
    sed "s/^/$tag says /" /tmp/said
    state "$tag"
}

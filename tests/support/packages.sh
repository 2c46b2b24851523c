#!/bin/sh
# Install the Debian packages that tests use, when root; else name them.
set -eu
missing=
need() { # PACKAGE PATH...: missing unless one of the paths exists
    package=$1
    shift
    for path in "$@"; do [ ! -e "$path" ] || return 0; done
    missing="$missing $package"
}
install() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing: $*"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    else
        echo "install these packages first: $*"
        return 1
    fi
}
if [ "${1:-}" = venv ]; then # Debian ships Python without the module that makes virtual environments
    install python3-venv
    exit
fi
if [ "${1:-}" = programs ]; then # what `make test-programs` crashes
    need g++ /usr/bin/g++
    need gcc-multilib /usr/include/asm
    need redis-server /usr/bin/redis-server
    need default-jdk-headless /usr/bin/java
    need nodejs /usr/bin/node
    need golang-go /usr/bin/go
    need delve /usr/bin/dlv
    need mono-mcs /usr/bin/mcs
    need rustc /usr/bin/rustc "$HOME/.cargo/bin/rustc"
    need python3 /usr/bin/python3
    need elfutils /usr/bin/eu-stack
    need lldb /usr/bin/lldb
    need redis-tools /usr/bin/redis-cli
    need nginx-light /usr/sbin/nginx
    need postgresql /usr/lib/postgresql/*/bin/postgres
    need chromium /usr/bin/chromium
    [ -n "$missing" ] || exit 0
    # shellcheck disable=SC2086  # a list of words
    install $missing
    exit
fi
if [ "${1:-}" = swift ]; then # the store of `make test-swift`
    need swift-proxy /usr/bin/swift-proxy-server
    need swift-account /usr/bin/swift-account-server
    need swift-container /usr/bin/swift-container-server
    need swift-object /usr/bin/swift-object-server
    need memcached /usr/bin/memcached
    [ -n "$missing" ] || exit 0
    # shellcheck disable=SC2086  # a list of words
    install $missing
    exit
fi
need pigz /usr/bin/pigz
need gdb /usr/bin/gdb
need gcc /usr/bin/gcc
need libc6-dev /usr/include/stdio.h
need haproxy /usr/sbin/haproxy
need openssl /usr/bin/openssl
need strace /usr/bin/strace
need btrfs-progs /usr/bin/btrfs /bin/btrfs /usr/sbin/btrfs
need prometheus /usr/bin/promtool
need util-linux /usr/bin/unshare
need rpm /usr/bin/rpmbuild
[ -n "$missing" ] || exit 0
# shellcheck disable=SC2086  # a list of words
install $missing || echo "tests that need them are skipped"

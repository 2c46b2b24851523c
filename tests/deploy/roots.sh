#!/bin/sh
# Makes the roots of the heavy tiers below .cache: python-root (base of the image), vm-root, walk-root, kernel (make vm).
set -eu
cd "$(dirname "$0")/../.."
python=${1:-python3}
for program in debootstrap dockerd ctr ip rpmbuild qemu-system-x86_64 cpio; do
    command -v "$program" >/dev/null || missing="${missing:-} $program"
done
if [ -n "${missing:-}" ]; then
    echo "missing:$missing; apt-get install debootstrap docker.io containernetworking-plugins iproute2 rpm qemu-system-x86 cpio" >&2
    exit 1
fi
[ "$(id -u)" = 0 ] || { echo "root is needed to make root file systems: sudo make ..." >&2; exit 1; }
mkdir -p .cache
if [ ! -e .cache/python-root/ready ]; then
    rm -rf .cache/python-root
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm .cache/python-root >/dev/null
    touch .cache/python-root/ready
fi
if ! cmp -s collector/requirements.txt .cache/requirements.txt; then
    rm -rf .cache/python-root/wheels
    options='-q --only-binary=:all: --python-version 3.11 -d .cache/python-root/wheels'
    # shellcheck disable=SC2086  # a list of words; two runs, since only the requirements have hashes
    "$python" -m pip download $options -r collector/requirements.txt
    # shellcheck disable=SC2086
    "$python" -m pip download $options 'hatchling>=1.26'
    cp collector/requirements.txt .cache/requirements.txt
fi
if [ "${2:-}" = vm ] && [ ! -e .cache/vm-root/ready ]; then
    rm -rf .cache/vm-root .cache/kernel
    cp -a .cache/python-root .cache/vm-root
    chroot .cache/vm-root apt-get install -y -qq --no-install-recommends systemd systemd-sysv udev dbus pigz procps kmod rpm >/dev/null
    rm -rf .cache/vm-root/wheels .cache/vm-root/var/lib/apt/lists .cache/vm-root/usr/share/doc .cache/vm-root/var/cache/apt
    image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)/\1/p' | head -n 1)
    (cd .cache && apt-get download -qq "$image" && dpkg-deb -x "$image"_*.deb kernel && rm "$image"_*.deb)
    touch .cache/vm-root/ready
fi
[ "${2:-}" = vm ] || exit 0
# walk-root: a Debian with systemd-coredump, and the wheels that `make run` installs.
"$python" -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))
print(*p["dependency-groups"]["demo"], *p["project"]["optional-dependencies"]["cli"], sep="\n")
print("pip>=25.1", "editables", "hatchling>=1.26", sep="\n")' >.cache/walk.txt
if ! cmp -s .cache/walk.txt .cache/walk-root/ready; then
    rm -rf .cache/walk-root
    cp -a .cache/vm-root .cache/walk-root
    rm .cache/walk-root/ready
    chroot .cache/walk-root sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd-coredump make >/dev/null'
    rm -rf .cache/walk-root/var/lib/apt/lists .cache/walk-root/usr/share/doc .cache/walk-root/var/cache/apt
    cp -a .cache/python-root/wheels .cache/walk-root/wheels
    "$python" -m pip download -q --only-binary=:all: --python-version 3.11 -d .cache/walk-root/wheels -r .cache/walk.txt
    cp .cache/walk.txt .cache/walk-root/ready
fi

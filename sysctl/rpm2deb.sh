#!/bin/sh
# sysctl/rpm2deb.sh PACKAGE.rpm DIRECTORY: make a Debian package of an RPM of ours: the same files, the same scriptlets.
# rpm gives them the number of installed releases, dpkg a word (Debian Policy, "Package maintainer scripts").
set -eu
package=$(realpath "$1") target=$(realpath "$2")
tag() { rpm -qp --qf "%{$1}" "$package" 2>/dev/null; }
# shellcheck disable=SC2016  # the scripts of the package expand these
script() { # TAG NAME WORDS: a maintainer script that runs a scriptlet with the number that it knows
    body=$(tag "$1")
    [ "$body" != '(none)' ] || return 0
    printf '#!/bin/sh\ncase $1 in\n%s\n*) exit 0 ;;\nesac\n%s\n' "$3" "$body" >"$tree/DEBIAN/$2"
    chmod 755 "$tree/DEBIAN/$2"
}
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"
(cd "$tree" && rpm2cpio "$package" | cpio -idm --quiet)
mkdir "$tree/DEBIAN"
case $(tag ARCH) in noarch) arch=all ;; x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; *) arch=$(tag ARCH) ;; esac
needs=$(rpm -qp --requires "$package" 2>/dev/null | sed -n 's#^/usr/bin/\(python3.*\)#\1#p; s/^\(pigz\|core-dump-handler\)$/\1/p' | paste -sd,)
cat >"$tree/DEBIAN/control" <<CONTROL
Package: $(tag NAME)
Version: $(tag VERSION)-$(tag RELEASE)
Architecture: $arch
Maintainer: the authors of Core Dump Handler <core-dump-handler@invalid>
Depends: $needs
Section: admin
Priority: optional
Description: $(tag SUMMARY)
$(tag DESCRIPTION | sed 's/^/ /')
CONTROL
rpm -qp --configfiles "$package" 2>/dev/null | grep '^/' >"$tree/DEBIAN/conffiles" || rm "$tree/DEBIAN/conffiles"
script PREIN preinst 'install) set -- 1 ;;
upgrade) set -- 2 ;;'
# shellcheck disable=SC2016  # likewise
script POSTIN postinst 'configure) [ -n "$2" ] && set -- 2 || set -- 1 ;;'
script PREUN prerm 'remove) set -- 0 ;;
upgrade) set -- 1 ;;'
script POSTUN postrm 'remove) set -- 0 ;;
upgrade) set -- 1 ;;'
dpkg-deb --root-owner-group -Zgzip --build "$tree" "$target" | sed 's/^/rpm2deb.sh: /'

#!/bin/sh
# sysctl/collector-tree.sh TREE PYTHON: lay out the collector's environment for /usr/bin/python3.11 below TREE, as
# /opt/core-dump-handler. Its packages are wheels with pinned hashes; PYTHON, with pip, only downloads and unpacks them.
set -eu
tree=$1 python=$2
cd "$(dirname "$0")/.."
home=$tree/opt/core-dump-handler
site=$home/lib/python3.11/site-packages
rm -rf "$tree"
mkdir -p "$home/bin"
"$python" -m pip install -q --disable-pip-version-check --no-compile --require-hashes --only-binary :all: \
    --python-version 3.11 --target "$site" -r collector/requirements.txt
"$python" -m pip install -q --disable-pip-version-check --no-compile --no-deps --upgrade --target "$site" .
rm -rf "${site:?}/bin" "$site/share" "$site/core_dumps"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n' >"$home/pyvenv.cfg"
ln -s /usr/bin/python3.11 "$home/bin/python3"
cat >"$home/bin/core-dump-collector" <<'PY'
#!/opt/core-dump-handler/bin/python3
import sys

from core_dump_collector.cli import main

sys.exit(main())
PY
chmod 755 "$home/bin/core-dump-collector"
# The unit may not write there. The compiled form is for this version of Python only.
if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    "$python" -m compileall -q --invalidation-mode unchecked-hash -s "$tree" "$site"
fi

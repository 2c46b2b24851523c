"""Installs the helper on a host: its files, kernel.core_pattern, and the proof that a crash leaves a dump.

Used by install.sh and uninstall.sh, by the RPM and by `core-dump-collector configure-host`. Python 3.7, standard
library. Every file is replaced by rename, one lock is held for the whole run, and whatever fails before the proof
has succeeded is undone.
"""

"""Owns the dump's names: while it is written, and when it is whole."""

from __future__ import annotations

import fcntl
import os
import time

from core_dump_helper.system import NEW_FILE, Refused, exists

PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-"


def file_name(crash: dict[str, str], copy: int, suffix: str) -> str:
    """Return `core-%e-%t-%p-%s[-copy]suffix`, every byte of %e that is not plain as `_`."""
    comm = "".join(chr(byte) if byte in PLAIN else "_" for byte in os.fsencode(crash["e"])[:180])
    if comm[:1] in ("", "-", "."):
        comm = "_" + comm[1:]
    when = crash["t"] or str(int(time.time()))
    name = "core-%s-%s-%s-%s" % (
        comm,
        when,
        (crash["p"] or crash["P"] or "0")[-10:],
        (crash["s"] or "0")[-3:],
    )
    return name + ("-%d" % copy if copy else "") + suffix


def create(directory: int, crash: dict[str, str], suffix: str) -> tuple[int, str]:
    """Create and lock the `.partial` file under a free name; return its descriptor and the final name.

    Who holds NAME.partial is the only one who may publish NAME, so a look at NAME after O_EXCL needs no lock.
    """
    for copy in range(10000):
        name = file_name(crash, copy, suffix)
        try:
            dump = os.open(name + ".partial", NEW_FILE | os.O_EXCL, 0o600, dir_fd=directory)
        except FileExistsError:
            continue
        try:
            fcntl.flock(dump, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not exists(name, directory) and os.fstat(dump).st_nlink == 1:
                return dump, name
            os.unlink(name + ".partial", dir_fd=directory)
        except OSError:  # somebody took it for abandoned before it was locked
            pass
        os.close(dump)
    raise Refused("directory", "10,000 names are taken")


def publish(directory: int, dump: int, name: str, crash: dict[str, str], suffix: str) -> str:
    """Make the dump durable and give it its final name, which never replaces another file's."""
    os.fsync(dump)
    partial, copy = name + ".partial", 0
    while exists(name, directory):  # only where others may write to the directory
        copy += 1
        name = file_name(crash, copy, suffix)
    os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
    return name


def percent(value: bytes) -> str:
    """Encode bytes that are not plain as %XX."""
    return "".join(chr(byte) if byte in PLAIN + b"/" else "%%%02X" % byte for byte in value)

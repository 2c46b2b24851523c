"""Owns the dump's file: its name while it is written and once it is complete, and its extended attributes."""

from __future__ import annotations

import fcntl
import os
import time

from core_dump_helper.system import NEW_FILE, PLAIN, Refused, exists, log

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.crash import Crash

ATTRIBUTE_SPACE = 2200
"""Bytes for the attributes known at the start: ext4 has 4 KiB for all, and the collector adds its own."""
IDENTITY_SPACE = 900
"""Bytes of ATTRIBUTE_SPACE that are kept for what the container runtime says."""
FRAMES_SPACE = 720
"""Bytes for the attributes that tell where the thread was."""
RESULT_SPACE = 600
"""Bytes for the attributes known at the end."""


def file_name(crash: Crash, copy: int, suffix: str) -> str:
    """Return `core-%e-%t-%p-%s[-copy]suffix`, with `_` for every byte of %e that is not plain."""
    comm = "".join(chr(byte) if byte in PLAIN else "_" for byte in os.fsencode(crash.thread)[:180])
    if comm[:1] in ("", "-", "."):
        comm = "_" + comm[1:]
    timestamp = crash.timestamp or str(int(time.time()))
    pid = crash.ns_pid or crash.pid or "0"
    name = "core-%s-%s-%s-%s" % (comm, timestamp, pid[-10:], (crash.signal or "0")[-3:])
    return name + ("-%d" % copy if copy else "") + suffix


def create_partial(directory: int, crash: Crash, suffix: str) -> tuple[int, str]:
    """Create and lock `NAME.partial` for a free name; return its descriptor and NAME.

    O_EXCL gives NAME.partial to one process only, and only its owner may publish NAME. Checking NAME after creating
    the partial therefore needs no lock.
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
        except OSError:  # the collector salvaged it in the moment before it was locked
            pass
        os.close(dump)
    raise Refused("directory", "10,000 names are taken")


def publish(directory: int, dump: int, name: str, crash: Crash, suffix: str) -> str:
    """Make the dump durable and rename it to its final name, which is returned; never replace another file."""
    os.fsync(dump)
    partial, copy = name + ".partial", 0
    while exists(name, directory):  # only possible where others may write to the directory
        copy += 1
        name = file_name(crash, copy, suffix)
    os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
    return name


def set_attributes(dump: int, attributes: dict[str, bytes], space: int = ATTRIBUTE_SPACE) -> bool:
    """Set `user.coredump.*`, truncated to fit `space` bytes; return False if the file system refuses them."""
    for name, value in attributes.items():
        room = min(1024, space - len(name) - 40)
        if room <= 0:
            continue
        try:
            os.setxattr(dump, "user.coredump." + name, value[:room])
        except OSError as error:
            log("cannot set attribute %s and the following ones: %s" % (name, error.strerror))
            return False
        space -= len(name) + 40 + len(value[:room])
    return True

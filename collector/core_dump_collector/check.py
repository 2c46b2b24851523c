"""Owns `core-dump-collector check`: is this node, and this bucket, as a collector needs them?"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from core_dump_collector import upload
from core_dump_collector.errors import ConfigError, RetryableError
from core_dump_collector.node import corepattern
from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.config import Settings


class Level(Enum):
    """How a finding is to be taken."""

    GOOD = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    text: str


def check(directory: str, settings: Settings) -> Iterator[Finding]:
    """Yield a finding for each thing looked at, as it is looked at."""
    yield from _check_directory(directory)
    yield _check_pattern(directory)
    yield _check_store(settings)


def _check_directory(directory: str) -> Iterator[Finding]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        yield Finding(
            Level.FAIL, f"directory {directory}: {error.strerror}; create it: install -d -m 0700 {directory}"
        )
        return
    try:
        status = os.fstat(fd)
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            yield Finding(
                Level.FAIL,
                f"directory {directory}: this user may not delete in it; run as uid {status.st_uid}",
            )
        elif status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022:
            yield Finding(
                Level.WARN,
                f"directory {directory}: others than root may write to it (uid {status.st_uid}, mode "
                f"{stat.S_IMODE(status.st_mode):04o}); needed for a file pattern only, else chmod 0700",
            )
        else:
            yield Finding(Level.GOOD, f"directory {directory}")
        yield _check_attributes(fd, directory)
    finally:
        os.close(fd)


def _check_attributes(fd: int, directory: str) -> Finding:
    try:
        probe = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=fd)
    except OSError as error:
        return Finding(Level.WARN, f"directory {directory}: no file can be created in it: {error.strerror}")
    try:
        os.setxattr(probe, "user.coredump.probe", b"1")
    except OSError as error:
        return Finding(
            Level.WARN,
            f"directory {directory}: its file system takes no extended attributes ({error.strerror}): "
            "dumps arrive without the metadata that the helper reads; use ext4, xfs or tmpfs (Linux 6.6)",
        )
    finally:
        os.close(probe)
    return Finding(Level.GOOD, "metadata: the file system takes extended attributes")


def _check_pattern(directory: str) -> Finding:
    pattern = corepattern.read()
    shown = printable(pattern)
    if not corepattern.is_ours(pattern, directory):
        return Finding(
            Level.FAIL,
            f"kernel.core_pattern is {shown!r}: no dump comes here; install the helper "
            "(sysctl/install.sh) or see docs/bottlerocket.md",
        )
    if pattern.startswith("|"):
        program = pattern[1:].split()[0]
        if not os.access(program, os.X_OK):
            return Finding(
                Level.WARN,
                f"kernel.core_pattern runs {program}, not to be seen from here (right inside a container, "
                "else every dump is lost: install the helper)",
            )
    return Finding(Level.GOOD, f"kernel.core_pattern {shown}")


def _check_store(settings: Settings) -> Finding:
    target = f"s3://{settings.bucket}/{settings.prefix}"
    try:
        shown = upload.verify_store(settings.upload_options())
    except (ConfigError, RetryableError) as error:
        return Finding(Level.FAIL, f"bucket {target}: {printable(str(error))}")
    return Finding(Level.WARN if "WARNING" in shown else Level.GOOD, f"bucket {target}: {shown}")

"""Owns `core-dump-collector check`: would a crash on this node become an object in this bucket?

The order is that of a dump: directory, core pattern, helper, bucket; `--crash` then sends a real one that way. Each
failure says what to do.
"""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from core_dump_collector import crashtest, storecheck
from core_dump_collector.errors import ConfigError
from core_dump_collector.node import corepattern
from core_dump_collector.node.corepattern import Target
from core_dump_collector.node.ownership import is_roots_alone, is_trusted
from core_dump_collector.s3.errors import RetryableError
from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.config import Settings
    from core_dump_collector.node.corepattern import HelperCall

_HELPER_SECONDS = 20
_MOST_HELPER_LINES = 50
_MOST_LINE = 300
_INSTALL = "install the helper (sysctl/install.sh), or see docs/bottlerocket.md"


class Level(Enum):
    """The severity of a finding."""

    GOOD = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    text: str


def check(directory: str, settings: Settings, *, crash: bool = False) -> Iterator[Finding]:
    """Yield the findings as they are made; with `crash`, let a process of our own crash at the end."""
    yield from _check_directory(directory)
    leads_here = True
    for finding in _check_pattern(directory):
        leads_here = leads_here and finding.level is not Level.FAIL
        yield finding
    yield _check_store(settings)
    if crash and not leads_here:
        yield Finding(
            Level.FAIL, "crash: not tried, because of the failures of core pattern and helper above"
        )
    elif crash:
        result = crashtest.run(directory)
        yield Finding(Level.GOOD if result.passed else Level.FAIL, result.text)


def _check_directory(directory: str) -> Iterator[Finding]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        yield Finding(Level.FAIL, f"directory {directory}: {_explain_directory(directory, error)}")
        return
    try:
        yield _check_rights(fd, directory)
        yield _check_space(fd, directory)
        yield _check_attributes(fd, directory)
    finally:
        os.close(fd)


def _explain_directory(directory: str, error: OSError) -> str:
    if isinstance(error, NotADirectoryError):
        return f"not a directory; remove it, then: install -d -m 0700 {directory}"
    if isinstance(error, FileNotFoundError):
        return f"{error.strerror}; create it: install -d -m 0700 {directory}"
    return f"{error.strerror}; run as root, or as its owner"


def _check_rights(fd: int, directory: str) -> Finding:
    status = os.fstat(fd)
    if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
        return Finding(Level.FAIL, f"directory {directory}: mounted read-only; mount it read-write")
    if stat.S_ISLNK(os.lstat(directory).st_mode):
        real = os.path.realpath(directory)
        return Finding(
            Level.WARN,
            f"directory {directory}: a symbolic link; the helper follows none: watch {real} instead",
        )
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return Finding(
            Level.FAIL, f"directory {directory}: this user may not delete in it; run as uid {status.st_uid}"
        )
    mode = stat.S_IMODE(status.st_mode)
    if not is_roots_alone(status):
        return Finding(
            Level.WARN,
            f"directory {directory}: others than root may write to it (uid {status.st_uid}, mode {mode:04o}); "
            "only file patterns need that, else: chmod 0700",
        )
    return Finding(Level.GOOD, f"directory {directory}")


def _check_space(fd: int, directory: str) -> Finding:
    space = os.fstatvfs(fd)
    if space.f_blocks and not space.f_bavail:
        return Finding(Level.FAIL, f"directory {directory}: its file system is full; free some space")
    if space.f_files and not space.f_favail:
        return Finding(Level.FAIL, f"directory {directory}: its file system has no inode left; delete files")
    return Finding(Level.GOOD, f"space: {space.f_bavail * space.f_frsize >> 20} MiB are free")


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
            "dumps lose their metadata; use ext4, xfs, Btrfs, or tmpfs of Linux 6.6",
        )
    finally:
        os.close(probe)
    return Finding(Level.GOOD, "metadata: the file system takes extended attributes")


def _check_pattern(directory: str) -> Iterator[Finding]:
    pattern = corepattern.read()
    shown = f"kernel.core_pattern is {printable(pattern)!r}"
    helper = corepattern.helper_call(pattern)
    match corepattern.target(pattern, directory):
        case Target.ELSEWHERE:
            yield Finding(Level.FAIL, f"{shown}: no dump comes here; {_INSTALL}")
        case Target.NO_PROGRAM if helper is not None:
            yield Finding(
                Level.FAIL,
                f"{shown}, but {helper.program} cannot be executed: every dump is lost; {_INSTALL}",
            )
        case Target.NO_PROGRAM:
            yield Finding(
                Level.FAIL,
                f"{shown}, but nothing listens there: every dump is lost; start core-dump-listener.service",
            )
        case Target.OTHER_DIRECTORY:
            config = helper.config if helper else corepattern.CONFIG
            theirs = corepattern.configured_directory(config)
            yield Finding(
                Level.FAIL,
                f"{config}: WATCH_DIR={printable(theirs)} is not {directory}; make them the same directory",
            )
        case _:
            yield Finding(Level.GOOD, shown)
    if helper is None:
        return
    if corepattern.is_contained():
        yield Finding(
            Level.WARN, f"helper: out of sight in a container; on the node: {helper.program} --check"
        )
    else:
        yield from _ask_helper(helper)


def _ask_helper(helper: HelperCall) -> Iterator[Finding]:
    """Run the installed helper with `--check`, if only root can have put it there."""
    try:
        status = os.stat(helper.program)
    except OSError:
        return  # the pattern's own finding says so
    if not is_trusted(status):
        yield Finding(Level.FAIL, f"{helper.program}: others than root can change it; chown root, chmod 0755")
        return
    try:
        done = subprocess.run(  # noqa: S603  root's own program, no shell
            [helper.program, "--check", f"-C{helper.config}"],
            capture_output=True, text=True, errors="backslashreplace", timeout=_HELPER_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(Level.FAIL, f"helper: {printable(error)}; {_INSTALL}")
        return
    lines = [line.partition("\t") for line in done.stdout.splitlines()[:_MOST_HELPER_LINES]]
    known = {level.value: level for level in Level}
    findings = [
        Finding(known[level], f"helper: {printable(text)}") for level, _, text in lines if level in known
    ]
    yield from findings
    if done.returncode and not any(finding.level is Level.FAIL for finding in findings):
        said = printable(done.stderr.strip().rpartition("\n")[2], _MOST_LINE)
        yield Finding(Level.FAIL, f"helper: {helper.program} --check ended with {done.returncode}: {said}")


def _check_store(settings: Settings) -> Finding:
    target = f"s3://{settings.bucket}/{settings.prefix}"
    try:
        shown = storecheck.verify_store(settings.upload_options())
    except (ConfigError, RetryableError) as error:
        return Finding(Level.FAIL, f"bucket {target}: {printable(error, 2 * _MOST_LINE)}")
    return Finding(Level.WARN if "WARNING" in shown else Level.GOOD, f"bucket {target}: {shown}")

"""Owns `--check`: whether a crash on this host would leave a dump, asked with the helper's own functions.

Each line is LEVEL, a tab and a text; LEVEL is `ok`, `warn` or `FAIL`. `core-dump-collector check` shows them too.
"""

from __future__ import annotations

import os
import stat

from core_dump_helper.compress import PIGZ, make_writer
from core_dump_helper.disk import DiskLimits
from core_dump_helper.records import open_state
from core_dump_helper.settings import Settings
from core_dump_helper.system import DIRECTORY, Refused, is_private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def check(config: str) -> int:
    """Print a line for each thing that was checked; return 0 if no dump would be lost."""
    failed = False
    for level, text in inspect(config):
        failed = failed or level == "FAIL"
        print(level + "\t" + text)
    return 1 if failed else 0


def inspect(config: str) -> Iterator[tuple[str, str]]:
    """Yield level and text of each finding, in the order in which the helper meets them."""
    settings = Settings()
    problems: list[str] = []
    settings.load(config, problems.append)
    for problem in problems:
        yield "warn", problem
    if not problems:
        yield "ok", "configuration %s" % config
    yield from _inspect_directory(settings)
    yield _inspect_compressor(settings)


def _inspect_directory(settings: Settings) -> Iterator[tuple[str, str]]:
    path = settings.WATCH_DIR
    try:
        directory = os.open(path, DIRECTORY)
    except OSError as error:
        yield "FAIL", "WATCH_DIR %s: %s" % (path, _explain(path, error))
        return
    try:
        status = os.fstat(directory)
        if not is_private(status):
            yield (
                "warn",
                "WATCH_DIR %s: others can change it; chown root: %s; chmod 0700 %s" % (path, path, path),
            )
        else:
            yield "ok", "WATCH_DIR %s" % path
        yield _inspect_disk(directory, settings)
        yield _inspect_writing(directory, path)
    finally:
        os.close(directory)


def _explain(path: str, error: OSError) -> str:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return "%s; create it: install -d -m 0700 %s" % (error.strerror, path)
    if stat.S_ISLNK(mode):
        return "a symbolic link, which the helper does not follow; set WATCH_DIR=%s" % os.path.realpath(path)
    if not stat.S_ISDIR(mode):
        return "not a directory; remove it, then: install -d -m 0700 %s" % path
    return error.strerror or str(error)


def _inspect_disk(directory: int, settings: Settings) -> tuple[str, str]:
    try:
        DiskLimits(directory, settings).check()
    except Refused as refused:
        space = os.fstatvfs(directory)
        free = space.f_bavail * 100 // max(1, space.f_blocks)
        advice = {
            "keep_free": "%d %% are free; free some space, or lower KEEP_FREE_PERCENT=%d"
            % (free, settings.KEEP_FREE_PERCENT),
            "max_total_bytes": "the dumps in it exceed MAX_TOTAL_BYTES=%s; see why none is uploaded"
            % settings.MAX_TOTAL_BYTES,
            "inodes": "%d inodes are free; delete some files" % space.f_favail,
        }
        return "FAIL", "disk: every dump is refused (%s): %s" % (
            refused.reason,
            advice.get(refused.reason, refused),
        )
    return "ok", "disk: there is room for a dump"


def _inspect_writing(directory: int, path: str) -> tuple[str, str]:
    try:
        os.close(open_state(directory))
        probe = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        return "FAIL", "WATCH_DIR %s: no file can be created: %s; remount it read-write" % (
            path,
            error.strerror,
        )
    try:
        os.write(probe, b"probe")
        os.setxattr(probe, "user.coredump.probe", b"1")
    except OSError as error:
        return "warn", "WATCH_DIR %s: %s; dumps lose their metadata: use ext4, xfs, Btrfs or tmpfs" % (
            path,
            error.strerror,
        )
    finally:
        os.close(probe)
    return "ok", "files with attributes can be created"


def _inspect_compressor(settings: Settings) -> tuple[str, str]:
    if settings.COMPRESSOR == "none":
        return "ok", "compressor: none, as configured"
    installed = [path for path in PIGZ if os.access(path, os.X_OK)][:1]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        make_writer("isal", null, settings).start()
        installed.insert(0, "isal")
    except (ImportError, OSError):
        pass
    finally:
        os.close(null)
    if not installed:
        return (
            "warn",
            "compressor: neither isal nor pigz is installed; gzip holds a crashed process much longer",
        )
    return "ok", "compressor: %s; installed: %s" % (settings.COMPRESSOR, ", ".join(installed))

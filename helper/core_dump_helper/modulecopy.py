"""Owns copying the files behind a crash into `.modules`, after the dump, in a program of its own (docs/contracts.md).

The crashed process is gone, the slot is free, and an alarm ends this program: a file whose read never ends costs the
list of one dump.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import fcntl
import os
import time
from hashlib import sha256

from core_dump_format.elf import build_id_of
from core_dump_format.modules import Module, ModuleList, list_name, module_name, render_list
from core_dump_helper.compress import IN_PROCESS, make_writer
from core_dump_helper.core import Memory
from core_dump_helper.disk import DiskLimits
from core_dump_helper.mapped import HandOver, Judge, Mapped, Missing
from core_dump_helper.modules import DIRECTORY_NAME
from core_dump_helper.modulestate import Known, ModuleState, identity
from core_dump_helper.records import Records, open_state
from core_dump_helper.settings import Settings
from core_dump_helper.slots import Slots
from core_dump_helper.system import CHUNK, DIRECTORY, DISK_FULL, NEW_FILE, exists, log, write_all, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_helper.compress import GzipWriter, PigzWriter, SparseWriter

COPY_SECONDS = 120
"""Then no further file is read: the descriptors keep file systems from being unmounted."""
ALARM_SECONDS = 30
"""Beyond COPY_SECONDS: then SIGALRM ends a program that hangs."""
MAX_CONCURRENT = 4
"""Programs that copy at one time, shared out among origins as MAX_CONCURRENT of helper.conf is."""
NICE = 19
OOM_SCORE = b"1000"
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""Numbers of the system call: ioprio_set(2)."""
IOPRIO_PROCESS, IOPRIO_IDLE = 1, 3 << 13
MAX_DIRECTORY_BYTES = 2 << 30
"""Of all files in `.modules`."""
HEAD_BYTES = 64 << 10
"""Of a file, in which its build ID is looked for."""


def copy(config: str, handed_over: int, watch: int) -> int:
    """Copy the files of one crash, and publish their list; return an exit code.

    Args:
        config: path of the configuration file.
        handed_over: descriptor of `DUMP.json.partial`.
        watch: descriptor of the watch directory.
    """
    _signal.alarm(COPY_SECONDS + ALARM_SECONDS)
    settings = Settings()
    settings.load(config, lambda _: None)  # wrong lines were logged for the dump
    give_way(settings)
    try:
        hand_over = HandOver(handed_over)
        copier = Copier(hand_over, watch, settings)
        listed = ModuleList(
            hand_over.dump,
            tuple(sorted(copier.run(), key=_start)),
            int(hand_over.is_cut),
            hand_over.sensitive,
        )
        copier.publish(handed_over, listed)
    except (OSError, ValueError) as error:
        log("the files of a crash are not copied: %s: %s" % (type(error).__name__, error))
        return 1
    return 0


def give_way(settings: Settings) -> None:
    """Let everything else on this host come first."""
    Memory(settings).join()
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        write_file("/proc/self/oom_score_adj", OOM_SCORE)
        from ctypes import CDLL

        CDLL(None).syscall(IOPRIO_SET[os.uname().machine], IOPRIO_PROCESS, 0, IOPRIO_IDLE)
    except (OSError, ImportError, KeyError, AttributeError):  # it is a matter of courtesy
        pass


class Copier:
    """Copies the files of one crash."""

    def __init__(self, hand_over: HandOver, watch: int, settings: Settings) -> None:
        """Store the text from the helper, the watch directory and the settings; raises OSError."""
        self._hand_over, self._settings = hand_over, settings
        self._end = time.monotonic() + COPY_SECONDS
        self._directory = os.open(DIRECTORY_NAME, DIRECTORY, dir_fd=watch)
        state = open_state(watch)
        self._state = ModuleState(state)
        self._slots = Slots(Records(state), MAX_CONCURRENT, hand_over.origin, Memory(settings), "copy-slot")
        self._disk = DiskLimits(watch, settings)
        self._is_sensitive = bool(hand_over.sensitive)
        self._held: int | None = None
        """Bytes in `.modules`, at most; other programs that copy at the same time count theirs."""
        self._found: dict[str, Known] = {}
        """Files that were copied now, by their identity."""

    def run(self) -> Iterator[Module]:
        """Yield the modules; close each file as soon as it is done."""
        if not self._slots.acquire(self._end):
            self._end = 0.0  # only known files are listed
        self._state.load()
        judge = Judge(self._hand_over.mounts, self._settings.MODULE_MAX_BYTES)
        unknown: list[tuple[Mapped, os.stat_result]] = []
        for file in self._hand_over.files():
            try:
                status = judge.check(file)
                known = self._recall(identity(status))
                if known:
                    yield _describe(file, status.st_size, known)
                    file.close()
                else:
                    unknown.append((file, status))
            except (Missing, OSError, KeyError, ValueError) as error:
                yield _describe_missing(file, error)
                file.close()
        yield from self._copy_all(unknown)

    def _recall(self, key: str) -> Known | None:
        known = self._state.files.get(key)
        return known if known and self._is_sensitive >= known.is_sensitive else None

    def _copy_all(self, unknown: list[tuple[Mapped, os.stat_result]]) -> Iterator[Module]:
        sizes = [status.st_size for _, status in unknown]
        is_late = time.monotonic() > self._end
        allowed = self._state.charge(self._hand_over.origin, sizes) if sizes and not is_late else 0
        for number, (file, status) in enumerate(unknown):
            try:
                if number >= allowed:
                    raise Missing("deadline" if is_late else "budget")
                yield _describe(file, status.st_size, self._copy(file, status))
            except (Missing, OSError) as error:
                yield _describe_missing(file, error)
            file.close()

    def _copy(self, file: Mapped, status: os.stat_result) -> Known:
        """Copy a file unless a file with this content was copied before; raises Missing, OSError."""
        source = self._reopen(file)
        try:
            digest, head = self._digest(source)
            self._check_unchanged(source, status)
            known = Known(digest, build_id_of(head) or "", self._is_sensitive, int(time.time()))
            if self._has(digest) or self._write(source, status, known):
                self._found[identity(status)] = known
            return known
        finally:
            os.close(source)

    def _reopen(self, file: Mapped) -> int:
        """Return a descriptor to read from; raises Missing if somebody holds a write lease, or OSError."""
        self._check_time()
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open("/proc/self/fd/%d" % (file.descriptor or 0), flags)
        except BlockingIOError:
            raise Missing("busy") from None

    def _digest(self, source: int) -> tuple[str, bytes]:
        digest, head = sha256(), b""
        for piece in self._read(source):
            head = head or piece[:HEAD_BYTES]
            digest.update(piece)
        return digest.hexdigest(), head

    def _read(self, source: int) -> Iterator[bytes]:
        """Yield the content of a file; raises Missing at the deadline."""
        os.lseek(source, 0, os.SEEK_SET)
        while True:
            self._check_time()
            piece = os.read(source, CHUNK)
            if not piece:
                return
            yield piece

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise Missing("deadline")

    @staticmethod
    def _check_unchanged(source: int, status: os.stat_result) -> None:
        if identity(os.fstat(source)) != identity(status):
            raise Missing("changed")

    def _has(self, digest: str) -> bool:
        """Return whether a module with this content waits in `.modules`, or was copied from another file."""
        names = [module_name(digest, is_sensitive=False)]
        if self._is_sensitive:
            names.append(module_name(digest, is_sensitive=True))
        if any(exists(name, self._directory) for name in names):
            return True
        same = [
            known for known in (*self._state.files.values(), *self._found.values()) if known.sha256 == digest
        ]
        return any(self._is_sensitive >= known.is_sensitive for known in same)

    def _write(self, source: int, status: os.stat_result, known: Known) -> bool:
        """Compress a file into `.modules`; return False if another program is about to; raises Missing, OSError."""
        self._check_room(status.st_size)
        name = module_name(known.sha256, is_sensitive=known.is_sensitive)
        target = os.open(name + ".partial", NEW_FILE, 0o600, dir_fd=self._directory)
        try:
            try:
                fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self._is_at(name + ".partial", target):  # another program has published it
                return False
            try:
                self._compress(source, target, known.sha256)
                self._check_unchanged(source, status)
                os.rename(name + ".partial", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except BaseException as error:
                if self._is_at(name + ".partial", target):
                    os.unlink(name + ".partial", dir_fd=self._directory)
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise Missing("disk_full") from None
                raise
        finally:
            os.close(target)
        return True

    def _compress(self, source: int, target: int, digest: str) -> None:
        """Write a gzip file whose content has this digest; raises Missing, OSError."""
        os.ftruncate(target, 0)
        writer, found = self._start_writer(target), sha256()
        for piece in self._read(source):
            found.update(piece)
            writer.write(memoryview(piece))
        writer.close()
        if found.hexdigest() != digest:
            raise Missing("changed")
        os.fsync(target)

    def _start_writer(self, target: int) -> SparseWriter | GzipWriter | PigzWriter:
        for name in IN_PROCESS:
            writer = make_writer(name, target, self._settings)
            try:
                writer.start()
            except (ImportError, PermissionError):
                continue
            return writer
        raise Missing("read_error")

    def _check_room(self, size: int) -> None:
        """Raise Missing unless `.modules` and the disk have room for a file, whatever it compresses to."""
        if self._held is None:
            self._held = self._count_bytes()
        self._held += size
        if self._held > MAX_DIRECTORY_BYTES or not self._disk.has_room(size):
            self._held -= size
            raise Missing("disk_full")

    def _count_bytes(self) -> int:
        held = 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                try:
                    held += entry.stat(follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:  # the collector has taken it
                    continue
        return held

    def _is_at(self, name: str, descriptor: int) -> bool:
        """Return whether a file of `.modules` is still the one that is open."""
        try:
            there = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))

    def publish(self, descriptor: int, listed: ModuleList) -> None:
        """Replace the text from the helper by the list, and rename it; remember the copied files; raises OSError."""
        os.ftruncate(descriptor, 0)
        write_all(descriptor, render_list(listed))
        os.fsync(descriptor)
        name = list_name(listed.dump)
        os.rename(name + ".partial", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)
        if self._found:
            self._state.add(self._found)
        kept = sum(not module.missing for module in listed.modules)
        numbers = (listed.dump, kept, len(self._found), len(listed.modules) - kept)
        log("%s: %d modules, %d of them copied, and %d that are missing" % numbers, 6)


def _describe(file: Mapped, size: int, known: Known) -> Module:
    return Module(file.path, file.start, file.end, file.offset, known.build_id, size, known.sha256)


def _describe_missing(file: Mapped, error: Exception) -> Module:
    reason = str(error) if isinstance(error, Missing) else "read_error"
    return Module(file.path, file.start, file.end, file.offset, missing=reason)


def _start(module: Module) -> int:
    return module.start

#!/usr/bin/python3 -IS
"""Take one core dump from the kernel's pipe, compress it, and publish it whole in the watch directory.

The kernel starts this program at every crash, as root, in the initial namespaces, with no environment and with only
descriptor 0 (the core) and perhaps 3 (a pidfd) open: core(5). It imports little because it starts so often.
Every argument, and all of /proc/PID, is chosen by whoever crashed. docs/helper.md says more.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms
import fcntl
import os
import select
import struct
import sys
import time
from _queue import Empty, SimpleQueue
from _thread import start_new_thread

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "0.1.0"
HELP = """core-dump-helper: started by the kernel through kernel.core_pattern, once for each crash.

  core-dump-helper [-C<path>] -P%P -p%p -i%I -u%u -g%g -s%s -t%t -c%c -d%d -F%F -h%h -- %e   < core
  core-dump-helper --calibrate [-C<path>]   measure the compressors of this host and remember the fastest
  core-dump-helper --help | --version

-C<path> names another configuration file than /etc/core-dump-handler/helper.conf. Its keys and their defaults:
"""
CONFIG = "/etc/core-dump-handler/helper.conf"
CALIBRATION = "/var/lib/core-dump-handler/compressor"
PIGZ = ("/usr/bin/pigz", "/usr/local/bin/pigz")
COMPRESSORS = ("auto", "pigz", "isal", "gzip", "none")
BOUNDS = {
    "LEVEL": (1, 9),
    "KEEP_FREE_PERCENT": (0, 99),
    "DEADLINE_SECONDS": (1, 86400),
    "MAX_CONCURRENT": (0, 256),
}
PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-"
HEX = b"0123456789abcdef"
CHUNK = 1 << 20
FEW = 4  # buffers that every dump may have
MAP_POPULATE = 0x8000  # a third less time for a new buffer than a page fault for each of its pages
HEADER_LIMIT = 16 << 20
LOOK_AROUND = 32 << 20  # bytes between two looks at the disk and the page cache
ATTRIBUTE_SPACE = 2600  # ext4 has 4 KiB for all attributes; the collector's own needs the rest
STATE_FILES = 1000
SET_PIPE_SIZE = 1031
SYNC_FLUSH = 2
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(Exception):  # noqa: N818 - an outcome, not a fault
    """The dump is not taken: the reason that is counted (or nothing), and an explanation."""


def log(text: str, priority: int = 4) -> None:
    """Write one line to the kernel log, else to syslog, and to descriptor 2 (/dev/null under the kernel)."""
    line = ("core-dump-helper[%d]: %s" % (os.getpid(), text[:900])).encode("ascii", "backslashreplace")
    try:
        os.write(2, line + b"\n")
    except OSError:
        pass
    try:
        write_file("/dev/kmsg", b"<%d>%s" % (24 + priority, line))
    except OSError:
        try:
            import syslog

            syslog.syslog(syslog.LOG_DAEMON | priority, line.decode())
        except (ImportError, OSError):  # no descriptor is left for it: the dump matters more than the line
            pass


def write_file(path: str, data: bytes) -> None:
    """Write to a file of the kernel's."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_file(path: str, limit: int, directory: int | None = None) -> bytes:
    """Read at most `limit` bytes; never waits for a writer, follows no link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
    try:
        data = block = os.read(descriptor, limit)
        while block and len(data) < limit:
            block = os.read(descriptor, limit - len(data))
            data += block
        return data
    finally:
        os.close(descriptor)


def check_owner(path: str) -> None:
    """Raise PermissionError unless only root (or whoever runs this) can change what is at `path`."""
    status = os.stat(path)
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(1, "others than root may change it")


def enlarge(pipe: int) -> None:
    """Let a pipe hold 1 MiB, if it is a pipe: fewer switches between its two ends."""
    try:
        fcntl.fcntl(pipe, SET_PIPE_SIZE, CHUNK)
    except OSError:
        pass


def secure_process() -> int:
    """Give descriptors 0 to 2 a harmless meaning, become undumpable and humble; return the core's descriptor."""
    os.umask(0o077)
    core = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    try:
        null = os.open("/dev/null", os.O_RDWR)  # descriptor 1, when the kernel started us
        os.dup2(null, 0)
        for descriptor in (1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                os.dup2(null, descriptor)
        if os.geteuid() == 0:
            os.setegid(65534)  # a change of the effective gid sets "dumpable" to fs.suid_dumpable: prctl(2)
            os.setegid(0)
        write_file("/proc/self/oom_score_adj", b"500")
    except OSError as error:
        log("cannot prepare: %s" % error)
    return core


def parse_arguments(argv: list[str]) -> dict[str, str]:
    """Split `-Xvalue` arguments; the first of a kind wins, what follows `-h` belongs to the host name until `--`.

    Kernels before 5.3 split after expansion: host name and name may come in pieces, values may be missing.
    """
    values = {"e": ""}
    for index, argument in enumerate(argv):
        if argument == "--":
            values["e"] = " ".join(argv[index + 1 :])
            break
        if "h" in values:
            values["h"] += " " + argument
        elif argument[:1] == "-" and argument[1:2] in tuple("CPpiugstcdFh"):
            values.setdefault(argument[1], argument[2:])
    for key in "PpiugstcdF":
        text = values.get(key, "")
        values[key] = text if text.isascii() and text.isdigit() and len(text) <= 20 else ""
    values["d"] = values["d"] or "2"  # the safest meaning
    return values


class Settings:
    """What helper.conf may say, and what holds where it says nothing or something wrong."""

    WATCH_DIR = "/core_dumps"
    COMPRESSOR = "auto"
    LEVEL = 1
    MAX_DUMP_BYTES = 0
    MAX_TOTAL_BYTES = 0
    KEEP_FREE_PERCENT = 15
    DEADLINE_SECONDS = 300
    RATE_LIMIT = "5/600"
    MAX_CONCURRENT = 8
    BUFFER_BYTES = 1 << 30
    IGNORE_SIGNALS = ""
    RESPECT_RLIMIT = "no"
    CGROUP = ""
    PYTHON_PATH = ""

    def __init__(self, path: str) -> None:
        """Read the file; whatever is wrong in it is logged and has its default."""
        try:
            check_owner(path)
            text = read_file(path, 1 << 16).decode("utf-8", "surrogateescape")
        except OSError as error:
            log("%a: %s: every setting has its default" % (path, error.strerror))
            return
        for line in text.splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            if key and not key.startswith("#"):
                try:
                    setattr(self, key, self.parse(key, value))
                except ValueError as error:
                    log("%a: %a is ignored, it must be %s" % (path, line[:100], error))

    @classmethod
    def defaults(cls) -> dict[str, str | int]:
        """Return every key and its default."""
        return {key: value for key, value in vars(cls).items() if key.isupper()}

    @classmethod
    def parse(cls, key: str, text: str) -> str | int:
        """Return a setting's value; raises ValueError that says what is accepted."""
        default = cls.defaults().get(key)
        if default is None:
            raise ValueError("one of " + ", ".join(cls.defaults()))
        if isinstance(default, int):
            low, high = BOUNDS.get(key, (0, 1 << 60))
            if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
                raise ValueError("a whole number from %d to %d" % (low, high))
            return int(text)
        parts = text.replace("/" if key == "RATE_LIMIT" else ",", " ").split()
        numbers = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
        right, accepted = {
            "COMPRESSOR": (text in COMPRESSORS, "one of " + ", ".join(COMPRESSORS)),
            "RESPECT_RLIMIT": (text in ("yes", "no"), "yes or no"),
            "RATE_LIMIT": (text == "0" or (numbers and len(parts) == 2), "dumps/seconds like 5/600, or 0"),
            "IGNORE_SIGNALS": (numbers, "signal numbers like 3,24"),
        }.get(key, (text == default or text.startswith("/"), "an absolute path"))
        if not right:
            raise ValueError(accepted)
        return text


def parse_cgroup(text: bytes) -> dict[str, bytes]:
    """Return path, container id and pod uid of /proc/PID/cgroup. The outermost wins: a container makes inner ones."""
    lines = [line.split(b":", 2) for line in text.split(b"\n") if line.count(b":") > 1]
    unified = [path for number, _, path in lines if number == b"0" and path != b"/"]
    path = unified[0] if unified else max([line[2] for line in lines], key=len, default=b"")
    found = {"cgroup": path}
    for word in path.translate(bytes.maketrans(b"/.-:", b"    ")).split():
        if len(word) == 64 and not word.strip(HEX):
            found.setdefault("container_id", word)
    for part in path.replace(b"_", b"-").split(b"/"):
        uid = part[part.rfind(b"pod") + 3 :][:36] if b"pod" in part else b""
        if [len(word) for word in uid.split(b"-")] == [8, 4, 4, 4, 12] and not uid.strip(HEX + b"-"):
            found.setdefault("pod_uid", uid)
    return found


def read_fields(path: str, directory: int | None = None) -> dict[bytes, list[bytes]]:
    """Read a file of `key: value` lines, as /proc/PID/status; the first of a kind wins."""
    lines = [line.partition(b":") for line in read_file(path, 8192, directory).split(b"\n")]
    return {key: value.split() for key, _, value in reversed(lines)}


def start_time(directory: int | None, path: str) -> int:
    """Return when a process started, in ticks: field 22, counted after the last `)`, which a name may hold."""
    return int(read_file(path, 4096, directory).rpartition(b")")[2].split()[19])


def read_process(crash: dict[str, str]) -> dict[str, bytes]:
    """Read what /proc says of the process, by one directory descriptor; only `sensitive` when it is another's."""
    process = os.open("/proc/%d" % int(crash["P"]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = read_fields("status", process)
        thread = read_fields("task/%s/status" % crash["i"], process) if crash["i"] else status
        found = parse_cgroup(read_file("cgroup", 16384, process))
        found["threads"] = status[b"Threads"][0]
        found["ns_pid"] = status.get(b"NSpid", [b""])[-1]
        found["comm"] = read_file("comm", 64, process)[:-1]
        found["cmdline"] = read_file("cmdline", 1024, process).rstrip(b"\0").replace(b"\0", b" ")
        try:
            found["exe"] = os.fsencode(os.readlink("exe", dir_fd=process))
        except OSError:
            pass
        same = start_time(process, "stat") <= start_time(None, "/proc/self/stat")
    finally:
        os.close(process)
    for key, field in (("u", b"Uid"), ("g", b"Gid")):
        same = same and crash[key] in ("", thread[field][0].decode())
    if crash["F"]:  # the kernel's pidfd, since 6.16 and in late 5.10 and 6.1; -1 when the process is gone
        pid = read_fields("/proc/self/fdinfo/" + crash["F"]).get(b"Pid")
        same = same and pid in (None, [crash["P"].encode()])
    return found if same else {"sensitive": b"identity"}


def describe(crash: dict[str, str]) -> dict[str, bytes]:
    """Return the attributes of the dump, most important first. Whatever fails costs metadata, never the dump."""
    names = ("pid", "signal", "timestamp", "uid", "gid", "tid", "dumpable", "rlimit", "thread")
    known = {name: os.fsencode(crash[key]) for name, key in zip(names, "Pstugidce")}  # noqa: B905 - 3.10
    known["hostname"] = os.fsencode(crash.get("h", ""))
    if crash["d"] != "1":
        known["sensitive"] = b"dumpable=" + crash["d"].encode()
    try:
        known.update(read_process(crash))
        if known.get("sensitive") == b"identity":
            log("pid %s: /proc belongs to another process: metadata dropped" % crash["P"])
    except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
        log("pid %s: no metadata from /proc: %s: %s" % (crash["P"], type(error).__name__, error))
    order = ("hostname", "comm", "ns_pid", "container_id", "pod_uid", "threads", "exe", "cgroup", "cmdline")
    return {name: known[name] for name in ("sensitive", *names, *order) if known.get(name)}


def set_attributes(dump: int, attributes: dict[str, bytes], space: int = ATTRIBUTE_SPACE) -> None:
    """Set `user.coredump.*`; what does not fit into `space` is cut. Where they are not supported they are lost."""
    for name, value in attributes.items():
        room = min(1024, space - len(name) - 40)
        if room > 0:
            try:
                os.setxattr(dump, "user.coredump." + name, value[:room])
                space -= len(name) + 40 + len(value[:room])
            except OSError as error:
                log("attribute %s and what follows: %s" % (name, error.strerror))
                return


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


def exists(name: str, directory: int) -> bool:
    """Say whether a name is taken, by anything."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


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


def elf_length(head: bytes | bytearray) -> tuple[int, int]:
    """Return how many leading bytes must be known, and (when `head` has them) the length its headers promise.

    The kernel says nothing when a dump ends early because its process was killed: only this length tells.
    0, 0 for what is no ELF file. From 65,535 segments on, the first one, which lies behind the table, tells how many.
    """
    if len(head) < 64:
        return 64, 0
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return 0, 0
    order = "<" if head[5] == 1 else ">"
    offsets, layout, at = ("QQ", "8xQ16xQ16x", 54) if head[4] == 2 else ("II", "4xI8xI12x", 42)
    layout = order + layout
    table, sections = struct.unpack_from(order + offsets, head, 32 if head[4] == 2 else 28)
    size, count, section_size, section_count = struct.unpack_from(order + "HHHH", head, at)
    if size != struct.calcsize(layout) or table > HEADER_LIMIT:
        return 0, 0
    end = table + size
    if len(head) >= end:
        if count == 0xFFFF:  # PN_XNUM
            count = max(0, struct.unpack_from(layout, head, table)[0] - table) // size
        end = table + count * size
    if end > HEADER_LIMIT:
        return 0, 0
    if len(head) < end:
        return end, 0
    length = max([offset + held for offset, held in struct.iter_unpack(layout, head[table:end])], default=0)
    return end, max(length, end, sections + section_size * section_count if sections else 0)


class Reader:
    """Reads the core in its own thread, ahead of the compressor, so that the crashed process is released early."""

    def __init__(self, descriptor: int, settings: Settings, deadline: float) -> None:
        """Prepare to read `descriptor`, which is closed at the end, at a limit, or at `deadline` (monotonic)."""
        self.reason, self.size, self.ended = "", 0, False
        self._descriptor, self._deadline = descriptor, deadline
        self._limit = settings.MAX_DUMP_BYTES or sys.maxsize
        self._most, self._allowed, self._allocated = settings.BUFFER_BYTES // CHUNK, FEW, 0
        self._full: SimpleQueue[tuple[memoryview, int]] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        enlarge(descriptor)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the core piece by piece; a piece is valid until the next is asked for."""
        start_new_thread(self._read, ())
        while True:
            buffer, size = self._full.get()
            if not size:
                return
            yield buffer[:size]
            self._free.put(buffer)

    def stop(self, reason: str) -> None:
        """Read no more, for this reason; the first one stays."""
        self.reason = self.reason or reason

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        try:
            while not self.reason and self._fill(poll):
                pass
        except (OSError, MemoryError) as error:
            log("reading the core: %s" % error)
            self.stop("read_error")
        finally:
            os.close(self._descriptor)
            self.ended = True
            self._full.put((memoryview(b""), 0))

    def _fill(self, poll: select.poll) -> bool:
        """Fill one buffer and hand it over; False at the end of the core."""
        buffer, size, count = self._buffer(), 0, 1
        room = min(CHUNK, self._limit - self.size)
        if not room:
            self.stop("max_dump_bytes")
        while size < room and count and not self.reason:
            if poll.poll(500):
                count = os.readv(self._descriptor, [buffer[size:room]])
                size += count
            if time.monotonic() > self._deadline:
                self.stop("deadline")
        self.size += size
        if size:
            self._full.put((buffer, size))
        return count > 0

    def _buffer(self) -> memoryview:
        """Return a buffer: a used one, else a new one while memory allows, else the next one that comes free."""
        try:
            return self._free.get_nowait()
        except Empty:
            pass
        if self._allocated == self._allowed < self._most:
            available = int(read_fields("/proc/meminfo")[b"MemAvailable"][0]) // 1024
            eighth = (available + self._allocated) // 8
            self._allowed = max(self._allowed, min(self._allowed + 64, self._most, eighth))
        while self._allocated == self._allowed and not self.reason:
            try:
                return self._free.get(True, 0.5)
            except Empty:
                if time.monotonic() > self._deadline:
                    self.stop("deadline")
        self._allocated += 1
        if self._allocated <= FEW:
            return memoryview(bytearray(CHUNK))
        from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

        return memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE))


class Raw:
    """Keeps the core as it is; runs of zeros become holes."""

    name = "none"
    priority = (os.PRIO_PROCESS, 0)

    def __init__(self, dump: int) -> None:
        """Write to the descriptor `dump`."""
        self._dump, self.size = dump, 0

    def write(self, piece: memoryview) -> None:
        """Take the next piece; raises OSError."""
        if any(piece[:64]) or piece != bytes(len(piece)):
            write_all(self._dump, piece)
        self.size = os.lseek(self._dump, self.size + len(piece), os.SEEK_SET)

    def close(self) -> str:
        """End the file; return why it is not valid, or nothing."""
        os.ftruncate(self._dump, self.size)
        return ""


class Stream:
    """Compresses in this process. Each piece ends on a byte, so that what is on disk can always be ended properly."""

    priority = (os.PRIO_PROCESS, 0)

    def __init__(self, dump: int, name: str, settings: Settings) -> None:
        """Write gzip to the descriptor `dump` with `isal` or the standard library; raises ImportError, OSError."""
        level = settings.LEVEL
        if name == "isal":
            if settings.PYTHON_PATH:
                check_owner(settings.PYTHON_PATH)
                sys.path.append(settings.PYTHON_PATH)
            from isal import isal_zlib as codec

            level = min(level, 3)
        else:
            import zlib as codec  # type: ignore[no-redef]
        self.name, self.size, self._dump, self._codec, self._sum, self._end = name, 0, dump, codec, 0, 10
        self._deflate = codec.compressobj(level, 8, -15)
        write_all(dump, b"\x1f\x8b\x08\0\0\0\0\0\0\xff")

    def write(self, piece: memoryview) -> None:
        """Compress the next piece; raises OSError."""
        data = self._deflate.compress(piece) + self._deflate.flush(SYNC_FLUSH)
        write_all(self._dump, data)
        self._sum = self._codec.crc32(piece, self._sum)
        self.size += len(piece)
        self._end += len(data)

    def close(self) -> str:
        """End the file after the last whole piece: an empty last block, CRC and length (RFC 1952)."""
        os.ftruncate(self._dump, self._end)
        os.lseek(self._dump, self._end, os.SEEK_SET)
        write_all(self._dump, b"\x03\0" + struct.pack("<II", self._sum, self.size & 0xFFFFFFFF))
        return ""


class Child:
    """Compresses in a pigz process, which writes to the file itself."""

    name = "pigz"

    def __init__(self, dump: int, settings: Settings) -> None:
        """Start pigz; raises OSError when it cannot be."""
        program = next((path for path in PIGZ if os.access(path, os.X_OK)), "no pigz")
        self.size, self._patience = 0, min(60, settings.DEADLINE_SECONDS)
        source, self._pipe = os.pipe()
        told, tell = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.setpgid(0, 0)
                os.dup2(source, 0)
                os.dup2(dump, 1)
                os.execve(program, ["pigz", "-c", "-%d" % settings.LEVEL], {"PATH": "/usr/bin:/bin"})  # noqa: S606
            finally:
                os.write(tell, b"!")
                os._exit(127)
        os.close(source)
        os.close(tell)
        failed = os.read(told, 1)  # exec closes the other end
        os.close(told)
        if failed:
            os.close(self._pipe)
            os.waitpid(self._pid, 0)
            raise OSError(8, "cannot start %s" % program)
        self.priority = (os.PRIO_PGRP, self._pid)
        enlarge(self._pipe)
        os.set_blocking(self._pipe, False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLOUT)

    def write(self, piece: memoryview) -> None:
        """Hand the next piece to pigz; raises OSError when it died or takes nothing."""
        view = piece
        while len(view):
            if not self._poll.poll(self._patience * 1000):
                os.kill(self._pid, 9)
                raise TimeoutError("takes nothing for %d s" % self._patience)
            view = view[os.write(self._pipe, view) :]
        self.size += len(piece)

    def close(self) -> str:
        """Wait for pigz to end; return `compressor_failed` unless it said that all is well."""
        os.close(self._pipe)
        end, pause = time.monotonic() + self._patience, 0.0005
        while True:
            done, status = os.waitpid(self._pid, os.WNOHANG)
            if done:
                return "compressor_failed" if status else ""
            if time.monotonic() > end:
                os.kill(self._pid, 9)
            time.sleep(pause)
            pause = min(0.05, pause * 2)


def open_sink(dump: int, settings: Settings, config: str) -> Raw | Stream | Child:
    """Start the configured compressor, else the next that works."""
    choice = settings.COMPRESSOR
    if choice == "none":
        return Raw(dump)
    if choice == "auto":
        try:
            check_owner(calibration_path(config))
            choice = read_file(calibration_path(config), 64).decode("ascii", "replace").strip()
        except OSError:
            pass
    order = ["pigz", "isal", "gzip"]
    for name in [choice, *order] if choice in order else order:
        try:
            return Child(dump, settings) if name == "pigz" else Stream(dump, name, settings)
        except (OSError, ImportError) as error:
            if name == choice:
                log("%s does not work: %s" % (name, error))
    raise Refused("directory", "no compressor can write")


def calibration_path(config: str) -> str:
    """Return where the fastest compressor's name is kept: beside a configuration that -C names."""
    return CALIBRATION if config == CONFIG else os.path.join(os.path.dirname(config), "compressor")


def calibrate(config: str) -> int:
    """Measure every compressor on data like a core's and remember the fastest; return the exit code."""
    path = calibration_path(config)
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    settings = Settings(config)
    numbers = b"".join(struct.pack("<QQ", 0x7F0000000000 + 48 * index, index) for index in range(CHUNK // 4))
    sample = memoryview(
        (
            read_file(os.path.realpath("/proc/self/exe"), 4 << 20)
            + numbers
            + os.urandom(CHUNK)
            + bytes(4 * CHUNK)
        )
        * 2
    )
    best, least = "gzip", float("inf")
    for name in ("pigz", "isal", "gzip"):
        dump = os.open(path + ".new", NEW_FILE | os.O_TRUNC, 0o644)
        try:
            began = time.monotonic()
            sink = Child(dump, settings) if name == "pigz" else Stream(dump, name, settings)
            for start in range(0, len(sample), CHUNK):
                sink.write(sample[start : start + CHUNK])
            failed = sink.close()
            took = time.monotonic() - began
            print("%s: %s" % (name, failed or "%.0f MB/s" % (len(sample) / took / 1e6)))
            if not failed and took < least:
                best, least = name, took
        except (OSError, ImportError) as error:
            print("%s: cannot be used: %s" % (name, error))
        finally:
            os.close(dump)
    dump = os.open(path + ".new", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    write_all(dump, best.encode() + b"\n")
    os.close(dump)
    os.rename(path + ".new", path)
    print("%s is the fastest; COMPRESSOR=auto uses it (%s)" % (best, path))
    return 0


def lock(descriptor: int, seconds: float) -> bool:
    """Lock a file within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)


class State:
    """The directory `.helper`: what was refused, and the slots."""

    def __init__(self, directory: int) -> None:
        """Open or create it in the watch directory; raises OSError when it is not ours alone."""
        try:
            os.mkdir(".helper", 0o700, dir_fd=directory)
        except FileExistsError:
            pass
        self._directory = os.open(".helper", DIRECTORY, dir_fd=directory)
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, ".helper belongs to others, or others may use it")

    def _open(self, name: str, flags: int = 0) -> int:
        return os.open(name, NEW_FILE | flags, 0o600, dir_fd=self._directory)

    def take_slot(self, count: int, deadline: float) -> bool:
        """Wait for one of `count` slots, held until this process ends."""
        slots: list[int] = []
        try:
            slots.extend(self._open("slot-%d" % number) for number in range(count))
        except OSError as error:
            for descriptor in slots:
                os.close(descriptor)
            log("MAX_CONCURRENT does not hold: %s" % error.strerror)
            return True
        while time.monotonic() < deadline:
            if any(lock(descriptor, 0) for descriptor in slots):
                return True
            time.sleep(0.01)
        return False

    def tally(self, known: dict[str, bytes], reason: str, most: int, seconds: int) -> bool:
        """Count a dump in the record of its executable, container and signal; True for the first `most`."""
        guard = -1
        try:
            guard = self._open("lock")
            if not lock(guard, 2):
                return most > 0
            fields = {key: known.get(key, b"") for key in ("exe", "container_id", "pod_uid", "signal")}
            fields.update(exe=fields["exe"] or known.get("thread", b""), reason=reason.encode())
            name, now = self._record_name(fields, seconds), int(time.time())
            first, kept, suppressed = self._read(name)
            if not 0 <= now - first < seconds:
                first, kept, suppressed = now, 0, 0
            take = kept < most
            counts = {"kept": kept + take, "suppressed": suppressed + (not take), "first": first, "last": now,
                      "seconds": seconds}  # fmt: skip
            fields.update({key: b"%d" % value for key, value in counts.items()})
            draft = self._open("draft", os.O_TRUNC)
            try:
                write_all(draft, "".join("%s=%s\n" % (key, percent(fields[key])) for key in fields).encode())
            finally:
                os.close(draft)
            os.rename("draft", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return take
        except (OSError, ValueError) as error:  # ValueError: a damaged record
            log("%s is not counted: %s" % (reason, error))
            return most > 0
        finally:
            if guard >= 0:
                os.close(guard)

    def _record_name(self, fields: dict[str, bytes], seconds: int) -> str:
        """Return the record's name; where there are too many records, one counts for all executables."""
        from _blake2 import blake2b

        name = blake2b(b"\0".join(fields.values()), digest_size=12).hexdigest()
        if exists(name, self._directory):
            return str(name)
        records = [other for other in os.listdir(self._directory) if len(other) == len(name)]
        if len(records) >= STATE_FILES:
            for other in records:
                if os.stat(other, dir_fd=self._directory).st_mtime < time.time() - max(3600, seconds):
                    os.unlink(other, dir_fd=self._directory)
            fields["exe"] = b"*"
            name = blake2b(b"\0".join(fields.values()), digest_size=12).hexdigest()
        return str(name)

    def _read(self, name: str) -> tuple[int, int, int]:
        """Return first, kept, suppressed."""
        try:
            text = read_file(name, 16384, self._directory)
        except FileNotFoundError:
            return 0, 0, 0
        pairs = {key: value for key, _, value in (line.partition(b"=") for line in text.split(b"\n"))}
        numbers = [pairs.get(key, b"") for key in (b"first", b"kept", b"suppressed")]
        first, kept, suppressed = (int(number) if number.isdigit() else 0 for number in numbers)
        return first, kept, suppressed


def percent(value: bytes) -> str:
    """Encode bytes that are not plain as %XX."""
    return "".join(chr(byte) if byte in PLAIN + b"/" else "%%%02X" % byte for byte in value)


class Handler:
    """One crash, from its arguments to the published file."""

    def __init__(self, argv: list[str], core: int) -> None:
        """Read arguments, configuration and metadata; `core` is the descriptor to read from."""
        self.started = time.monotonic()
        self.core = core
        self.crash = parse_arguments(argv)
        log("pid %(P)s: dump of %(e)a, signal %(s)s, has begun" % self.crash, 6)
        self.config = self.crash.get("C") or CONFIG
        self.settings = Settings(self.config)
        _signal.alarm(self.settings.DEADLINE_SECONDS + 30)  # whatever hangs, even in /proc, ends here
        self.deadline = self.started + self.settings.DEADLINE_SECONDS
        if self.crash["F"]:
            try:
                os.set_inheritable(int(self.crash["F"]), False)
            except (OSError, OverflowError) as error:
                log("pidfd %s: %s" % (self.crash["F"], error))
        self.known = describe(self.crash)
        if self.settings.CGROUP:
            self.join_cgroup(self.settings.CGROUP)

    def join_cgroup(self, path: str) -> None:
        """Leave the root cgroup for the prepared one, and keep the buffer below half of its memory."""
        try:
            write_file(path + "/cgroup.procs", b"0")
            limit = read_file(path + "/memory.max", 32).strip()
            if limit.isdigit():
                self.settings.BUFFER_BYTES = min(self.settings.BUFFER_BYTES, int(limit) // 2)
        except OSError as error:
            log("CGROUP %a: %s" % (path, error.strerror))

    def run(self) -> None:
        """Admit, stream, publish; raises Refused, OSError."""
        if self.crash["s"] in self.settings.IGNORE_SIGNALS.replace(",", " ").split():
            raise Refused("", "IGNORE_SIGNALS")
        directory = os.open(self.settings.WATCH_DIR, DIRECTORY)
        status = os.fstat(directory)
        if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            log("WATCH_DIR %a can be changed by others: chown root, chmod 0700" % self.settings.WATCH_DIR)
        state = None
        try:
            state = State(directory)
        except OSError as error:
            log("neither RATE_LIMIT nor MAX_CONCURRENT hold: .helper: %s" % error.strerror)
        try:
            self.admit(directory, state)
        except Refused as refused:
            if state and refused.args[0] != "rate_limit":
                state.tally(self.known, refused.args[0], 0, 600)
            raise
        self.take(directory)

    def admit(self, directory: int, state: State | None) -> None:
        """Raise Refused when a limit forbids the dump."""
        if self.settings.RESPECT_RLIMIT == "yes" and self.crash["c"] == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        space = os.fstatvfs(directory)
        reason = self.disk_limit(directory) or ("inodes" if space.f_files and space.f_favail < 100 else "")
        if reason:
            raise Refused(reason, "the disk is too full for another dump")
        most, _, seconds = self.settings.RATE_LIMIT.partition("/")
        if state and seconds and not state.tally(self.known, "rate_limit", int(most), int(seconds)):
            raise Refused("rate_limit", "enough of this executable, container and signal")
        slots = self.settings.MAX_CONCURRENT
        if state and slots and not state.take_slot(slots, self.deadline):
            raise Refused("no_slot", "MAX_CONCURRENT others ran all the time")

    def disk_limit(self, directory: int) -> str:
        """Return which limit of the disk is met, or nothing."""
        space = os.fstatvfs(directory)
        if space.f_bavail * 100 < self.settings.KEEP_FREE_PERCENT * space.f_blocks:
            return "keep_free"
        held = 0
        for name in os.listdir(directory) if self.settings.MAX_TOTAL_BYTES else ():
            try:
                held += os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:  # the collector was faster
                pass
        return "max_total_bytes" if held > self.settings.MAX_TOTAL_BYTES else ""

    def take(self, directory: int) -> None:
        """Stream the core into the watch directory and publish it."""
        suffix = "" if self.settings.COMPRESSOR == "none" else ".gz"
        dump, name = create(directory, self.crash, suffix)
        set_attributes(dump, self.known)
        sink = open_sink(dump, self.settings, self.config)
        reason, expected = self.stream(sink, directory, dump)
        if not sink.size and reason != "compressor_failed":
            os.unlink(name + ".partial", dir_fd=directory)
            raise Refused("", "nothing was read: " + reason)
        took = (time.monotonic() - self.started) * 1000
        result = {"bytes": sink.size, "expected_bytes": expected or "", "truncated": reason}
        result.update(compressor=sink.name, duration_ms=int(took))
        set_attributes(dump, {key: str(value).encode() for key, value in result.items() if value != ""}, 600)
        if reason == "compressor_failed":
            raise Refused("", "%s failed; what it wrote is in %s.partial" % (sink.name, name))
        name = publish(directory, dump, name, self.crash, suffix)
        told = (self.crash["P"], name, sink.size, sink.name, took, ", truncated: " + reason if reason else "")
        log("pid %s: %s: %d bytes by %s in %d ms%s" % told, 6)

    def stream(self, sink: Raw | Stream | Child, directory: int, dump: int) -> tuple[str, int]:
        """Move the core into the sink; return why it is not whole (or nothing) and the length it should have."""
        reader = Reader(self.core, self.settings, self.deadline)
        head, wanted, expected, looked, failure, released = bytearray(), 64, 0, 0, "", False
        for piece in reader.chunks():
            if reader.ended and not released:  # nobody waits for the rest: give way to others
                released = True
                os.setpriority(*sink.priority, 9)
            if failure:
                continue
            if len(head) < wanted:
                head += piece
                wanted, expected = elf_length(head)
            try:
                sink.write(piece)
            except OSError as error:
                log("pid %s: %s: %s" % (self.crash["P"], sink.name, error))
                failure = "disk_full"
            if sink.size - looked >= LOOK_AROUND:
                looked = sink.size
                os.posix_fadvise(dump, 0, 0, os.POSIX_FADV_DONTNEED)
                failure = failure or self.disk_limit(directory)
            if failure:
                reader.stop(failure)
        _signal.alarm(self.settings.DEADLINE_SECONDS + 30)
        failed = sink.close()
        if expected and sink.size >= expected:
            return failed, expected
        return failed or failure or reader.reason or ("killed" if wanted else "not_elf"), expected


def main() -> int:
    """Do what the command line says; the kernel ignores the exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] == "--help":
        print(HELP + "".join("  %s=%s\n" % item for item in Settings.defaults().items()), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print("core-dump-helper", VERSION)
        return 0
    if argv[0] == "--calibrate":
        return calibrate(parse_arguments(argv[1:]).get("C") or CONFIG)
    try:
        Handler(argv, secure_process()).run()
    except Refused as refused:
        log("no dump: " + ": ".join(filter(None, refused.args)))
        return 1
    except Exception as error:  # noqa: BLE001 - nobody reads a traceback here; our end releases the process
        log("no dump: %s: %s" % (type(error).__name__, error), 3)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

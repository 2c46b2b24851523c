#!/usr/bin/python3 -IS
"""Take one core dump from the kernel's pipe, compress it, and publish it whole in the watch directory.

The kernel starts this program at every crash, as root, in the initial namespaces, with no environment and with
only descriptor 0 (the core) and perhaps 3 (a pidfd) open; see core(5). It imports little because it starts so often.
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

-C<path> names another configuration file than /etc/core-dump-handler/helper.conf (KEY=value lines):
"""
CONFIG = "/etc/core-dump-handler/helper.conf"
CALIBRATION = "/var/lib/core-dump-handler/compressor"
PIGZ = ("/usr/bin/pigz", "/usr/local/bin/pigz")
COMPRESSORS = ("auto", "pigz", "isal", "gzip", "none")
SETTINGS: dict[str, tuple[str | int | bool, str]] = {
    "WATCH_DIR": ("/core_dumps", "directory that dumps are published in"),
    "COMPRESSOR": ("auto", "auto, pigz, isal, gzip or none"),
    "LEVEL": (1, "compression level, 1 to 9 (isal: at most 3)"),
    "MAX_DUMP_BYTES": (0, "cut a core after so many bytes before compression; 0 = no limit"),
    "KEEP_FREE_PERCENT": (15, "cut or refuse a dump when less of the file system would be free"),
    "MAX_TOTAL_BYTES": (0, "refuse a dump when so many bytes wait in WATCH_DIR; 0 = no limit"),
    "DEADLINE_SECONDS": (300, "let the crashed process go after so long, with what was read until then"),
    "RATE_LIMIT": ("5/600", "dumps/seconds for each executable, container and signal; 0 = no limit"),
    "MAX_CONCURRENT": (8, "dumps taken at one time, others wait; 0 = no limit"),
    "BUFFER_BYTES": (1 << 30, "memory to read ahead of the compressor, at most 1/8 of what is available"),
    "IGNORE_SIGNALS": ("", "signal numbers whose dumps are not taken, separated by commas"),
    "RESPECT_RLIMIT": (False, "yes: no dump of a process whose RLIMIT_CORE is 0"),
    "CGROUP": ("", "prepared cgroup directory to move into"),
    "PYTHON_PATH": ("", "directory that holds the isal package"),
}
CHUNK = 1 << 20
HEADER_LIMIT = 16 << 20
LOOK_AROUND = 32 << 20  # bytes between two looks at the disk and the page cache
ATTRIBUTE_SPACE = 2600  # ext4 has 4 KiB for all attributes; the collector's own needs the rest
STATE_FILES = 1000
SYNC_FLUSH = 2


class Refused(Exception):  # noqa: N818 - an outcome, not a fault
    """The dump is not taken; the first argument is the reason."""


def log(text: str, priority: int = 4) -> None:
    """Write one line to the kernel log, else to syslog, and to descriptor 2 (/dev/null under the kernel)."""
    line = "core-dump-helper[%d]: %s" % (os.getpid(), text[:900])
    try:
        os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:
        pass
    try:
        kmsg = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            os.write(kmsg, ("<%d>%s" % (24 + priority, line)).encode("utf-8", "backslashreplace"))
        finally:
            os.close(kmsg)
    except OSError:
        import syslog

        syslog.syslog(syslog.LOG_DAEMON | priority, line.encode("ascii", "backslashreplace").decode())


def secure_process() -> int:
    """Give descriptors 0 to 2 a harmless meaning, become undumpable and humble; return the core's descriptor."""
    core = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    try:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        for descriptor in (1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                os.dup2(null, descriptor)
        if null > 2:
            os.close(null)
        os.umask(0o077)
        os.nice(9)
        if os.geteuid() == 0:
            os.setegid(65534)  # a change of the effective gid sets "dumpable" to fs.suid_dumpable: prctl(2)
            os.setegid(0)
        write_file("/proc/self/oom_score_adj", b"500")
    except OSError as error:
        log("cannot prepare: %s" % error)
    return core


def write_file(path: str, data: bytes) -> None:
    """Write to a file of the kernel's."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_file(path: str, limit: int, directory: int | None = None, trusted: bool = False) -> bytes:
    """Read at most `limit` bytes; `trusted`: only a regular file that nobody but root (or we) can change."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
    try:
        if trusted:
            status = os.fstat(descriptor)
            if status.st_mode & 0o170022 != 0o100000 or status.st_uid not in (0, os.geteuid()):
                raise PermissionError("%s: not a regular file that only root can write" % path)
        data = b""
        while len(data) < limit:
            block = os.read(descriptor, limit - len(data))
            if not block:
                break
            data += block
        return data
    finally:
        os.close(descriptor)


def parse_arguments(argv: list[str]) -> dict[str, str]:
    """Split `-Xvalue` arguments; the first of a kind wins, what follows `-h` belongs to the host name until `--`.

    Kernels before 5.3 split after expansion: host name and name may come in pieces, values may be missing.
    """
    values: dict[str, str] = {}
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
    values["d"] = values["d"] or "2"
    return values


def parse_setting(key: str, text: str) -> str | int | bool:
    """Return a setting's value, or raise ValueError that says what is accepted."""
    default = SETTINGS[key][0]
    if isinstance(default, bool):
        if text not in ("yes", "no"):
            raise ValueError("yes or no")
        return text == "yes"
    if isinstance(default, int):
        low, high = {"LEVEL": (1, 9), "KEEP_FREE_PERCENT": (0, 99), "DEADLINE_SECONDS": (1, 86400)}.get(
            key, (0, 1 << 60)
        )
        if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
            raise ValueError("a whole number from %d to %d" % (low, high))
        return int(text)
    if key == "COMPRESSOR" and text not in COMPRESSORS:
        raise ValueError("one of " + ", ".join(COMPRESSORS))
    if key in ("WATCH_DIR", "CGROUP", "PYTHON_PATH") and not (text.startswith("/") or text == default):
        raise ValueError("an absolute path")
    numbers = {"RATE_LIMIT": "/", "IGNORE_SIGNALS": ","}.get(key)
    if numbers and text not in ("", "0"):
        parts = [part.strip() for part in text.split(numbers)]
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts) or (
            key == "RATE_LIMIT" and len(parts) != 2
        ):
            raise ValueError("like 5/600, or 0" if key == "RATE_LIMIT" else "like 3,24")
    return text


def read_settings(path: str) -> dict[str, str | int | bool]:
    """Read the configuration; whatever is wrong in it is logged and has its default."""
    settings = {key: default for key, (default, _) in SETTINGS.items()}
    try:
        text = read_file(path, 1 << 16, trusted=True).decode("utf-8", "surrogateescape")
    except OSError as error:
        log("%a: %s: every setting has its default" % (path, error.strerror or error))
        return settings
    for line in text.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if not key or key.startswith("#"):
            continue
        try:
            if not equals or key not in SETTINGS:
                raise ValueError("one of " + ", ".join(SETTINGS))
            settings[key] = parse_setting(key, value)
        except ValueError as error:
            log("%a: %a is wrong, must be %s: ignored" % (path, line[:100], error))
    return settings


def parse_cgroup(text: bytes) -> dict[str, bytes]:
    """Return path, container id and pod uid of /proc/PID/cgroup. The outermost wins: a container makes inner ones."""
    found: dict[str, bytes] = {}
    paths = [line.split(b":", 2)[2] for line in text.split(b"\n") if line.count(b":") > 1]
    unified = [line[3:] for line in text.split(b"\n") if line.startswith(b"0::/") and len(line) > 4]
    path = unified[0] if unified else max(paths, key=len, default=b"")
    if path:
        found["cgroup"] = path
    for word in path.translate(bytes.maketrans(b"/.-:", b"    ")).split():
        if len(word) == 64 and not word.strip(b"0123456789abcdef"):
            found["container_id"] = word
            break
    for part in path.replace(b"_", b"-").split(b"/"):
        uid = part[part.rfind(b"pod") + 3 :][:36] if b"pod" in part else b""
        if [len(word) for word in uid.split(b"-")] == [8, 4, 4, 4, 12] and not uid.strip(
            b"0123456789abcdef-"
        ):
            found["pod_uid"] = uid
            break
    return found


def read_process(crash: dict[str, str]) -> dict[str, bytes]:
    """Read what /proc says of the process, through one directory descriptor; `identity` when it is another one."""
    process = os.open("/proc/%d" % int(crash["P"]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        start = int(read_file("stat", 4096, process).rpartition(b")")[2].split()[19])
        lines = [line.partition(b":") for line in read_file("status", 8192, process).split(b"\n")]
        status = {key: value.split() for key, _, value in reversed(lines)}
        thread = status
        if crash["i"]:
            lines = [
                line.partition(b":")
                for line in read_file("task/%s/status" % crash["i"], 8192, process).split(b"\n")
            ]
            thread = {key: value.split() for key, _, value in reversed(lines)}
        found = parse_cgroup(read_file("cgroup", 16384, process))
        found["threads"] = status[b"Threads"][0]
        found["ns_pid"] = status[b"NSpid"][-1] if status.get(b"NSpid") else b""
        found["comm"] = read_file("comm", 64, process)[:-1]
        found["cmdline"] = read_file("cmdline", 1024, process).rstrip(b"\0").replace(b"\0", b" ")
        try:
            found["exe"] = os.fsencode(os.readlink("exe", dir_fd=process))
        except OSError:
            pass
    finally:
        os.close(process)
    own_start = int(read_file("/proc/self/stat", 4096).rpartition(b")")[2].split()[19])
    same = start <= own_start
    for key, field in (("u", b"Uid"), ("g", b"Gid")):
        same = same and crash[key] in ("", thread[field][0].decode())
    if not (same and pidfd_agrees(crash)):
        return {"sensitive": b"identity"}
    return found


def pidfd_agrees(crash: dict[str, str]) -> bool:
    """Check the process against the kernel's pidfd (%F, since 6.16 and in late 5.10 and 6.1), where there is one."""
    if not crash["F"]:
        return True
    for line in read_file("/proc/self/fdinfo/%d" % int(crash["F"]), 4096).split(b"\n"):
        if line.startswith(b"Pid:"):
            return line[4:].strip() == b"%d" % int(crash["P"])
    return True


def describe(crash: dict[str, str]) -> dict[str, bytes]:
    """Return the attributes of the dump, most important first. Whatever fails costs metadata, never the dump."""
    names = {"pid": "P", "signal": "s", "timestamp": "t", "uid": "u", "gid": "g", "tid": "i", "dumpable": "d",
             "rlimit": "c", "thread": "e", "hostname": "h"}  # fmt: skip
    known = {name: os.fsencode(crash.get(key, "")) for name, key in names.items()}
    if crash["d"] != "1":
        known["sensitive"] = b"dumpable=" + crash["d"].encode()
    try:
        found = read_process(crash)
    except Exception as error:  # noqa: BLE001 - hostile input must not cost the dump
        log("pid %s: no metadata from /proc: %s: %s" % (crash["P"], type(error).__name__, error))
        found = {}
    if "sensitive" in found:
        log("pid %s: /proc belongs to another process: metadata dropped" % crash["P"])
    known.update(found)
    order = ("comm", "ns_pid", "container_id", "pod_uid", "threads", "exe", "cgroup", "cmdline")
    return {name: known[name] for name in ("sensitive", *names, *order) if known.get(name)}


def set_attributes(descriptor: int, attributes: dict[str, bytes], space: int = ATTRIBUTE_SPACE) -> None:
    """Set `user.coredump.*`; what does not fit into `space` is cut. Without support only metadata is lost."""
    for name, value in attributes.items():
        room = min(1024, space - len(name) - 40)
        if room <= 0:
            break
        try:
            os.setxattr(descriptor, "user.coredump." + name, value[:room])
            space -= len(name) + 40 + len(value[:room])
        except OSError as error:
            log("attribute %s: %s" % (name, error.strerror))


def file_name(crash: dict[str, str], copy: int, suffix: str) -> str:
    """Return `core-%e-%t-%p-%s[-copy]suffix` with every other byte of %e as `_`."""
    allowed = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-"
    comm = "".join(chr(byte) if byte in allowed else "_" for byte in os.fsencode(crash.get("e", ""))[:180])
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
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for copy in range(10000):
        name = file_name(crash, copy, suffix)
        try:
            dump = os.open(name + ".partial", flags, 0o600, dir_fd=directory)
        except FileExistsError:
            continue
        try:
            fcntl.flock(dump, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not exists(name, directory) and exists(name + ".partial", directory):
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
    if head[4] == 2:
        (table, sections), layout, at = struct.unpack_from(order + "QQ", head, 32), order + "8xQ16xQ16x", 54
    else:
        (table, sections), layout, at = struct.unpack_from(order + "II", head, 28), order + "4xI8xI12x", 42
    size, count, section_size, section_count = struct.unpack_from(order + "HHHH", head, at)
    if size != struct.calcsize(layout) or table > HEADER_LIMIT:
        return 0, 0
    if len(head) < table + size:
        return table + size, 0
    if count == 0xFFFF:  # PN_XNUM
        count = max(0, struct.unpack_from(layout, head, table)[0] - table) // size
    end = table + count * size
    if len(head) < end or end > HEADER_LIMIT:
        return (end, 0) if end <= HEADER_LIMIT else (0, 0)
    segments = struct.iter_unpack(layout, head[table:end])
    length = max([offset + held for offset, held in segments], default=0)
    return end, max(length, end, sections + section_size * section_count if sections else 0)


class Reader:
    """Reads the core in its own thread, ahead of the compressor, so that the crashed process is released early."""

    def __init__(self, descriptor: int, settings: dict[str, str | int | bool], deadline: float) -> None:
        """Prepare to read `descriptor`, which is closed at the end, when a limit is met, or at `deadline`."""
        self.reason, self.size, self._descriptor, self._deadline = "", 0, descriptor, deadline
        self.limit = int(settings["MAX_DUMP_BYTES"]) or sys.maxsize
        self._buffer_limit, self._allowed, self._allocated = int(settings["BUFFER_BYTES"]) // CHUNK, 4, 0
        self._full: SimpleQueue[tuple[bytearray, int]] = SimpleQueue()
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        try:
            fcntl.fcntl(descriptor, 1031, CHUNK)  # F_SETPIPE_SZ
        except OSError:
            pass

    def chunks(self) -> Iterator[memoryview]:
        """Yield the core piece by piece; a piece is valid until the next is asked for."""
        start_new_thread(self._read, ())
        while True:
            buffer, size = self._full.get()
            if not size:
                return
            yield memoryview(buffer)[:size]
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
            self._full.put((bytearray(), 0))

    def _fill(self, poll: select.poll) -> bool:
        """Fill one buffer and hand it over; False at the end of the core."""
        buffer, size, count = self._buffer(), 0, 1
        room = min(CHUNK, self.limit - self.size)
        if not room:
            self.stop("max_dump_bytes")
        while size < room and count and not self.reason:
            if poll.poll(500):
                count = os.readv(self._descriptor, [memoryview(buffer)[size:room]])
                size += count
            elif time.monotonic() > self._deadline:
                self.stop("deadline")
        self.size += size
        if time.monotonic() > self._deadline:
            self.stop("deadline")
        if size:
            self._full.put((buffer, size))
        return count > 0

    def _buffer(self) -> bytearray:
        """Return a buffer: a used one, else a new one while memory allows, else the next one that comes free."""
        try:
            return self._free.get_nowait()
        except Empty:
            pass
        if self._allocated == self._allowed < self._buffer_limit:
            fields = read_file("/proc/meminfo", 4096).partition(b"MemAvailable:")[2].split()
            eighth = (int(fields[0]) // 1024 + self._allocated) // 8 if fields else 0
            self._allowed = max(self._allowed, min(self._allowed + 64, self._buffer_limit, eighth))
        if self._allocated < self._allowed:
            self._allocated += 1
            return bytearray(CHUNK)
        while not self.reason:
            try:
                return self._free.get(True, 0.5)
            except Empty:
                if time.monotonic() > self._deadline:
                    self.stop("deadline")
        return bytearray(CHUNK)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Raw:
    """Keeps the core as it is; runs of zeros become holes."""

    name = "none"

    def __init__(self, dump: int) -> None:
        """Write to the descriptor `dump`."""
        self._dump, self.size = dump, 0

    def write(self, piece: memoryview) -> None:
        """Take the next piece; raises OSError."""
        if not any(piece[:64]) and piece == bytes(len(piece)):
            os.lseek(self._dump, len(piece), os.SEEK_CUR)
        else:
            write_all(self._dump, piece)
        self.size += len(piece)

    def close(self) -> str:
        """Set the length; return what went wrong, or nothing."""
        os.ftruncate(self._dump, self.size)
        return ""


class Stream:
    """Compresses in this process. Each piece ends on a byte, so that what is on disk can always be ended properly."""

    def __init__(self, dump: int, name: str, settings: dict[str, str | int | bool]) -> None:
        """Write gzip to the descriptor `dump` with `isal` or the standard library; raises ImportError."""
        level = int(settings["LEVEL"])
        if name == "isal":
            folder = str(settings["PYTHON_PATH"])
            if folder and folder not in sys.path:
                sys.path.append(folder)
            from isal import isal_zlib as codec

            level = min(level, 3)
        else:
            import zlib as codec  # type: ignore[no-redef]
        self.name, self.size, self._dump, self._codec, self._sum = name, 0, dump, codec, 0
        self._deflate = codec.compressobj(level, 8, -15)
        self._end = 10
        write_all(dump, b"\x1f\x8b\x08\0\0\0\0\0\0\xff")

    def write(self, piece: memoryview) -> None:
        """Compress the next piece; raises OSError."""
        data = self._deflate.compress(piece) + self._deflate.flush(SYNC_FLUSH)
        write_all(self._dump, data)
        self._sum = self._codec.crc32(piece, self._sum)
        self.size += len(piece)
        self._end += len(data)

    def close(self) -> str:
        """End the file after the last whole piece (an empty last block, CRC and length: RFC 1952)."""
        os.ftruncate(self._dump, self._end)
        os.lseek(self._dump, self._end, os.SEEK_SET)
        write_all(self._dump, b"\x03\0" + struct.pack("<II", self._sum, self.size & 0xFFFFFFFF))
        return ""


class Child:
    """Compresses in a pigz process, which writes to the file itself."""

    name = "pigz"

    def __init__(self, dump: int, settings: dict[str, str | int | bool]) -> None:
        """Start pigz; raises OSError when it cannot be."""
        program = next((path for path in PIGZ if os.access(path, os.X_OK)), "")
        if not program:
            raise FileNotFoundError("no pigz in %s" % (PIGZ,))
        self.size, self._stall_seconds = 0, min(60, int(settings["DEADLINE_SECONDS"]))
        source, self._pipe = os.pipe()
        failed, failure = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.dup2(source, 0)
                os.dup2(dump, 1)
                os.execve(  # noqa: S606 - that there is no shell is the point
                    program, ["pigz", "-c", "-%d" % int(settings["LEVEL"])], {"PATH": "/usr/bin:/bin"}
                )
            finally:
                os.write(failure, b"!")
                os._exit(127)
        os.close(source)
        os.close(failure)
        try:
            if os.read(failed, 1):
                os.close(self._pipe)
                os.waitpid(self._pid, 0)
                raise OSError("cannot start %s" % program)
        finally:
            os.close(failed)
        try:
            fcntl.fcntl(self._pipe, 1031, CHUNK)  # F_SETPIPE_SZ
        except OSError:
            pass
        os.set_blocking(self._pipe, False)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLOUT)

    def write(self, piece: memoryview) -> None:
        """Hand the next piece to pigz; raises OSError when it died or takes nothing."""
        view = piece
        while len(view):
            if not self._poll.poll(self._stall_seconds * 1000):
                raise TimeoutError("pigz takes nothing")
            view = view[os.write(self._pipe, view) :]
        self.size += len(piece)

    def close(self) -> str:
        """Wait for pigz to end; return `compressor_failed` unless it said that all is well."""
        os.close(self._pipe)
        end = time.monotonic() + self._stall_seconds
        pause = 0.0005
        while True:
            done, status = os.waitpid(self._pid, os.WNOHANG)
            if done:
                return "compressor_failed" if status else ""
            if time.monotonic() > end:
                os.kill(self._pid, 9)
                os.waitpid(self._pid, 0)
                return "compressor_failed"
            time.sleep(pause)
            pause = min(0.05, pause * 2)


def choose_sink(dump: int, settings: dict[str, str | int | bool], config: str) -> Raw | Stream | Child:
    """Start the configured compressor, else the next that works."""
    choice = str(settings["COMPRESSOR"])
    if choice == "none":
        return Raw(dump)
    if choice == "auto":
        try:
            choice = read_file(calibration_path(config), 64, trusted=True).decode("ascii", "replace").strip()
        except OSError:
            pass
    order = ["pigz", "isal", "gzip"]
    for name in [choice, *order] if choice in order else order:
        try:
            return Child(dump, settings) if name == "pigz" else Stream(dump, name, settings)
        except (OSError, ImportError) as error:
            if name == settings["COMPRESSOR"]:
                log("%s is configured and does not work: %s" % (name, error))
    raise Refused("directory", "no compressor can write")


def calibration_path(config: str) -> str:
    """Return where the fastest compressor's name is kept: beside a configuration that -C names."""
    return CALIBRATION if config == CONFIG else os.path.join(os.path.dirname(config), "compressor")


def lock(descriptor: int, seconds: float) -> bool:
    """Lock a file within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)


class State:
    """The directory `.helper`: what was refused, and the slots. Without it nothing is limited, no dump is lost."""

    def __init__(self, directory: int) -> None:
        """Open or create it in the watch directory; raises OSError when it is not ours alone."""
        try:
            os.mkdir(".helper", 0o700, dir_fd=directory)
        except FileExistsError:
            pass
        self._directory = os.open(
            ".helper", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
        )
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(".helper belongs to others, or others may use it")

    def _open(self, name: str, flags: int = 0) -> int:
        return os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=self._directory
        )

    def slot(self, count: int, seconds: float) -> bool:
        """Wait so long for one of `count` slots, held until this process ends."""
        if not count:
            return True
        slots = [self._open("slot-%d" % number) for number in range(count)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for descriptor in slots:
                if lock(descriptor, 0):
                    return True
            time.sleep(0.01)
        return False

    def tally(self, known: dict[str, bytes], reason: str, kept: int, seconds: int) -> bool:
        """Count a dump in the record of its executable, container and signal; True for the first `kept`."""
        guard = self._open("lock")
        try:
            if not lock(guard, 2):
                return bool(kept)
            exe = known.get("exe") or known.get("thread", b"")
            fields = {"exe": exe, "container_id": known.get("container_id", b""), "pod_uid": known.get("pod_uid", b""),
                      "signal": known.get("signal", b""), "reason": reason.encode()}  # fmt: skip
            name = self._record_name(fields, seconds)
            now = int(time.time())
            old = self._read(name)
            if not 0 <= now - old.get("first", -seconds) < seconds:
                old = {"first": now}
            take = old.get("kept", 0) < kept
            counts = {"kept": old.get("kept", 0) + take, "suppressed": old.get("suppressed", 0) + (not take),
                      "first": old["first"], "last": now}  # fmt: skip
            lines = ["%s=%s\n" % (key, percent(value)) for key, value in fields.items()]
            lines += ["%s=%d\n" % item for item in counts.items()]
            draft = self._open("draft", os.O_TRUNC)
            try:
                write_all(draft, "".join(lines).encode())
            finally:
                os.close(draft)
            os.rename("draft", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return take
        finally:
            os.close(guard)

    def _record_name(self, fields: dict[str, bytes], seconds: int) -> str:
        from _blake2 import blake2b

        def name() -> str:
            return blake2b(b"\0".join(fields.values()), digest_size=12).hexdigest()

        if not exists(name(), self._directory):
            others = os.listdir(self._directory)
            if len(others) > STATE_FILES:
                for other in others:
                    if os.stat(other, dir_fd=self._directory).st_mtime < time.time() - max(3600, seconds):
                        os.unlink(other, dir_fd=self._directory)
                fields["exe"] = b"*"
        return name()

    def _read(self, name: str) -> dict[str, int]:
        try:
            text = read_file(name, 16384, self._directory).decode("ascii", "replace")
        except FileNotFoundError:
            return {}
        pairs = [line.partition("=") for line in text.splitlines()]
        return {
            key: int(value)
            for key, _, value in pairs
            if key in ("kept", "suppressed", "first", "last") and value.isdigit()
        }


def percent(value: bytes) -> str:
    """Encode bytes that are not plain as %XX."""
    return "".join(
        chr(byte) if (chr(byte).isalnum() and byte < 128) or byte in b"/._-" else "%%%02X" % byte
        for byte in value
    )


class Handler:
    """One crash, from its arguments to the published file."""

    def __init__(self, argv: list[str], core: int) -> None:
        """Read arguments, configuration and metadata; `core` is the descriptor to read from."""
        self.started = time.monotonic()
        self.core = core
        self.crash = parse_arguments(argv)
        log("pid %(P)s: dump of %(e)a, signal %(s)s, has begun" % {"e": "", **self.crash}, 6)
        self.config = self.crash.get("C") or CONFIG
        self.settings = read_settings(self.config)
        _signal.alarm(int(self.settings["DEADLINE_SECONDS"]) + 30)  # whatever hangs, even in /proc, ends here
        self.deadline = self.started + int(self.settings["DEADLINE_SECONDS"])
        self.known = describe(self.crash)
        self.join_cgroup(str(self.settings["CGROUP"]))

    def join_cgroup(self, path: str) -> None:
        """Leave the root cgroup for the prepared one, and keep the buffer below half of its memory."""
        if not path:
            return
        try:
            write_file(path + "/cgroup.procs", b"0")
            limit = read_file(path + "/memory.max", 32).strip()
            if limit.isdigit():
                self.settings["BUFFER_BYTES"] = min(int(self.settings["BUFFER_BYTES"]), int(limit) // 2)
        except OSError as error:
            log("CGROUP %a: %s" % (path, error.strerror))

    def run(self) -> None:
        """Admit, stream, publish; raises Refused, OSError."""
        ignored = [number.strip() for number in str(self.settings["IGNORE_SIGNALS"]).split(",")]
        if self.crash["s"] and self.crash["s"] in ignored:
            raise Refused("", "IGNORE_SIGNALS")
        directory = os.open(
            str(self.settings["WATCH_DIR"]), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        status = os.fstat(directory)
        if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            log("WATCH_DIR %a can be written by others: chmod 0700 it" % self.settings["WATCH_DIR"])
        state = None
        try:
            state = State(directory)
        except OSError as error:
            log("no RATE_LIMIT, no MAX_CONCURRENT: .helper: %s" % error)
        try:
            self.admit(directory, state)
        except Refused as refused:
            if state and refused.args[0] not in ("", "rate_limit"):
                state.tally(self.known, refused.args[0], 0, 600)
            raise
        self.take(directory)

    def admit(self, directory: int, state: State | None) -> None:
        """Raise Refused when a limit forbids the dump."""
        if self.settings["RESPECT_RLIMIT"] and self.crash["c"] == "0":
            raise Refused("rlimit", "RLIMIT_CORE is 0")
        if self.disk_is_full(directory):
            raise Refused("keep_free", "less than KEEP_FREE_PERCENT is free")
        space = os.fstatvfs(directory)
        if space.f_files and space.f_favail < 100:
            raise Refused("inodes", "fewer than 100 inodes are free")
        most = int(self.settings["MAX_TOTAL_BYTES"])
        if (
            most
            and sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(directory))
            >= most
        ):
            raise Refused("max_total_bytes", "MAX_TOTAL_BYTES wait in WATCH_DIR")
        if not state:
            return
        kept, _, seconds = str(self.settings["RATE_LIMIT"]).partition("/")
        if seconds and not state.tally(self.known, "rate_limit", int(kept), int(seconds)):
            raise Refused("rate_limit", "RATE_LIMIT of this executable, container and signal")
        if not state.slot(int(self.settings["MAX_CONCURRENT"]), self.deadline - time.monotonic()):
            raise Refused("no_slot", "MAX_CONCURRENT dumps ran all the time")

    def disk_is_full(self, directory: int) -> bool:
        """Say whether less than KEEP_FREE_PERCENT of the file system is free for us."""
        space = os.fstatvfs(directory)
        return space.f_bavail * 100 < int(self.settings["KEEP_FREE_PERCENT"]) * space.f_blocks

    def take(self, directory: int) -> None:
        """Stream the core into the watch directory."""
        suffix = "" if self.settings["COMPRESSOR"] == "none" else ".gz"
        dump, name = create(directory, self.crash, suffix)
        set_attributes(dump, self.known)
        sink = choose_sink(dump, self.settings, self.config)
        reader = Reader(self.core, self.settings, self.deadline)
        reason = self.stream(reader, sink, directory, dump)
        if not reader.size:
            os.unlink(name + ".partial", dir_fd=directory)
            raise Refused("", "the core is empty: its process was killed before the first byte")
        self.known = {"bytes": b"%d" % sink.size, "compressor": sink.name.encode(), **self.known}
        if self.expected:
            self.known["expected_bytes"] = b"%d" % self.expected
        if reason:
            self.known["truncated"] = reason.encode()
        self.known["duration_ms"] = b"%d" % ((time.monotonic() - self.started) * 1000)
        names = ("bytes", "expected_bytes", "truncated", "compressor", "duration_ms")
        set_attributes(dump, {key: self.known[key] for key in names if key in self.known}, 600)
        if reason == "compressor_failed":
            raise Refused("", "%s failed; %s.partial is left for the collector" % (sink.name, name))
        name = publish(directory, dump, name, self.crash, suffix)
        log("pid %s: %s: %d bytes by %s in %s ms%s" % (self.crash["P"], name, sink.size, sink.name,
            self.known["duration_ms"].decode(), ", truncated: " + reason if reason else ""), 6)  # fmt: skip

    def stream(self, reader: Reader, sink: Raw | Stream | Child, directory: int, dump: int) -> str:
        """Move the core from reader to sink; return why it is not whole, or nothing."""
        head, wanted, looked, failure = bytearray(), 64, 0, ""
        self.expected = 0
        for piece in reader.chunks():
            if failure:
                continue
            if len(head) < wanted:
                head += piece
                wanted, self.expected = elf_length(head)
            try:
                sink.write(piece)
            except OSError as error:
                log("pid %s: %s: %s" % (self.crash["P"], sink.name, error))
                failure = "disk_full"
            if sink.size - looked >= LOOK_AROUND:
                looked = sink.size
                os.posix_fadvise(dump, 0, 0, os.POSIX_FADV_DONTNEED)
                if self.disk_is_full(directory):
                    failure = "keep_free"
            if failure:
                reader.stop(failure)
        _signal.alarm(int(self.settings["DEADLINE_SECONDS"]) + 30)
        failed = sink.close()
        if failed:
            return failed
        if self.expected and sink.size >= self.expected:
            return ""
        return failure or reader.reason or ("killed" if wanted else "not_elf")


def calibrate(config: str) -> int:
    """Measure every compressor on data like a core's and remember the fastest; return the exit code."""
    path = calibration_path(config)
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    settings = read_settings(config)
    with open("/proc/self/exe", "rb") as program:
        code = program.read(4 << 20)
    numbers = b"".join(struct.pack("<QQ", 0x7F0000000000 + 48 * index, index) for index in range(CHUNK // 4))
    sample = memoryview((code + numbers + os.urandom(CHUNK) + bytes(4 << 20)) * 2)
    best, least = "gzip", float("inf")
    for name in ("pigz", "isal", "gzip"):
        dump = os.open(
            path + ".new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
        )
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
            print("%s: not usable: %s" % (name, error))
        finally:
            os.close(dump)
    dump = os.open(path + ".new", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    write_all(dump, best.encode() + b"\n")
    os.close(dump)
    os.rename(path + ".new", path)
    print("%s is the fastest; COMPRESSOR=auto uses it (%s)" % (best, path))
    return 0


def main() -> int:
    """Run as the command line says; the kernel ignores the exit code."""
    argv = sys.argv[1:]
    if not argv or "--help" in argv[:1]:
        print(
            HELP
            + "".join("  %-18s %-12s %s\n" % (key, value, text) for key, (value, text) in SETTINGS.items())
        )
        return 0 if argv else 2
    if argv == ["--version"]:
        print("core-dump-helper", VERSION)
        return 0
    if argv[0] == "--calibrate":
        return calibrate(parse_arguments(argv[1:]).get("C") or CONFIG)
    core = secure_process()
    try:
        Handler(argv, core).run()
    except Refused as refused:
        log("no dump: " + ": ".join(filter(None, refused.args)))
        return 1
    except Exception as error:  # noqa: BLE001 - nobody reads a traceback here; the process is released by our end
        log("no dump: %s: %s" % (type(error).__name__, error), 3)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

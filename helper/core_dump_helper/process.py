"""Owns what is known of the crashed process, from /proc and the command line, and writes it beside the dump.

Everything here was chosen by whoever crashed.
"""

from __future__ import annotations

import os

from core_dump_helper.system import log, read_fields, read_file

HEX = b"0123456789abcdef"
ATTRIBUTE_SPACE = 2600  # ext4 has 4 KiB for all attributes; the collector's own needs the rest


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


def set_attributes(dump: int, attributes: dict[str, bytes], space: int = ATTRIBUTE_SPACE) -> bool:
    """Set `user.coredump.*`; what does not fit into `space` is cut. False where they cannot be set: they are lost."""
    for name, value in attributes.items():
        room = min(1024, space - len(name) - 40)
        if room > 0:
            try:
                os.setxattr(dump, "user.coredump." + name, value[:room])
                space -= len(name) + 40 + len(value[:room])
            except OSError as error:
                log("attribute %s and what follows: %s" % (name, error.strerror))
                return False
    return True

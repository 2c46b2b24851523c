"""Owns the output of `info`: everything known about one dump, then the front of its core."""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING, Any

from rich.text import Text

from core_dump_format.attributes import TRIMMED
from core_dump_format.text import printable
from core_dumps import show, tables, where
from core_dumps.cautions import trimmed_note
from core_dumps.dump import signal_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from core_dump_format.core import Core, Thread
    from core_dumps.dump import Dump, Value
    from core_dumps.head import Head

_LABELS = {
    "pid": "PID", "tid": "TID", "ns_pid": "PID inside", "uid": "UID", "gid": "GID", "comm": "Command",
    "thread": "Thread", "exe": "Executable", "cmdline": "Command Line", "cgroup": "Control Group",
    "hostname": "Hostname", "node": "Node", "namespace": "Namespace", "pod": "Pod", "container": "Container",
    "container_id": "Container ID", "pod_uid": "Pod UID", "threads": "Threads", "bytes": "Core Size",
    "expected_bytes": "Expected Size", "trimmed": "Trimmed", "truncated": "Truncated", "sensitive_reason": "Sensitive",
    "compressor": "Compressor", "duration_ms": "Dump Took", "uploaded_at": "Uploaded",
    "build_id": "Build ID", "machine": "Machine", "fingerprint": "Fingerprint", "frames": "Stack", "crc32": "CRC-32",
}  # fmt: skip
_REPEATS = {"ns_pid": "pid", "thread": "comm", "expected_bytes": "bytes"}
"""Fields that are left out if they repeat another one."""
_SIZES = frozenset({"bytes", "expected_bytes"})
_CODES = {
    signals.SIGSEGV: {1: "address not mapped", 2: "access not permitted"},
    signals.SIGBUS: {1: "misaligned address", 2: "no such physical address", 3: "hardware error"},
    signals.SIGFPE: {1: "integer division by zero", 2: "integer overflow", 3: "float division by zero"},
    signals.SIGILL: {1: "illegal opcode", 2: "illegal operand"},
}
"""sigaction(2), si_code."""
MOST_SHOWN = 64
MOST_RANGES = 16


def print_info(console: Console, bucket: str, dump: Dump, head: Head | None) -> None:
    """Print one dump; without `head` only its metadata."""
    for label, value in _facts(bucket, dump):
        console.print(Text.assemble((f"{label:>14}: " if label else " " * 16, "bold"), value))
    if head is None:
        return
    if head.core is None:
        console.print(f"{'Core':>14}: {printable(head.problem)}")
        return
    console.print()
    for line in _core_lines(head.core, head, dump):
        console.print(line)


def document(dump: Dump, head: Head | None) -> dict[str, Any]:
    """Return one dump as JSON; the front of its core, if it was read, is under `core`."""
    content = tables.document(dump)
    if head is None:
        return content
    if head.core is None:
        return content | {"core": {"problem": head.problem}}
    core = head.core
    threads = [
        {
            "tid": thread.tid,
            "signal": thread.signal,
            "pc": thread.pc,
            "sp": thread.sp,
            "where": _where(core, thread),
        }
        for thread in core.threads
    ]
    files = [{"path": path, "build_id": head.build_ids.get(path)} for path in _paths(core)]
    facts = {"machine": core.machine, "bits": core.form.bits, "expected_bytes": core.expected_bytes}
    facts |= {"signal": core.signal, "fault_address": core.fault_address, "thread_count": core.thread_count}
    facts["dropped"] = [list(span) for span in core.dropped]
    return content | {"core": {**facts, "threads": threads, "files": files}}


def _facts(bucket: str, dump: Dump) -> Iterator[tuple[str, Text]]:
    if dump.get("signal") is not None:
        number = dump.number("signal")
        yield "Signal", Text(f"{number} ({dump.signal_name})")
    yield "Timestamp", Text(f"{show.moment(dump.timestamp)} ({show.ago(dump.timestamp)})")
    for field, label in _LABELS.items():
        value = dump.executable if field == "exe" else dump.get(field)
        if value is None or (field in _REPEATS and value == dump.get(_REPEATS[field])):
            continue
        if field == "frames":
            yield from _stack(label, str(value))
        else:
            yield label, Text(_worded(dump, field, value))
    yield (
        "Storage",
        Text(f"s3://{bucket}/{printable(dump.key, 1100)} (")
        .append_text(show.states(dump.states))
        .append(")"),
    )
    yield "Size on Store", Text(show.size(dump.size_bytes))
    problem = dump.damage or dump.failure
    if problem:
        yield "Metadata", Text(printable(problem), style="red")


def _worded(dump: Dump, field: str, value: Value) -> str:
    """Return a fact with its unit."""
    text = printable(value, 1100)
    if field in _SIZES and isinstance(value, int):
        return f"{show.size(value)} ({value} bytes)"
    if field == TRIMMED:
        return f"{text}: {trimmed_note(dump)}"
    if field == "fingerprint":
        return f"{text} (version {dump.fingerprint_version})"
    return f"{text} ms" if field == "duration_ms" else text


def _stack(label: str, frames: str) -> Iterator[tuple[str, Text]]:
    """Yield the frames of the crashed thread that the helper found, one a line."""
    for number, line in enumerate(where.stack(frames)):
        yield "" if number else label, Text(printable(line, 200))


def _dropped_lines(core: Core) -> Iterator[str]:
    if core.dropped:
        amount = show.size(sum(max(0, end - start) for start, end in core.dropped))
        yield f"Dropped memory: {amount} in {len(core.dropped)} ranges"
        for start, end in core.dropped[:MOST_RANGES]:
            yield f"  {start:#018x}-{end:#018x}  {show.size(max(0, end - start))}"
        yield from _more(len(core.dropped), MOST_RANGES)


def _core_lines(core: Core, head: Head, dump: Dump) -> Iterator[str]:
    if core.signal is not None:
        yield f"Cause: {signal_name(core.signal)}{_cause(core)}"
    if core.arguments and core.arguments != dump.text("cmdline"):
        yield f"Arguments: {printable(core.arguments)}"
    if core.expected_bytes != dump.number("bytes"):
        yield f"Length according to its headers: {show.size(core.expected_bytes)} ({core.expected_bytes} bytes)"
    yield f"Machine: {core.machine}, {core.form.bits} bits"
    yield from _dropped_lines(core)
    order = ", the crashed one first" * (core.thread_count > 1)
    yield f"\n{show.count(core.thread_count, 'thread')}{order}:"
    for thread in core.threads[:MOST_SHOWN]:
        where = printable(_where(core, thread) or "not in a file")
        yield f"  {thread.tid:>8}  pc {thread.pc:#018x}  sp {thread.sp:#018x}  {where}"
    yield from _more(core.thread_count, MOST_SHOWN)
    paths = _paths(core)
    yield (
        f"\n{show.count(len(paths), 'mapped file')}:" if paths else "\nThe core has no list of mapped files."
    )
    for path in paths[: 4 * MOST_SHOWN]:
        yield f"  {head.build_ids.get(path, '-'):40}  {printable(path)}"
    yield from _more(len(paths), 4 * MOST_SHOWN)


def _more(count: int, shown: int) -> Iterator[str]:
    if count > shown:
        yield f"  … and {count - shown} more"


def _where(core: Core, thread: Thread) -> str | None:
    """Return file and offset of a thread's program counter."""
    file = core.file_at(thread.pc)
    return f"{file.path}+{thread.pc - file.start + file.offset_bytes:#x}" if file else None


def _paths(core: Core) -> list[str]:
    return list(dict.fromkeys(file.path for file in core.files))


def _cause(core: Core) -> str:
    if core.sender_pid is not None:
        return f", sent by PID {core.sender_pid}"
    known = _CODES.get(core.signal, {}).get(core.code or 0, "")  # type: ignore[call-overload]
    at = "" if core.fault_address is None else f" at {core.fault_address:#x}"
    return f"{at}, {known}" if known else at

"""Owns the count after a run: every dump in the bucket once and whole or flagged, and nothing left over."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from tests.support import s3
from tests.support.collector import command_of
from tests.torture.crashes import Crash, fault_in, unpack
from tests.torture.evidence import Journal, changed_outside, is_planted
from tests.torture.neighbour import FORGED, SECRET
from tests.torture.processes import helper_pids

from core_dump_format.names import parse_name

if TYPE_CHECKING:
    from pathlib import Path

    from mypy_boto3_s3 import S3Client
    from tests.torture.__main__ import Torture


def judge(torture: Torture, server: s3.S3Server, journal: Journal | None) -> list[str]:
    """Compare what crashed with what is in the bucket; return every complaint."""
    complaints = list(torture.complaints)
    found = Counter[str]()
    touched = journal.pids() if journal else set()
    with server.client() as client:
        dumps = collect(client, found, complaints, touched if journal else None)
        for pid, crash in torture.done.items():
            mine = dumps.pop(pid, [])
            if pid in touched:
                found["touched by the neighbour"] += 1
            elif len(mine) == 1:
                state, complaint = examine(client, mine[0], crash)
                found[state] += 1
                flagged = state != "complete" and not (pid in torture.harmed or torture.hostile)
                complaints += [complaint] if complaint else []
                complaints += [f"{mine[0]}: {state} although nobody harmed it"] if flagged else []
            else:
                lost = pid in torture.harmed and not mine
                found["lost with its helper" if lost else "WRONG NUMBER"] += 1
                complaints += [] if lost else [f"pid {pid} {crash}: {len(mine)} objects: {mine}"]
        left = list(chain(*(keys for pid, keys in dumps.items() if pid not in touched)))
        unknown = [key for key in left if is_ours(client, key, torture.program)]
        found["other programs"] += len(left) - len(unknown)
        complaints += [f"nobody crashed for {key}" for key in unknown]
        complaints += [f"unfinished multipart upload: {k}" for k in s3.unfinished_multiparts(client)]
    complaints += [f"left in the directory: {name}" for name in left_over(torture, journal)]
    complaints += [f"still running: {pid} {command_of(pid)}" for pid in helper_pids(torture.watch_dir.parent)]
    sys.stdout.write(
        f"crashes {len(torture.done)}, killed {dict(torture.kills)}, the store {dict(torture.faults)}, "
        f"in the bucket {dict(found)}\n"
    )
    return complaints


def collect(
    client: S3Client, found: Counter[str], complaints: list[str], touched: set[int] | None
) -> dict[int, list[str]]:
    """Return the keys of the dumps by pid, without what a neighbour planted; note what is wrong with them.

    `touched` is None if there is no neighbour. A dump that the neighbour took away may lack its metadata object.
    """
    dumps: dict[int, list[str]] = {}
    keys = s3.keys_in(client)
    for key in keys:
        if touched is not None and is_neighbours(client, key, complaints):
            found["planted by the neighbour"] += 1
        elif key.endswith(".gz"):
            complete = key + ".json" in keys
            pid = pid_in_metadata(client, key) if complete and touched is not None else pid_of(key)
            dumps.setdefault(pid, []).append(key)
            if not complete and pid not in (touched or ()):
                complaints.append(f"{key}: no metadata object")
    return dumps


def is_neighbours(client: S3Client, key: str, complaints: list[str]) -> bool:
    """Tell whether the neighbour planted an object's content; note what it must not have got into the bucket."""
    body = s3.body_of(client, key)
    if SECRET in (unpack(body) or body):
        complaints.append(f"{key}: holds a file from outside")
    if key.endswith(".gz.json") and FORGED.encode() in body:
        complaints.append(f"{key}: holds what was forged")
    return is_planted(body)


def examine(client: S3Client, key: str, crash: Crash) -> tuple[str, str | None]:
    """Return the state of a dump, as its metadata object tells it, and what is wrong with the dump, or None."""
    sidecar = json.loads(s3.body_of(client, key + ".json"))
    core = unpack(s3.body_of(client, key))
    state = sidecar["state"] + (f" ({sidecar['truncated']})" if sidecar.get("truncated") else "")
    if core is None:
        return state, f"{key}: no whole gzip file"
    if state == "complete" and (fault := fault_in(core, crash)):
        return state, f"{key}: called complete, but {fault}"
    return state, None


def left_over(torture: Torture, journal: Journal | None) -> list[str]:
    """Return what is left in the directory and must not be; with a neighbour, whatever is not the neighbour's."""
    if journal is None:
        return [path.name for path in torture.watch_dir.glob("core*")]
    roots = [path.name for path in torture.watch_dir.iterdir() if not path.lstat().st_uid]
    own = (".helper", ".modules", "quarantine", ".quarantine")
    left = [name for name in roots if not name.startswith(own) and name not in journal.names]
    return left + changed_outside(torture.watch_dir.parent / "outside")


def pid_of(key: str) -> int:
    """Return the pid in a dump's key: `core-NAME-TIME-PID-SIGNAL[-COPY].gz`."""
    name = parse_name(key.rpartition("/")[2])
    assert name is not None, key
    return name.pid


def pid_in_metadata(client: S3Client, key: str) -> int:
    """Return the pid by the metadata object: a neighbour can rename a dump, but not change its attributes."""
    return int(json.loads(s3.body_of(client, key + ".json")).get("pid", 0))


def is_ours(client: S3Client, key: str, program: Path) -> bool:
    """Say whether a dump may be that of our program: others on this machine crash too."""
    with contextlib.suppress(client.exceptions.NoSuchKey):
        metadata = json.loads(s3.body_of(client, key + ".json"))
        return metadata.get("exe", "") in {"", str(program)}
    return True

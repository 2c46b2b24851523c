"""Crash, kill and fail at random, then count: `python -m tests.torture --rounds N --seed S`.

Each round crashes a process of random name and size through the real kernel, while helper, compressor, worker
and collector are killed at random moments and the store fails at random. Afterwards every dump that the kernel
delivered must be in S3 exactly once and hold the process's memory, or say that it was cut short; and nothing may
be left over: no partial, no unfinished multipart upload, no process, no zombie.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import s3
from tests.support.cleanup import exit_on_signals, temporary_directory
from tests.support.collector import Collector, command_of, running, wait_until
from tests.support.kernel import core_pattern, install_helper
from tests.support.slow import trickling_server
from tests.torture.crashes import Crash, compile_crasher, fault_in, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mypy_boto3_s3 import S3Client

IMPATIENT = ("--retry-seconds", "1", "--shutdown-seconds", "5", "--read-timeout-seconds", "2")
LIE = 'http-request return status 200 content-type text/html hdr ETag "5f8d1b2c" file {slow} if {{ method PUT POST }}'
BLIND = "http-request deny deny_status {status} if {{{{ method HEAD }}}}"
FOREIGN = (
    "http-response del-header x-amz-checksum-crc32",
    'http-response set-header ETag "0123456789abcdef0123456789abcdef" if {{ res.hdr(ETag) -m found }}',
)
FAULTS = {
    "throttles": (
        "http-request return status 503 content-type application/xml file {slow} if {{ rand(100) lt 40 }}",
    ),
    "fails": (
        "http-request return status 500 content-type application/xml file {slow} if {{ method PUT POST }}",
    ),
    "hangs up": ("http-request reject if {{ rand(100) lt 30 }}",),
    "loses responses": ("http-response return status 502 if {{ rand(100) lt 30 }}",),
    "trickles": ("use_backend trickle if {{ rand(100) lt 30 }}",),
    "lies, HEAD refused": (LIE, BLIND.format(status=403)),
    "lies, HEAD fails": (LIE, BLIND.format(status=503)),
    "lies, HEAD shows nothing": (LIE,),
    "proves nothing, HEAD refused": (*FOREIGN, BLIND.format(status=403)),
    "proves nothing": FOREIGN,
    "conditions refused": (
        (
            "http-request return status 501 content-type application/xml file {slow} "
            "if {{ req.hdr(if-none-match) -m found }}"
        ),
    ),
}
"""haproxy rules. Responses are lost of requests that the store has carried out; lies are told of others."""


@dataclass
class Torture:
    """One run."""

    dice: random.Random
    watch_dir: Path
    program: Path
    rounds: int
    done: dict[int, Crash] = field(default_factory=dict)
    """By pid."""
    harmed: set[int] = field(default_factory=set)
    """Pids whose helper or compressor was killed."""
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def crash_some(self) -> None:
        """Crash one to three processes at once and maybe kill what handles them."""
        crashes = [Crash.random(self.dice) for _ in range(self.dice.choice((1, 1, 1, 2, 3)))]
        processes = [c.start(self.program) for c in crashes]
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if self.dice.random() < 0.15:
            self.harm_helpers()
        for process, crash in zip(processes, crashes, strict=True):
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
            self.done[process.pid] = crash

    def harm_helpers(self) -> None:
        """Kill helpers or compressors that run now."""
        time.sleep(self.dice.random() * 0.06)
        what = self.dice.choice(("helper", "pigz"))
        for pid in helper_pids(self.watch_dir.parent):
            if (what == "pigz") == ("pigz" in command_of(pid)):
                with contextlib.suppress(ProcessLookupError):
                    self.harmed.add(crashed_pid(pid))
                    os.kill(pid, signal.SIGKILL)
                    self.kills[what] += 1

    def harm_collector(self, collector: Collector) -> bool:
        """Maybe kill a worker, or the collector itself; True when a new one is needed."""
        luck = self.dice.random()
        if luck < 0.05:
            workers = collector.workers()
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.dice.choice(workers), signal.SIGKILL)
                    self.kills["worker"] += 1
        elif luck < 0.07:
            collector.kill()
            self.kills["collector"] += 1
            return True
        elif luck < 0.08:
            collector.stop()
            self.kills["collector stopped"] += 1
            return True
        return False


def helper_pids(scratch: Path) -> Iterator[int]:
    """Yield our helpers and their compressors: they descend from kernel threads and have no session of ours."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            command = command_of(int(entry.name))
            if f"{scratch}/core-dump-helper" in command or "pigz" in command.split(" ", 1)[0]:
                with contextlib.suppress(OSError):
                    ours = os.readlink(entry / "fd/1") if "pigz" in command else str(scratch)
                    if ours.startswith(str(scratch)):
                        yield int(entry.name)


def crashed_pid(pid: int) -> int:
    """Return whose dump a helper, or its compressor, is writing: the helper's `-P`; 0 when it is gone."""
    for candidate in (pid, parent_of(pid)):
        if match := re.search(r" -P(\d+) ", command_of(candidate)):
            return int(match[1])
    return 0


def parent_of(pid: int) -> int:
    """Return a process's parent, 0 when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
    return 0


def rage(torture: Torture, proxy: s3.Haproxy, environ: dict[str, str], scratch: Path) -> None:
    """Do all rounds, then let the collector finish in peace."""
    slow = proxy.body("slow.xml", s3.SLOW_DOWN)
    number = 0
    while number < torture.rounds:
        with running(torture.watch_dir, environ, scratch, *IMPATIENT) as collector:
            while number < torture.rounds:
                if torture.dice.random() < 0.2:
                    name = torture.dice.choice((*FAULTS, "works"))
                    torture.faults[name] += 1
                    proxy.start(*(rule.format(slow=slow) for rule in FAULTS.get(name, ())))
                torture.crash_some()
                number += 1
                if torture.harm_collector(collector):
                    break
    proxy.start()
    with running(
        torture.watch_dir, environ, scratch, "--scan-seconds", "2", "--retry-seconds", "1"
    ) as collector:
        wait_until(lambda: not list(torture.watch_dir.glob("core*")), 180, "an empty directory")
        wait_until(lambda: collector.metric("core_dump_backlog_files") == 0, 10, "an empty backlog")
        assert collector.stop() == 0


def is_ours(client: S3Client, key: str, program: Path) -> bool:
    """Say whether a dump may be that of our program: others on this machine crash too."""
    with contextlib.suppress(client.exceptions.NoSuchKey):
        metadata = json.loads(s3.body_of(client, key + ".json"))
        return metadata.get("exe", "") in {"", str(program)}
    return True


def judge(torture: Torture, server: s3.S3Server) -> list[str]:
    """Compare what crashed with what is in the bucket; return every complaint."""
    complaints = []
    found = Counter[str]()
    with server.client() as client:
        keys = s3.keys_in(client)
        dumps: dict[str, list[str]] = {}
        for key in keys:
            if key.endswith(".gz"):
                dumps.setdefault(pid_of(key), []).append(key)
                if key + ".json" not in keys:
                    complaints.append(f"{key}: no sidecar")
        for pid, crash in torture.done.items():
            harmed = pid in torture.harmed
            mine = dumps.pop(str(pid), [])
            if len(mine) != 1:
                found["lost with its helper" if harmed and not mine else "WRONG NUMBER"] += 1
                if not harmed or mine:
                    complaints.append(f"pid {pid} {crash}: {len(mine)} objects: {mine}")
                continue
            sidecar = json.loads(s3.body_of(client, mine[0] + ".json"))
            core = unpack(s3.body_of(client, mine[0]))
            found[sidecar["state"] + (f" ({sidecar['truncated']})" if sidecar.get("truncated") else "")] += 1
            if core is None:
                complaints.append(f"{mine[0]}: no whole gzip file")
            elif sidecar["state"] == "complete" and (fault := fault_in(core, crash)):
                complaints.append(f"{mine[0]}: called complete, but {fault}")
            elif sidecar["state"] != "complete" and not harmed:
                complaints.append(f"{mine[0]}: {sidecar['state']} although nobody harmed it")
        left = list(chain(*dumps.values()))
        unknown = [key for key in left if is_ours(client, key, torture.program)]
        found["other programs"] += len(left) - len(unknown)
        complaints += [f"nobody crashed for {key}" for key in unknown]
        complaints += [f"unfinished multipart upload: {k}" for k in s3.unfinished_multiparts(client)]
    complaints += [f"left in the directory: {f.name}" for f in torture.watch_dir.glob("core*")]
    complaints += [f"still running: {pid} {command_of(pid)}" for pid in helper_pids(torture.watch_dir.parent)]
    sys.stdout.write(
        f"crashes {len(torture.done)}, killed {dict(torture.kills)}, the store {dict(torture.faults)}, "
        f"in the bucket {dict(found)}\n"
    )
    return complaints


def pid_of(key: str) -> str:
    """Return the pid in a dump's key: `core-NAME-TIME-PID-SIGNAL[-COPY].gz`."""
    from core_dump_format.names import parse_name

    name = parse_name(key.rpartition("/")[2])
    assert name is not None, key
    return str(name.pid)


def torture(rounds: int, seed: int, scratch: Path) -> list[str]:
    """Run; return every complaint."""
    watch_dir = scratch / "core_dumps"
    watch_dir.mkdir(mode=0o700)
    program = compile_crasher(scratch)
    run = Torture(random.Random(seed), watch_dir, program, rounds)
    config = {"WATCH_DIR": str(watch_dir), "RATE_LIMIT": "0", "KEEP_FREE_PERCENT": "1"}
    (scratch / "weed").mkdir()
    with (
        s3.seaweedfs(scratch / "weed") as server,
        trickling_server() as trickling,
        s3.haproxy(scratch, server) as proxy,
    ):
        proxy.backends = f"backend trickle\n server t 127.0.0.1:{trickling}\n"
        environ = server.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}
        with core_pattern(install_helper(scratch, config)):
            rage(run, proxy, environ, scratch)
        wait_until(lambda: not list(helper_pids(scratch)), 30, "the last helper to end")
        return judge(run, server)


def main() -> int:
    """Parse, run, report; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    started = time.monotonic()
    sys.stdout.write(f"torture: {options.rounds} rounds, seed {options.seed}\n")
    exit_on_signals()
    with temporary_directory("cdh-", "/var/tmp") as directory:
        complaints = torture(options.rounds, options.seed, directory)
    sys.stdout.writelines(f"WRONG: {complaint}\n" for complaint in complaints)
    verdict = "failed" if complaints else "passed"
    sys.stdout.write(f"torture: {verdict}, seed {options.seed}, {time.monotonic() - started:.0f} s\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

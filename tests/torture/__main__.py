"""Crash, kill and fail at random, then count: `python -m tests.torture --rounds N --seed S`.

Each round crashes a process of random name and size through the real kernel, while helper, compressor, worker
and collector are killed at random moments and the store fails at random. Afterwards every dump that the kernel
delivered must be in S3 exactly once and hold the process's memory, or say that it was cut short; and nothing may
be left over: no partial, no unfinished multipart upload, no process, no zombie.

With `--hostile`, every user may write to the watch directory, and one does so throughout the run (`neighbour`). Each
dump that this user did not touch must arrive all the same, whole or flagged, and only the user's files may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import stat
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import s3
from tests.support.cleanup import exit_on_signals, temporary_directory
from tests.support.collector import Collector, command_of, descendants, running, wait_until
from tests.support.kernel import core_pattern, install_helper
from tests.support.slow import trickling_server
from tests.torture.crashes import Crash, compile_crasher
from tests.torture.evidence import Journal
from tests.torture.neighbour import harassed, make_outside
from tests.torture.processes import crashed_pid, helper_pids
from tests.torture.verdict import judge

IDLE_SECONDS = 3
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
    hostile: bool = False
    complaints: list[str] = field(default_factory=list)
    """What was wrong during the run."""

    def waiting(self) -> list[str]:
        """Return the files that the collector has to upload or remove, also those of a neighbour."""
        found = []
        for path in self.watch_dir.glob("core*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                lone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
                left_alone = status.st_uid and path.name.endswith(".partial")
                if not self.hostile or (lone and not left_alone):
                    found.append(path.name)
        return found

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


def rage(torture: Torture, proxy: s3.Haproxy, environ: dict[str, str], scratch: Path) -> None:
    """Do all rounds."""
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
                if collector.process.poll() is not None:
                    torture.complaints.append(
                        f"the collector ended by itself: {collector.process.returncode}"
                    )
                    break
                if torture.harm_collector(collector):
                    break
            torture.complaints += internal_errors(collector)
    proxy.start()


def finish(torture: Torture, environ: dict[str, str], scratch: Path) -> None:
    """Let the collector finish in peace."""
    flags = ("--scan-seconds", "2", "--retry-seconds", "1")
    with running(torture.watch_dir, environ, scratch, *flags) as collector:
        wait_until(lambda: not torture.waiting(), 180, "a directory without dumps")
        wait_until(lambda: collector.metric("core_dump_backlog_files") == 0, 10, "an empty backlog")
        if torture.hostile and (used := cpu_seconds_during(collector, IDLE_SECONDS)) > IDLE_SECONDS / 4:
            torture.complaints.append(f"the idle collector used {used:.1f} s of {IDLE_SECONDS} s")
        assert collector.stop() == 0
        torture.complaints += internal_errors(collector)


def internal_errors(collector: Collector) -> list[str]:
    """Return the log's lines on errors of the collector's own."""
    return [str(line) for line in collector.log() if line.get("reason") == "internal"]


def cpu_seconds_during(collector: Collector, seconds: float) -> float:
    """Return how much processor time the collector and its workers use while nothing has to be done."""

    def used() -> int:
        fields = [
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            for pid in (collector.process.pid, *descendants(collector.process.pid))
        ]
        return sum(int(field[11]) + int(field[12]) for field in fields)

    before = used()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


def torture(rounds: int, seed: int, scratch: Path, *, hostile: bool = False) -> list[str]:
    """Run; return every complaint."""
    watch_dir = scratch / "core_dumps"
    watch_dir.mkdir()
    watch_dir.chmod(0o777 if hostile else 0o700)
    program = compile_crasher(scratch)
    run = Torture(random.Random(seed), watch_dir, program, rounds, hostile=hostile)
    config = {"WATCH_DIR": str(watch_dir), "RATE_LIMIT": "0", "KEEP_FREE_PERCENT": "1", "VITAL_LIMIT": "0"}
    (scratch / "weed").mkdir()
    if hostile:
        make_outside(scratch)
    with (
        s3.seaweedfs(scratch / "weed") as server,
        trickling_server() as trickling,
        s3.haproxy(scratch, server) as proxy,
    ):
        proxy.backends = f"backend trickle\n server t 127.0.0.1:{trickling}\n"
        environ = server.environ() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}
        with core_pattern(install_helper(scratch, config)):
            with harassed(watch_dir, seed, scratch) if hostile else contextlib.nullcontext():
                rage(run, proxy, environ, scratch)
            finish(run, environ, scratch)
        wait_until(lambda: not list(helper_pids(scratch)), 30, "the last helper to end")
        return judge(run, server, Journal(scratch / "journal") if hostile else None)


def main() -> int:
    """Parse, run, report; 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--hostile", action="store_true", help="another user attacks the files in the watch directory"
    )
    options = parser.parse_args()
    started = time.monotonic()
    sys.stdout.write(f"torture: {options.rounds} rounds, seed {options.seed}\n")
    exit_on_signals()
    with temporary_directory("cdh-", "/var/tmp") as directory:
        complaints = torture(options.rounds, options.seed, directory, hostile=options.hostile)
    sys.stdout.writelines(f"WRONG: {complaint}\n" for complaint in complaints)
    verdict = "failed" if complaints else "passed"
    sys.stdout.write(f"torture: {verdict}, seed {options.seed}, {time.monotonic() - started:.0f} s\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

"""Records what a release leaves behind, as fixtures for later releases.

`python -m tests.support.record_release TREE OUT`

TREE is a checkout of the release, OUT the folder to write. Run it as root with this tree's development environment:
processes crash through the real kernel. The release's programs run from its own wheel and its own helper files.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import kernel, s3
from tests.support.cleanup import exit_on_signals, temporary_directory
from tests.support.collector import Collector, running, wait_until

MEBIBYTE = 1 << 20
ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
"""A core holds its process's environment: nothing of this machine's belongs into a fixture."""
CONTAINER = "ab" * 32
POD = "0a1b2c3d-0e1f-4a2b-8c3d-4e5f60718293"
CGROUP = f"kubepods-besteffort-pod{POD.replace('-', '_')}.slice/cri-containerd-{CONTAINER}.scope"
PARTS_CONTENT = "parts.gz"
"""The content of a dump of three parts, compressed once more: S3 takes no parts under 5 MiB."""
PARTS_NAME = "core-parts-1700000000-77-11.gz"


@dataclass(frozen=True)
class Recorder:
    """One release, the scratch directory in which it runs, and the folder for what it writes."""

    tree: Path
    wheel: Path
    scratch: Path
    out: Path

    @property
    def watch_dir(self) -> Path:
        """Where its helper publishes and its collector looks."""
        return self.scratch / "w"

    @contextlib.contextmanager
    def installed(self, **settings: object) -> Iterator[None]:
        """Let the kernel start the release's helper, with the arguments that its own sysctl file gives."""
        given = {"WATCH_DIR": self.watch_dir, "RATE_LIMIT": 0, "KEEP_FREE_PERCENT": 1, "COMPRESSOR": "gzip"}
        source = self.tree / "helper/core-dump-helper"
        pattern = kernel.install_helper(self.scratch, given | settings, source=source)
        program = pattern.split()[0]
        with kernel.core_pattern(f"{program} {arguments_of(self.tree)}"):
            yield

    @contextlib.contextmanager
    def collecting(self, server: s3.S3Server, *flags: str, endpoint: str = "") -> Iterator[Collector]:
        """Run the release's collector on the watch directory."""
        environ = server.environ() | {"PYTHONPATH": str(self.wheel)}
        if endpoint:
            environ["AWS_ENDPOINT_URL_S3"] = endpoint
        with running(self.watch_dir, environ, self.scratch, *flags) as collector:
            yield collector


def arguments_of(tree: Path) -> str:
    """Return the helper's arguments in the core pattern that the tree installs."""
    text = (tree / "sysctl/69-core-dump.conf").read_text()
    return re.search(r"^kernel.core_pattern=\|\S+ (.*)$", text, re.MULTILINE)[1]  # type: ignore[index]


@contextlib.contextmanager
def cgroup() -> Iterator[tuple[str, ...]]:
    """Yield the words that start a program in a cgroup named as Kubernetes names a container's."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2"))
    path = root / CGROUP
    path.mkdir(parents=True)
    script = f'ulimit -s 128; printf node >/proc/sys/kernel/hostname; echo $$ >{path}/cgroup.procs; exec "$@"'
    try:
        yield ("unshare", "--uts", "sh", "-c", script, "sh")
    finally:
        for directory in (path, path.parent):
            with contextlib.suppress(OSError):
                directory.rmdir()


def crash_all(recorder: Recorder) -> None:
    """Let the helper write each kind of dump, and the records of what it refused."""
    program = kernel.build(kernel.CRASHER, recorder.scratch / "app", "-pthread", "-s")
    with cgroup() as before:
        for settings, how in (
            ({}, {"name": b"app", "threads": 3}),
            ({}, {"name": b"\xff\xfe caf\xc3\xa9"}),
            ({"COMPRESSOR": "none"}, {"name": b"raw"}),
            ({"MAX_DUMP_BYTES": 65536}, {"name": b"cut"}),
            ({"RATE_LIMIT": "1/600"}, {"name": b"loop"}),
        ):
            with recorder.installed(**settings):
                for _ in range(3 if "RATE_LIMIT" in settings else 1):
                    kernel.crash(program, signal.SIGSEGV, before=before, cwd="/", env=ENVIRON, **how)
                settle(recorder.scratch)
        with recorder.installed(KEEP_FREE_PERCENT=99):
            kernel.crash(program, signal.SIGABRT, before=before, cwd="/", env=ENVIRON, name=b"full")
            settle(recorder.scratch)
    feed(recorder, whole=True)
    feed(recorder, whole=False)
    move_into_the_past(recorder.watch_dir / ".helper")


def settle(scratch: Path) -> None:
    """Wait until no helper runs."""

    def none() -> bool:
        found = subprocess.run(
            ["pgrep", "-f", scratch / "core-dump-helper"], check=False, capture_output=True
        )
        return found.returncode != 0

    wait_until(none, 60, "the helpers to end")


def feed(recorder: Recorder, *, whole: bool) -> None:
    """Feed a core to the helper by hand: one of a set-uid program, or one during which the helper is killed."""
    core = gzip.decompress(next(recorder.watch_dir.glob("core-app-*.gz")).read_bytes())
    uid, flag = "0", "2" if whole else "1"
    name = "setuid" if whole else "partial"
    settings = {
        "WATCH_DIR": recorder.watch_dir,
        "COMPRESSOR": "gzip",
        "KEEP_FREE_PERCENT": 1,
        "BUFFER_BYTES": 0,
    }
    kernel.write_config(recorder.scratch / "helper.conf", settings)
    with subprocess.Popen(["/bin/sleep", "60"], cwd="/") as sleeping:
        given = f"-P{sleeping.pid} -p{sleeping.pid} -i{sleeping.pid} -u{uid} -g{uid} -s11 -t1700000000 -d{flag} -hnode"
        command = [str(recorder.scratch / "core-dump-helper"), *given.split(), "--", name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, env={}) as helper:
            assert helper.stdin is not None
            helper.stdin.write(core if whole else core + os.urandom(MEBIBYTE // 4))
            helper.stdin.flush()
            if not whole:
                partial = recorder.watch_dir / f"core-partial-1700000000-{sleeping.pid}-11.gz.partial"
                wait_until(
                    lambda: partial.exists() and partial.stat().st_size > MEBIBYTE // 50, 10, "a partial"
                )
                helper.kill()
        sleeping.kill()


def move_into_the_past(state: Path) -> None:
    """Rewrite the times in the helper's records, so that their windows are over whenever they are read."""
    for path in state.glob("[0-9a-f]" * 24):
        path.write_text(
            re.sub("^(first|last)=[0-9]+$", r"\1=1700000000", path.read_text(), flags=re.MULTILINE)
        )


def facts_of(path: Path) -> dict[str, Any]:
    """Return what git does not keep of a file; bytes that are not UTF-8 become surrogates."""
    status = path.stat()
    attributes = {
        name: os.getxattr(path, name).decode(errors="surrogateescape") for name in os.listxattr(path)
    }
    return {"mode": f"{status.st_mode & 0o7777:o}", "mtime_ns": status.st_mtime_ns, "attributes": attributes}


def save(path: Path, content: object) -> None:
    """Write JSON for people and diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def save_watch_dir(recorder: Recorder) -> None:
    """Copy every file of the watch directory, and its attributes as JSON."""
    facts = {}
    records = (recorder.watch_dir / ".helper").glob("[0-9a-f]" * 24)
    for path in sorted([*recorder.watch_dir.glob("core*"), *records]):
        name = str(path.relative_to(recorder.watch_dir))
        facts[name] = facts_of(path)
        copy = recorder.out / "watch" / name.replace(".helper", "helper")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    save(recorder.out / "watch.json", facts)


def save_bucket(recorder: Recorder, server: s3.S3Server) -> None:
    """Let the collector upload everything; copy each object, and the listing with user metadata."""
    dumps = len(list(recorder.watch_dir.glob("core*")))
    with recorder.collecting(server), server.client() as client:

        def documents() -> list[str]:
            return [key for key in s3.keys_in(client) if key.endswith(".json")]

        wait_until(lambda: len(documents()) == dumps + 2, 60, "every dump and two suppressed records")
        listing = []
        for key, size in sorted(s3.keys_in(client).items()):
            head = client.head_object(Bucket=s3.BUCKET, Key=key)
            modified = head["LastModified"].isoformat()
            listing.append(
                {
                    "key": key,
                    "size": size,
                    "etag": head["ETag"],
                    "modified": modified,
                    "metadata": head["Metadata"],
                }
            )
            copy = recorder.out / "bucket" / key
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(s3.body_of(client, key))
        save(recorder.out / "listing.json", listing)
        left = list(recorder.watch_dir.glob("core*"))
        assert left == [], left


UPLOADS = {
    "sending": ("http-request silent-drop if { method PUT } { url_param(partNumber) -m int ge 3 }",),
    "sent": ("http-request silent-drop if { method POST } { url_sub uploadId= }",),
    "stored": ("http-request deny deny_status 503 if { path_end .json }",),
}
"""For each state of a multipart upload, the haproxy rules under which it stops there."""


def save_uploads(recorder: Recorder, server: s3.S3Server) -> None:
    """Stop a multipart upload in each state, and a single request before its answer; copy the attributes."""
    content = b"".join(bytes([number]) * MEBIBYTE for number in range(1, 12))
    packed = recorder.out / PARTS_CONTENT
    packed.write_bytes(gzip.compress(content, 9, mtime=0))
    uploads = {state: stop_at(recorder, server, content, state, rules) for state, rules in UPLOADS.items()}
    rules = ("http-request silent-drop if { method PUT }",)
    uploads["sent-whole"] = stop_at(recorder, server, content[: MEBIBYTE // 4], "sent", rules)
    save(recorder.out / "uploads.json", uploads)


def stop_at(
    recorder: Recorder, server: s3.S3Server, content: bytes, state: str, rules: tuple[str, ...]
) -> dict[str, Any]:
    """Upload `content` under haproxy rules until its record has a state; kill the collector there."""
    path = recorder.watch_dir / PARTS_NAME
    path.write_bytes(content)
    path.chmod(0o600)

    def reached() -> bool:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(os.getxattr(path, "user.coredump.upload"))
            parts = state != "sending" or stored_parts(server) == [1, 2]
            return record["state"] == state and parts
        return False

    with s3.haproxy(recorder.scratch, server, *rules, timeout="600s") as proxy:
        flags = ("--part-bytes", str(5 * MEBIBYTE))
        with recorder.collecting(server, *flags, endpoint=proxy.endpoint) as collector:
            wait_until(reached, 60, f"state {state}")
            collector.kill()
    facts = facts_of(path) | {"size": len(content)}
    path.unlink()
    with server.client() as client:
        client.delete_object(Bucket=s3.BUCKET, Key=f"node-1/{path.name}")
    return facts


def stored_parts(server: s3.S3Server) -> list[int]:
    """Return the numbers of the parts that wait for the rest of their upload."""
    with server.client() as client:
        uploads = client.list_multipart_uploads(Bucket=s3.BUCKET).get("Uploads", [])
        pages = [client.list_parts(Bucket=s3.BUCKET, Key=u["Key"], UploadId=u["UploadId"]) for u in uploads]
    return sorted(part["PartNumber"] for page in pages for part in page.get("Parts", []))


def save_settings(recorder: Recorder) -> None:
    """Write the configuration files of the release, helper.conf once more with its lines in force, the arguments."""
    text = (recorder.tree / "sysctl/helper.conf").read_text()
    (recorder.out / "helper.conf").write_text(re.sub(r"^#([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))
    (recorder.out / "arguments").write_text(arguments_of(recorder.tree) + "\n")
    (recorder.out / "sysctl").mkdir()
    for shipped in (recorder.tree / "sysctl").glob("*.conf"):
        shutil.copy(shipped, recorder.out / "sysctl")


def main() -> None:
    """Record one release."""
    tree, out = (Path(word).resolve() for word in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(tree)]
    subprocess.run(build, check=True)
    (wheel,) = out.glob("*.whl")
    exit_on_signals()
    with temporary_directory("cdh-", "/var/tmp") as scratch:
        recorder = Recorder(tree, wheel, scratch, out)
        recorder.watch_dir.mkdir(mode=0o700)
        crash_all(recorder)
        save_watch_dir(recorder)
        with s3.seaweedfs(recorder.scratch / "weed") as server:
            save_bucket(recorder, server)
            save_uploads(recorder, server)
    save_settings(recorder)


if __name__ == "__main__":
    main()

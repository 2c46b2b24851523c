"""A process crashes in a container that is gone afterwards; the bucket alone gives its backtrace."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.integration.test_modules import IMPATIENT, MODULES
from tests.support import culprits, images, s3
from tests.support.collector import running, wait_until
from tests.support.modules import digest

from core_dump_format.modules import parse_list
from core_dumps import buildid

LIBRARY = "void die(volatile int *at) { *at = 1; }\n"
PROGRAM = """
#include <sys/prctl.h>
void die(volatile int *);
int main() { prctl(PR_SET_NAME, "app"); die(0); }
"""


@pytest.fixture
def image(node):
    """Build a program and its library; return the folder that holds them, and the one that they have in the image."""
    built, place = node.directory / "built", node.directory / "image"
    built.mkdir(mode=0o755)
    place.mkdir(mode=0o755)
    (built / "lib.c").write_text(LIBRARY)
    (built / "main.c").write_text(PROGRAM)
    library = built / "libdie.so"
    subprocess.run(["gcc", "-g", "-O0", "-shared", "-fPIC", "-o", library, built / "lib.c"], check=True)
    link = ["gcc", "-g", "-O0", "-o", built / "app", built / "main.c", f"-Wl,-rpath,{place}"]
    subprocess.run([*link, f"-L{built}", "-ldie"], check=True)
    return built, place


def crash_in_container(node, built, place):
    """Run the program in a mount namespace of its own, whose file system goes with it."""
    script = 'mount -t tmpfs image "$2" && cp "$1/app" "$1/libdie.so" "$2" && exec "$2/app"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", built, place]
    process = node.start(*command, name=b"app", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.wait(timeout=60)
    node.settle()
    assert not (place / "app").exists()
    return process.pid


def frames(text):
    """Return the frames below the headings of threads; before them, gdb prints the newest one."""
    below = re.split(r"^Thread \d.*$", text, flags=re.MULTILINE)[1:]
    return [line.strip() for part in below for line in part.splitlines() if re.match(r"#\d", line)]


def gdb_on_the_original_files(node, built, place, key, bucket):
    """Return gdb's frames, with the files where they were."""
    core = node.directory / "core"
    core.write_bytes(gzip.decompress(s3.body_of(bucket, key)))
    for name in ("app", "libdie.so"):
        shutil.copy(built / name, place / name)
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all bt", place / "app", core]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("app", "libdie.so"):
        (place / name).unlink()
        (built / name).unlink()
    return frames(said)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")
def test_backtrace_of_a_container_that_is_gone_needs_nothing_but_the_bucket(
    node, image, seaweed, bucket, tmp_path, monkeypatch
):
    prefix = f"gone-{uuid.uuid4().hex[:8]}"
    environ = seaweed.environ(s3.WRITER) | MODULES | {"BUCKET_NAME": f"s3://{s3.BUCKET}/{prefix}"}

    def keys(end):
        return [key for key in s3.keys_in(bucket, prefix=f"{prefix}/") if key.endswith(end)]

    with running(node.watch_dir, environ, tmp_path, program=IMPATIENT) as collector:
        mark = node.watch_dir / ".modules" / "collector"
        wait_until(mark.exists, 60, "the collector's mark")
        with node.installed():
            pids = [crash_in_container(node, *image) for _ in range(2)]
        wait_until(lambda: len(keys(".gz.modules.json")) == 2, 200, "both lists")
        wait_until(lambda: not list(mark.parent.glob("module-*")), 200, "the modules")
        uploaded = len(keys("")) - 2 * 3
        assert uploaded >= 4, "the program, its library, libc, the loader"
        metric = 'core_dump_modules_total{result="uploaded"}'
        wait_until(lambda: collector.metric(metric) == uploaded, 60, "each once")
    (key,) = [key for key in keys(".gz") if f"-{pids[1]}-" in key]
    expected = gdb_on_the_original_files(node, *image, key, bucket)
    assert any("die (at=0x0)" in line and "lib.c:1" in line for line in expected)
    # a machine that has none of the files
    monkeypatch.setattr(buildid.Search, "find", lambda _, module: module)
    cli = Cli(seaweed, prefix, tmp_path)
    done = cli.run("bt", str(pids[1]))
    assert frames(done.stdout) == expected
    assert "missing" not in done.stderr
    listed = cli.run("modules", str(pids[1])).stdout
    assert len(re.findall(r"^stored ", listed, re.MULTILINE)) == uploaded


LIKE_OTHERS = {culprits.own_namespaces, culprits.many_mappings, culprits.redis_child}
IMAGES = [crash for crash in culprits.ALL if crash not in LIKE_OTHERS]


@pytest.mark.skipif("PROGRAMS" not in os.environ, reason="installs programs: make test-programs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("crash", IMAGES, ids=lambda crash: crash.__name__)
def test_backtrace_of_a_program_whose_image_is_gone_needs_nothing_but_the_bucket(
    node, seaweed, bucket, tmp_path, monkeypatch, crash
):
    node.inside = images.prefix()
    node.directory.chmod(0o755)  # PostgreSQL does not run as root
    prefix = f"program-{uuid.uuid4().hex[:8]}"
    environ = seaweed.environ(s3.WRITER) | MODULES | {"BUCKET_NAME": f"s3://{s3.BUCKET}/{prefix}"}

    def keys(end):
        return [key for key in s3.keys_in(bucket, prefix=f"{prefix}/") if key.endswith(end)]

    with running(node.watch_dir, environ, tmp_path, program=IMPATIENT) as collector:
        wait_until((node.watch_dir / ".modules" / "collector").exists, 60, "the collector's mark")
        with node.installed():
            program = culprits.crash_now(node, crash)
            crashed = time.monotonic()
        wait_until(lambda: keys(".gz.modules.json"), 200, "the list")
        wait_until(lambda: not list((node.watch_dir / ".modules").glob("module-*")), 200, "the modules")
        wait_until(lambda: collector.metric("core_dump_modules_waiting_files") == 0, 60)
        stored_seconds = time.monotonic() - crashed
        stored_bytes = collector.metric("core_dump_module_upload_bytes_total")
    (key,) = keys(".gz")
    listed = parse_list(s3.body_of(bucket, f"{key}.modules.json"))
    assert_of_the_image(listed)
    sizes = {module.sha256: module.size_bytes for module in listed.modules}
    core = node.directory / "core"
    core.write_bytes(gzip.decompress(s3.body_of(bucket, key)))
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all -ascending bt 256", program, core]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = frames(done.stdout.decode("utf-8", "backslashreplace"))
    # a machine that has none of the files
    monkeypatch.setattr(buildid.Search, "find", lambda _, module: module)
    cli = Cli(seaweed, prefix, tmp_path)
    began = time.monotonic()
    done = cli.run("bt")
    seconds = time.monotonic() - began
    megabytes = f"{sum(sizes.values()) / 1e6:.1f} MB, stored as {stored_bytes / 1e6:.1f} MB"
    took = f"{stored_seconds:.1f} s after the crash; bt in {seconds:.1f} s"
    print(f"{crash.__name__}: {len(sizes)} modules, {megabytes} {took}")  # noqa: T201  figures
    found = frames(done.stdout)
    assert [comparable(line, crash) for line in found] == [comparable(line, crash) for line in expected]
    assert len(found) > 3


def assert_of_the_image(listed):
    """Check that the files are those of the image, of which nothing is left, and not those of this machine."""
    stored = [module for module in listed.modules if module.sha256]
    assert stored
    assert {module.missing for module in listed.modules if not module.sha256} <= {""}
    for path, found in {module.path: module.sha256 for module in stored}.items():
        content = Path(os.fsdecode(path)).read_bytes()
        assert found == digest(content + images.TAIL), path


def comparable(line, crash):
    """Return a frame without what gdb guesses of generated code, and without the place of its library."""
    line = re.sub(r" from /.*/", " from ", line)
    return re.sub(r"\(.*\)", "()", line) if crash in culprits.GUESSED else line

"""The files behind real crashes: kept until the image is long gone; hostile ones cost nobody's dump."""

import gzip
import hashlib
import subprocess
import time
from pathlib import Path

import pytest
from tests.integration.test_modules import IMPATIENT, MODULES
from tests.kernel.conftest import attributes, core_of
from tests.kernel.test_vital_hostile import served as served  # noqa: PLC0414 - a fixture
from tests.support import kernel, s3
from tests.support.collector import running, wait_until

from core_dump_format.modules import parse_list

SUPPORT = Path(__file__).parents[1] / "support"
BUILD_ID = "-Wl,--build-id=0x" + "ab" * 20


@pytest.fixture
def mapper(node):
    return kernel.build(SUPPORT / "mapper.c", node.directory / "mapper", "-w")


@pytest.fixture
def taken(node):
    """The directory of modules, as a collector has made it."""
    directory = node.watch_dir / ".modules"
    directory.mkdir(mode=0o700)
    (directory / "collector").touch()
    return directory


def library(path, text):
    """Build a library with a build ID that anybody can have."""
    source = path.with_suffix(".c")
    source.write_text(f'const char text[] = "{text}";\nint f(void) {{ return text[0]; }}\n')
    return kernel.build(source, path, "-shared", "-fPIC", BUILD_ID)


def crash_with(node, *command):
    """Crash a process once it has mapped its files; return how long it was held."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = node.start(*map(str, command), name=b"mapper", **pipes)
    assert process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    process.communicate(timeout=60)
    held = time.monotonic() - began
    node.settle()
    return held


def list_of(node, taken):
    return parse_list((taken / (node.dump().name + ".json")).read_bytes())


def missing(listed, path):
    (found,) = [module.missing for module in listed.modules if module.path.startswith(bytes(path))]
    return found


def test_hostile_files_cost_themselves_and_nothing_else(node, mapper, taken, served, record_property):
    file, send = served
    sparse, private = node.directory / "sparse", node.directory / "private"
    with sparse.open("wb") as hole:
        hole.truncate(10 << 30)
    private.write_bytes(b"private")
    private.chmod(0o700)
    one, two = (library(node.directory / name, name) for name in ("one", "two"))
    with node.installed(COMPRESSOR="gzip"):
        file.read_bytes()  # the kernel itself waits for a first page that is not cached
        send("silent")
        held = crash_with(node, mapper, file, sparse, private, one, two, "memfd")
    record_property("held_seconds", round(held, 2))
    assert held < 10
    assert core_of(node.dump()).startswith(b"\x7fELF")
    assert "truncated" not in attributes(node.dump())
    listed = list_of(node, taken)
    assert missing(listed, file) == "file_system"
    assert missing(listed, sparse) == "too_large"
    assert missing(listed, private) == "not_readable"
    forged = [module for module in listed.modules if module.build_id == "ab" * 20]
    assert {module.sha256 for module in forged} == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)
    }


def test_write_lease_holds_nobody(node, mapper, taken, record_property):
    leased = node.directory / "leased"
    leased.write_bytes(b"leased")
    with node.installed(COMPRESSOR="gzip"):
        held = crash_with(node, mapper, "lease", leased)
    record_property("held_seconds", round(held, 2))
    assert held < 10
    assert missing(list_of(node, taken), leased) in ("", "busy"), "the lease may end with the process"


def test_image_that_is_gone_when_the_dump_is_read_is_in_the_bucket(node, mapper, seaweed, bucket, tmp_path):
    content = mapper.read_bytes()
    image = 'mount -t tmpfs none "$0"; cp "$1" "$0/app"; exec "$0/app"'
    place = node.directory / "image"
    place.mkdir()
    with running(node.watch_dir, seaweed.environ() | MODULES, tmp_path, program=IMPATIENT):
        wait_until((node.watch_dir / ".modules/collector").exists, 20, "a collector that takes modules")
        with node.installed():
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            command = ["unshare", "--mount", "sh", "-ec", image, place, mapper]
            process = node.start(*map(str, command), name=b"app", **pipes)
            assert process.stdout.readline() == b"ready\n"
            process.communicate(timeout=60)
            node.settle()

        def listed():
            return [key for key in s3.keys_in(bucket) if key.endswith(".modules.json")]

        wait_until(listed, 60, "the list")
        found = parse_list(s3.body_of(bucket, listed()[0]))
        keys = {f"_modules/sha256/{module.sha256}" for module in found.modules if module.sha256}
        wait_until(lambda: keys <= set(s3.keys_in(bucket)), 60, "the modules")
    assert not list(place.iterdir())
    program = next(module for module in found.modules if module.path.endswith(b"/app"))
    assert gzip.decompress(s3.body_of(bucket, f"_modules/sha256/{program.sha256}")) == content

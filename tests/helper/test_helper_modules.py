"""The files behind a crash: copied once, listed with every dump, and nothing hostile about them costs the dump."""

import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tests.support import kernel
from tests.support.cores import simple as elf

from core_dump_format.modules import parse_list, parse_module_name
from core_dump_helper import modules
from core_dump_helper.crash import Crash

MAPPER = Path(__file__).parents[1] / "support/mapper.c"
CORE = elf(b"core" * 1000)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="opens map_files of a process: sudo make test")
pytestmark = needs_root


@pytest.fixture
def taken(station):
    """A helper whose modules a collector takes."""
    directory = station.watch_dir / ".modules"
    directory.mkdir(mode=0o700)
    (directory / "collector").touch()
    return station


@pytest.fixture(scope="module")
def mapper(tmp_path_factory):
    """A program that maps files."""
    return kernel.build(MAPPER, tmp_path_factory.mktemp("mapper") / "mapper", "-w")


@pytest.fixture
def process_with(mapper):
    return functools.partial(run_process, mapper)


@contextlib.contextmanager
def run_process(program, *words, before=()):
    """Run a process that has files mapped; yield its pid."""
    command = [*before, program, *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def crash(station, pid, *, time_of_crash=1700000000, dumpable=1):
    """Let the helper dump a process, which lives on; return the list of its modules."""
    name = f"core-app-{time_of_crash}-7-11.gz"
    usual = [f"-P{pid}", "-p7", f"-u{os.getuid()}", f"-g{os.getgid()}", "-s11", f"-t{time_of_crash}"]
    logged = station.run(CORE, *usual, f"-d{dumpable}", "-hnode")
    assert gzip.decompress((station.watch_dir / name).read_bytes()) == CORE, logged
    path = station.watch_dir / ".modules" / (name + ".json")
    return parse_list(path.read_bytes()) if path.exists() else None


def module_of(listed, path):
    (found,) = [module for module in listed.modules if module.path == os.fsencode(path)]
    return found


def stored(station):
    """Return the content of every module by its digest, and check that each has the digest of its name."""
    found = {}
    for path in (station.watch_dir / ".modules").glob("module-*"):
        name = parse_module_name(path.name)
        found[name.sha256] = gzip.decompress(path.read_bytes())
        assert hashlib.sha256(found[name.sha256]).hexdigest() == name.sha256
    return found


def test_program_and_libraries_are_stored_by_content_and_listed(taken, process_with):
    with process_with("memfd") as pid:
        listed = crash(taken, pid)
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        exe = os.readlink(f"/proc/{pid}/exe")
    content = stored(taken)
    program = module_of(listed, exe)
    assert content[program.sha256] == Path(exe).read_bytes()
    assert program.size_bytes == Path(exe).stat().st_size
    assert next(line for line in maps if line.endswith(exe)).startswith(f"{program.start:x}-")
    noted = subprocess.run(["readelf", "-n", exe], capture_output=True, text=True, check=True).stdout
    assert program.build_id
    assert program.build_id in noted
    assert content[module_of(listed, "/memfd:code (deleted)").sha256] == b"memfd" * 1000
    assert {module.sha256 for module in listed.modules} == content.keys()
    assert not listed.left_out
    assert [module.start for module in listed.modules] == sorted(module.start for module in listed.modules)
    assert not list((taken.watch_dir / ".modules").glob("*.partial"))
    assert {path.stat().st_mode & 0o777 for path in (taken.watch_dir / ".modules").glob("*.*")} == {0o600}


def test_known_file_is_neither_read_nor_copied_again(taken, process_with):
    with process_with("memfd") as pid:
        first = crash(taken, pid)
        for path in (taken.watch_dir / ".modules").glob("module-*"):
            path.unlink()  # the collector has taken it
        second = crash(taken, pid, time_of_crash=1700000001)
        assert second.modules == first.modules
        assert stored(taken) == {}
        (taken.watch_dir / ".helper/modules").unlink()  # an operator wants it sent again
        crash(taken, pid, time_of_crash=1700000002)
    assert stored(taken).keys() >= {module.sha256 for module in first.modules if module.sha256}


def test_same_content_in_another_image_is_stored_once(taken, process_with, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"library" * 500)
    with process_with(tmp_path / "one", tmp_path / "two") as pid:
        listed = crash(taken, pid)
    assert module_of(listed, tmp_path / "one").sha256 == module_of(listed, tmp_path / "two").sha256


@pytest.mark.parametrize("python", kernel.pythons(), ids=lambda path: path.split("/")[-3])
def test_every_python_copies(taken, process_with, python):
    taken.python = python
    with process_with() as pid:
        assert not any(module.missing for module in crash(taken, pid).modules)
    assert stored(taken)


def nobody_takes(station):
    (station.watch_dir / ".modules/collector").unlink()


def old_collector(station):
    old = time.time() - 25 * 3600
    os.utime(station.watch_dir / ".modules/collector", (old, old))


def open_to_others(station):
    (station.watch_dir / ".modules").chmod(0o750)


def link(station):
    (station.watch_dir / ".modules").rename(station.directory / "elsewhere")
    (station.watch_dir / ".modules").symlink_to(station.directory / "elsewhere")


def switched_off(station):
    station.settings["MODULES"] = "no"


@pytest.mark.parametrize("why", [nobody_takes, old_collector, open_to_others, link, switched_off])
def test_nothing_is_copied_where_nobody_takes_it(taken, process_with, why):
    why(taken)
    with process_with("memfd") as pid:
        assert crash(taken, pid) is None
    assert not list(taken.watch_dir.rglob("module-*"))
    assert not list(taken.directory.rglob("*.json*"))


def test_file_is_kept_only_if_everybody_may_read_it_and_it_is_a_file_of_moderate_length(
    taken, process_with, tmp_path
):
    secret, huge, device = tmp_path / "secret", tmp_path / "huge", tmp_path / "device"
    secret.write_bytes(b"secret")
    secret.chmod(0o711)
    with huge.open("wb") as file:
        file.truncate(10 << 30)
    os.mknod(device, 0o666 | 0o020000, os.makedev(1, 5))
    began = time.monotonic()
    with process_with(secret, huge, device, "/dev/zero") as pid:
        listed = crash(taken, pid)
    assert module_of(listed, secret).missing == "not_readable"
    assert module_of(listed, huge).missing == "too_large"
    assert module_of(listed, device).missing == "not_regular"
    assert module_of(listed, "/dev/zero").missing == "file_system"
    assert time.monotonic() - began < 20
    assert b"secret" not in stored(taken).values()


def test_deleted_file_with_a_strange_name_is_kept(taken, process_with, tmp_path):
    path = os.fsencode(tmp_path) + b"/a\xff\n\\x41 b\x1b\xe2\x80\xae"
    Path(os.fsdecode(path)).write_bytes(b"content" * 99)
    with process_with(os.fsdecode(path)) as pid:
        os.unlink(path)
        listed = crash(taken, pid)
    module = module_of(listed, path + b" (deleted)")
    assert stored(taken)[module.sha256] == b"content" * 99


def test_write_lease_makes_nobody_wait(taken, process_with, tmp_path):
    leased = tmp_path / "leased"
    leased.write_bytes(b"leased")
    began = time.monotonic()
    with process_with("lease", leased) as pid:
        listed = crash(taken, pid)
    assert module_of(listed, leased).missing == "busy"
    assert time.monotonic() - began < 20, "the kernel breaks a lease after 45 s"


@contextlib.contextmanager
def served_file(tmp_path):
    """A file of a FUSE file system that stops to answer when the function is called."""
    program = kernel.build(MAPPER.with_name("fusefile.c"), tmp_path / "fusefile")
    mounted = tmp_path / "served"
    mounted.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([program, mounted, "4096"], **pipes) as server:
        try:
            assert server.stdout.readline() == "mounted\n"
            yield mounted / "file", lambda: server.send_signal(signal.SIGSTOP)
        finally:
            server.kill()
            subprocess.run(["umount", "-l", mounted], check=False)


def test_file_system_that_never_answers_is_not_asked(taken, process_with, tmp_path):
    with served_file(tmp_path) as (file, stop), process_with(file) as pid:
        stop()
        began = time.monotonic()
        listed = crash(taken, pid)
        assert time.monotonic() - began < 20
    assert module_of(listed, file).missing == "file_system"


def test_file_system_that_is_not_mounted_any_more_is_not_asked(taken, process_with, tmp_path):
    with served_file(tmp_path) as (file, stop), process_with(file) as pid:
        subprocess.run(["umount", "-l", tmp_path / "served"], check=True)
        stop()
        listed = crash(taken, pid)
    (module,) = [module for module in listed.modules if module.path.endswith(b"/file")]
    assert module.missing == "file_system"


def test_files_of_an_overlay_in_another_mount_namespace_are_kept_after_it_is_gone(
    taken, process_with, tmp_path
):
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/library").write_bytes(b"overlay" * 99)
    mount = 'cd "$0"; mount -t tmpfs none upper; mkdir upper/u upper/w; mount -t overlay none'
    mount += ' -o lowerdir=lower,upperdir=upper/u,workdir=upper/w merged; exec "$@"'
    own = ("unshare", "--mount", "sh", "-ec", mount, tmp_path)
    with process_with(tmp_path / "merged/library", before=own) as pid:
        listed = crash(taken, pid)
    (module,) = [module for module in listed.modules if module.path.endswith(b"/library")]
    assert stored(taken)[module.sha256] == b"overlay" * 99


def test_files_that_were_opened_before_a_failure_are_closed(taken, monkeypatch):
    """The process may be gone by then, and the helper may wait for a slot for minutes."""
    failing = Crash({"P": str(os.getpid())})
    failing.process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    read_maps = modules.Capture._read_maps

    def fail_at_the_end(*given):
        yield from read_maps(*given)
        raise OSError(errno.EIO, "maps")

    monkeypatch.setattr(modules.Capture, "_read_maps", fail_at_the_end)
    watch = os.open(taken.watch_dir, os.O_RDONLY)
    with pytest.raises(OSError, match="maps"):
        modules.start(failing, watch)
    opened = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
              and os.path.lexists(f"/proc/self/fd/{name}")}  # fmt: skip
    os.close(watch)
    os.close(failing.process)
    assert not {path for path in opened if path.startswith(sys.prefix) or ".so" in path}
    assert str(taken.watch_dir / ".modules") not in opened


def test_thousands_of_mapped_files_cost_a_bounded_time(taken, process_with):
    taken.edits = [("modules.py", "MAX_FILES = 900", "MAX_FILES = 20")]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as many, process_with("many", many, 6_000) as pid:
        began = time.monotonic()
        listed = crash(taken, pid)
        took = time.monotonic() - began
    reasons = [module.missing for module in listed.modules]
    assert len(reasons) == 4096
    assert listed.left_out
    assert 0 < reasons.count("") <= 20
    assert "limit" in reasons
    assert took < 60


def test_content_is_what_its_name_says_although_the_file_changes_while_it_is_copied(
    taken, process_with, tmp_path
):
    (tmp_path / "one").write_bytes(b"one" * 999)
    (tmp_path / "two").write_bytes(b"two" * 999)
    line = "            if self._has(digest)"
    grow = f"            with open({str(tmp_path / 'one')!r}, 'ab') as grown: grown.write(b'more')\n"
    taken.edits = [("modulecopy.py", line, grow + line)]
    with process_with(tmp_path / "one", tmp_path / "two") as pid:
        listed = crash(taken, pid)
    assert module_of(listed, tmp_path / "one").missing == "changed"
    assert module_of(listed, tmp_path / "two").missing == ""
    assert not [content for content in stored(taken).values() if b"oneone" in content]
    assert not list((taken.watch_dir / ".modules").glob("*.partial"))


def test_origin_that_has_used_its_budget_gets_no_more_files_read(taken, process_with, tmp_path):
    for number in range(3):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
    taken.edits = [("modulestate.py", "BUDGET_BYTES = 1 << 30", "BUDGET_BYTES = 2 << 20")]
    with process_with(*(tmp_path / str(number) for number in range(3))) as pid:
        listed = crash(taken, pid)
        assert (listed.modules[0].missing, listed.modules[-1].missing) == ("", "budget")
        again = crash(taken, pid, time_of_crash=1700000001)
    assert [module.missing for module in again.modules] == [module.missing for module in listed.modules]


def test_modules_of_sensitive_dumps_are_kept_apart(taken, process_with):
    with process_with("memfd") as pid:
        listed = crash(taken, pid, dumpable=2)
        assert listed.sensitive == "dumpable=2"
        names = [path.name for path in (taken.watch_dir / ".modules").glob("module-*")]
        assert names
        assert all(parse_module_name(name).is_sensitive for name in names)
        assert crash(taken, pid, time_of_crash=1700000001).modules == listed.modules
    others = {path.name for path in (taken.watch_dir / ".modules").glob("module-*")} - set(names)
    assert len(others) == len(names)


def test_modules_are_the_first_to_go_when_the_disk_is_short(taken, process_with):
    watch = taken.watch_dir
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "none", watch], check=True)
    try:
        (watch / ".modules").mkdir(mode=0o700)
        (watch / ".modules/collector").touch()
        with process_with("memfd") as pid:
            first = crash(taken, pid)
            assert not any(module.missing for module in first.modules)
            filler = watch / ".modules" / f"module-{'ab' * 32}.gz"
            filler.write_bytes(bytes(30 << 20))
            taken.settings["KEEP_FREE_PERCENT"] = 50
            second = crash(taken, pid, time_of_crash=1700000001)
        assert not filler.exists()
        assert second.modules == first.modules, "what was removed is copied again"
        assert {module.sha256 for module in first.modules} == stored(taken).keys()
    finally:
        subprocess.run(["umount", "-l", watch], check=True)


def test_full_disk_costs_modules_and_no_dump(taken, process_with):
    taken.edits = [("modulecopy.py", "MAX_DIRECTORY_BYTES = 2 << 30", "MAX_DIRECTORY_BYTES = 1 << 20")]
    with process_with("memfd") as pid:
        listed = crash(taken, pid)
    reasons = {module.path.rpartition(b"/")[2]: module.missing for module in listed.modules}
    assert reasons[b"libc.so.6"] == "disk_full"
    assert reasons[b"mapper"] == ""


def test_killed_copy_leaves_a_partial_list_and_the_next_crash_is_copied(taken, process_with):
    line = "        copier.publish(handed_over, listed)"
    taken.edits = [("modulecopy.py", line, "        os.kill(os.getpid(), 9)\n" + line)]
    with process_with("memfd") as pid:
        assert crash(taken, pid) is None
        (left,) = (taken.watch_dir / ".modules").glob("*.partial")
        with left.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken.edits = []
        listed = crash(taken, pid, time_of_crash=1700000001)
    assert not any(module.missing for module in listed.modules)
    assert {module.sha256 for module in listed.modules} == stored(taken).keys()


def test_module_that_another_copy_publishes_in_the_same_moment_is_not_touched(taken, process_with, tmp_path):
    (tmp_path / "library").write_bytes(b"library" * 500)
    name = f"module-{hashlib.sha256(b'library' * 500).hexdigest()}.gz"
    line = "                fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    published = f"                if name == {name!r}:\n                    os.write(target, b'published')\n"
    published += "                    os.rename(name + '.partial', name, src_dir_fd=self._directory,"
    published += " dst_dir_fd=self._directory)\n"
    taken.edits = [("modulecopy.py", line, published + line)]
    with process_with(tmp_path / "library") as pid:
        listed = crash(taken, pid)
    assert (taken.watch_dir / ".modules" / name).read_bytes() == b"published"
    assert module_of(listed, tmp_path / "library").missing == ""


def test_slot_is_free_while_files_are_copied(taken, process_with):
    taken.settings["MAX_CONCURRENT"] = 1
    line = "        copier.publish(handed_over, listed)"
    waits = "        open(sys.argv[0] + '.fifo').read()\n"
    fifo = taken.directory / "core-dump-helper.fifo"
    os.mkfifo(fifo)
    taken.edits = [
        ("modulecopy.py", line, waits + line),
        ("modulecopy.py", "import os\n", "import os\nimport sys\n"),
    ]
    with process_with("memfd") as pid:
        usual = [f"-P{pid}", "-p7", f"-u{os.getuid()}", f"-g{os.getgid()}", "-s11", "-d1"]
        with taken.start(*usual, "-t1700000000") as first:
            first.stdin.write(CORE)
            first.stdin.close()
            writer = os.open(fifo, os.O_WRONLY)  # waits until the copy has begun
            taken.edits = []
            other = [f"-P{os.getpid()}", *usual[1:]]
            taken.run(CORE, *other, "-t1700000001")
            assert (taken.watch_dir / "core-app-1700000001-7-11.gz").exists()
            assert first.poll() is None
            os.close(writer)
            first.wait(60)
    assert (taken.watch_dir / ".modules/core-app-1700000000-7-11.gz.json").exists()


def test_copy_gives_way_to_everything_else(taken, process_with):
    line = "        copier.publish(handed_over, listed)"
    get = {"x86_64": 252, "aarch64": 31}[os.uname().machine]  # ioprio_get(2)
    look = "        from ctypes import CDLL\n"
    look += f"        seen = os.getpriority(0, 0), CDLL(None).syscall({get}, 1, 0) >> 13\n"
    look += "        log('nice %d, class %d' % seen + read_file('/proc/self/oom_score_adj', 9).decode())\n"
    taken.edits = [
        ("modulecopy.py", line, look + line),
        ("modulecopy.py", "NEW_FILE, exists, log,", "NEW_FILE, exists, log, read_file,"),
    ]
    with process_with("memfd") as pid:
        usual = [f"-P{pid}", "-p7", f"-u{os.getuid()}", f"-g{os.getgid()}", "-s11", "-d1"]
        assert "nice 19, class 31000" in taken.run(CORE, *usual)

"""install.sh and uninstall.sh on this machine's kernel: the pattern, the proof, and what a failure leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from tests.support import collector, deploy, kernel, s3

from core_dump_collector import cli as collector_cli
from core_dump_collector.node import host as configure_host
from core_dump_setup import cgroup, commands, location

SYSCTL = deploy.ROOT / "sysctl"
INSTALL, UNINSTALL = SYSCTL / "install.sh", SYSCTL / "uninstall.sh"
PROGRAM = Path("/usr/libexec/core-dump-handler/core-dump-helper")
SETUP = PROGRAM.with_name("core-dump-setup")
BOOT_FILE = Path("/etc/sysctl.d/69-core-dump.conf")
WATCH_DIR = Path("/core_dumps")
CONF = Path("/etc/core-dump-handler/helper.conf")
STATE = Path("/var/lib/core-dump-handler")
SAVED = STATE / "previous-core-pattern"
INSTALLED = [
    *(PROGRAM.parent, BOOT_FILE, WATCH_DIR, CONF.parent, STATE, Path("/usr/share/core-dump-handler")),
    *(Path(cgroup.LINK).parent, Path(cgroup.WANTED), *(Path(path) for path, _ in commands.UNITS)),
    *(Path(location.DROP_IN).parent, Path(location.TMPFILES)),
]
OURS = deploy.sysctl_values(SYSCTL / "69-core-dump.conf")["kernel.core_pattern"]
FOREIGN = "|/bin/true %P %u"
NOTHING = "#!/bin/sh\nexit 1\n"
HANGS = '#!/bin/sh\n[ "$1" = --calibrate ] || exec sleep 60\n'
IMAGE = """
set -e
mount -t overlay none -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
mount -t proc none "$1/root/proc"
exec chroot "$1/root" "$2"
"""


def installed():
    """What an installation has made, as far as it is there."""
    return [path for path in INSTALLED if os.path.lexists(path)]


def pattern():
    return deploy.PATTERN.read_text().rstrip("\n")


def set_pattern(text):
    deploy.PATTERN.write_text(text + "\n")


def leftovers():
    """Files that a killed run has left beside others."""
    return [path for root in INSTALLED for path in root.rglob("*") if ".new." in path.name]


def checkout(target):
    """Copy the checkout; its helper takes dumps however full this machine's disk is."""
    source = deploy.checkout(target)
    with (source / "sysctl/helper.conf").open("a") as file:
        file.write("KEEP_FREE_PERCENT=1\n")
    return source


@pytest.fixture
def host(monkeypatch, tmp_path_factory):
    """This machine without us, its core pattern `core` and ours alone; left as it was."""
    if not kernel.can_crash():
        pytest.skip("sets kernel.core_pattern, needs root: sudo make test")
    folder = checkout(tmp_path_factory.mktemp("checkout") / "source") / SYSCTL.name
    for name, path in {
        "SYSCTL": folder,
        "INSTALL": folder / INSTALL.name,
        "UNINSTALL": folder / UNINSTALL.name,
    }.items():
        monkeypatch.setitem(globals(), name, path)
    with kernel.core_pattern("core"):  # alone on this machine from here on
        if taken := list(map(str, installed())):
            pytest.skip(f"{', '.join(taken)} exists: this machine uses what the test would install")
        try:
            yield
        finally:
            for leftover in WATCH_DIR.glob("core*"):
                leftover.unlink()
            deploy.run(UNINSTALL, "--purge")
            assert installed() == []


@pytest.fixture
def source(tmp_path):
    """A copy of the checkout, to be broken."""
    return checkout(tmp_path / "checkout")


def replace_helper(source, script):
    """Put another program where the helper is; the line that names the release stays valid for both."""
    first, rest = script.split("\n", 1)
    (source / "helper/core-dump-helper").write_text(f'{first}\nRELEASE = "."\n{rest}')


def test_installation_proves_itself_with_a_crash_and_removal_restores(host):
    done = deploy.run(INSTALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a test process crashed and its dump arrived" in done.stdout
    assert "egmentation" not in done.stdout
    assert pattern() == OURS
    assert deploy.sysctl_values(BOOT_FILE)["kernel.core_pattern"] == OURS
    assert (WATCH_DIR.stat().st_uid, stat.S_IMODE(WATCH_DIR.stat().st_mode)) == (0, 0o700)
    assert list(WATCH_DIR.glob("core*")) == []
    assert "a test process crashed" in deploy.succeed(SETUP, "test", "--keep-test-dump")
    assert len(list(WATCH_DIR.glob("core-coretest-*.gz"))) == 1
    deploy.succeed(INSTALL, "--no-test")
    deploy.succeed(SETUP, "uninstall")
    assert pattern() == "core"
    assert [path for path in (PROGRAM.parent, BOOT_FILE, STATE) if path.exists()] == []


def test_foreign_handler_is_named_and_replaced_only_by_force(host):
    for foreign in ("|/usr/share/apport/apport-of-ours %p", "/var/crash/core.%p", FOREIGN):
        set_pattern(foreign)
        done = deploy.run(INSTALL)
        assert done.returncode == 1
        assert foreign in done.stderr
        assert "--force" in done.stderr
        assert (pattern(), installed()) == (foreign, [])
    deploy.succeed(INSTALL, "--force", "--no-test")
    assert pattern() == OURS
    deploy.succeed(INSTALL, "--no-test")  # must not save our own pattern over the foreign one
    deploy.succeed(UNINSTALL)
    assert pattern() == FOREIGN


@pytest.fixture
def apport():
    """The pattern of Ubuntu's handler, and a program that stands for it."""
    program = Path("/usr/share/apport/apport")
    if program.exists():
        pytest.skip(f"{program} exists: this machine has what the test would make")
    program.parent.mkdir(exist_ok=True)
    try:
        program.write_text(NOTHING)
        program.chmod(0o755)
        yield f"|{program} -p%p -s%s -c%c -d%d -P%P -u%u -g%g -F%F -- %E"
    finally:
        program.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            program.parent.rmdir()


def test_handler_of_the_distribution_is_saved_replaced_and_restored(host, apport):
    set_pattern(apport)
    assert f"would replace {apport} (apport)" in deploy.succeed(INSTALL, "--dry-run")
    said = deploy.succeed(INSTALL)
    assert f"replacing {apport} (apport); uninstalling restores it" in said
    assert "a test process crashed and its dump arrived" in said
    assert pattern() == OURS
    deploy.succeed(UNINSTALL)
    assert pattern() == apport


def test_last_pattern_that_was_replaced_is_what_removal_restores(host):
    deploy.succeed(INSTALL, "--no-test")
    set_pattern(FOREIGN)
    deploy.succeed(INSTALL, "--force", "--no-test")
    deploy.succeed(UNINSTALL)
    assert pattern() == FOREIGN


def test_socket_of_systemd_is_named_saved_and_restored_from_any_mount_namespace(host):
    if "socket" not in Path("/proc/sys/kernel/core_modes").read_text():
        pytest.skip("this kernel sends no dump to a socket")
    socket = "@@/run/systemd/coredumpd/kernel"
    set_pattern(socket)
    assert f"replacing {socket} (systemd-coredump, socket)" in deploy.succeed(INSTALL, "--no-test")
    deploy.succeed("unshare", "--mount", UNINSTALL)
    assert pattern() == socket


@pytest.mark.parametrize(
    ("saved", "why"),
    [
        (b"", "it is empty"),
        (b"\n0\n", "it is empty"),
        (b"/" + b"x" * 127 + b"\n0\n", "128 bytes, the kernel takes 127"),
        (OURS.encode() + b"\n0\n", "our own"),
        (b"|/usr/bin/no-such-handler %p\n0\n", "does not exist"),
        (b"core\x1b[2J\n0\n", "unprintable"),
    ],
)
def test_saved_pattern_that_would_lose_dumps_is_not_restored(host, saved, why):
    deploy.succeed(INSTALL, "--no-test")
    SAVED.write_bytes(saved)
    done = deploy.run(UNINSTALL)
    assert (done.returncode, pattern()) == (0, "core")
    assert f"{SAVED}: " in done.stderr
    assert why in done.stderr


def test_pattern_that_somebody_set_after_us_is_left_alone(host):
    deploy.succeed(INSTALL, "--no-test")
    set_pattern("/var/crash/core.%p")
    assert "left alone" in deploy.succeed(UNINSTALL)
    assert pattern() == "/var/crash/core.%p"


def test_compressors_are_measured_only_where_the_helper_may_choose(host):
    deploy.succeed(INSTALL, "--no-test")
    assert (STATE / "compressor").exists()
    deploy.succeed(UNINSTALL)
    CONF.write_text("COMPRESSOR=gzip\n")
    deploy.succeed(INSTALL, "--no-test")
    assert not (STATE / "compressor").exists()


def unit_variable(name):
    """The value that systemd gives a variable of the collector's unit: the last one, drop-in after unit."""
    drop_in = Path(location.DROP_IN)
    texts = [(SYSCTL / location.UNIT).read_text(), drop_in.read_text() if drop_in.exists() else ""]
    words = [word for line in "".join(texts).splitlines() if line.startswith("Environment=")
             for word in line.partition("=")[2].split()]  # fmt: skip
    return dict(word.split("=", 1) for word in words)[name]


def test_one_setting_moves_helper_unit_and_collector(host, seaweed, bucket, tmp_path):
    moved = tmp_path / "moved"
    assert "its dump arrived" in deploy.succeed(INSTALL, "--watch-dir", moved)
    assert not WATCH_DIR.exists()
    assert Path(location.TMPFILES).read_text().endswith(f"\nd {moved} 0700 root root -\n")
    deploy.succeed(SETUP, "test", "--keep-test-dump")
    assert "run ${WATCH_DIR}\n" in (SYSCTL / location.UNIT).read_text()
    with collector.running(Path(unit_variable("WATCH_DIR")), seaweed.environ(), tmp_path):
        collector.wait_until(lambda: list(moved.glob("core*")) == [], 30, "the upload")
    assert any(key.endswith(".gz") for key in s3.keys_in(bucket))
    deploy.succeed(SETUP, "test", "--keep-test-dump")
    said = deploy.succeed(SETUP, "activate", "--watch-dir", WATCH_DIR)
    assert f"{moved} still holds dumps: move them to {WATCH_DIR}" in said
    assert (WATCH_DIR.exists(), unit_variable("WATCH_DIR")) == (True, str(WATCH_DIR))
    assert (Path(location.DROP_IN).parent.exists(), list(WATCH_DIR.glob("core*"))) == (False, [])


def test_configure_host_moves_the_helper_to_the_directory_of_the_daemonset(
    host, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("WATCH_DIR", str(tmp_path / "moved"))  # from the ConfigMap
    monkeypatch.setattr(configure_host, "SOURCE", str(SYSCTL.parent))
    monkeypatch.setattr(configure_host.configure, "__kwdefaults__", {
        **configure_host.configure.__kwdefaults__, "source": str(SYSCTL.parent)})  # fmt: skip
    assert collector_cli.main(["configure-host", "/"]) == 0
    assert "its dump arrived" in capfd.readouterr().out
    assert stat.S_IMODE((tmp_path / "moved").stat().st_mode) == 0o700
    assert f"\nWATCH_DIR={tmp_path}/moved\n" in CONF.read_text()


def test_failed_proof_moves_nothing(host, tmp_path):
    deploy.succeed(INSTALL)
    before = CONF.read_text()
    CONF.write_text(before + "IGNORE_SIGNALS=11\n")
    done = deploy.run(SETUP, "activate", "--watch-dir", tmp_path / "moved")
    assert (done.returncode, "no dump arrived" in done.stderr) == (1, True)
    assert CONF.read_text() == before + "IGNORE_SIGNALS=11\n"
    assert not Path(location.DROP_IN).exists()
    assert "/core_dumps" in Path(location.TMPFILES).read_text()
    assert not (tmp_path / "moved").exists()


def test_dry_run_touches_nothing(host):
    said = deploy.succeed(INSTALL, "--dry-run")
    assert f"would set kernel.core_pattern={OURS}" in said
    assert (pattern(), installed()) == ("core", [])
    deploy.succeed(INSTALL, "--no-test")
    deploy.succeed(UNINSTALL, "--dry-run", "--purge")
    assert (pattern(), PROGRAM.exists(), BOOT_FILE.exists(), SAVED.exists()) == (OURS, True, True, True)


def test_removal_fails_and_keeps_the_program_while_the_kernel_cannot_be_set(host):
    deploy.succeed(INSTALL, "--no-test")
    read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "
    for command in (f"{UNINSTALL}", f"{SETUP} deactivate"):
        done = deploy.run("unshare", "--mount", "sh", "-c", read_only + command)
        assert (done.returncode, "cannot set kernel.core_pattern" in done.stderr) == (1, True)
        assert (pattern(), PROGRAM.exists(), BOOT_FILE.exists(), SAVED.exists()) == (OURS, True, True, True)
    done = deploy.run(UNINSTALL, "--root", "/")
    assert (done.returncode, "the kernel still starts" in done.stderr) == (1, True)
    assert PROGRAM.exists()


def test_root_that_is_slash_leaves_the_running_kernel_alone(host):
    assert "at the next boot" in deploy.succeed(INSTALL, "--root", "/")
    assert (pattern(), PROGRAM.exists(), BOOT_FILE.exists()) == ("core", True, True)


@pytest.mark.parametrize("own_pids", [False, True], ids=["chroot", "container"])
def test_build_of_an_image_leaves_the_running_kernel_alone(host, tmp_path, own_pids):
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    spaces = ["--mount", "--pid", "--fork"] if own_pids else ["--mount"]
    done = deploy.run(
        "unshare", *spaces, "sh", "-c", IMAGE, "sh", tmp_path, deploy.ROOT / "sysctl/install.sh"
    )
    if "mount:" in done.stderr:
        pytest.skip(f"no overlay file system here: {done.stderr.strip()}")
    assert (done.returncode, "at the next boot" in done.stdout) == (0, True), done.stderr
    assert pattern() == "core"
    assert (tmp_path / "upper" / str(PROGRAM)[1:]).exists()
    assert not PROGRAM.exists()


def test_failed_proof_takes_everything_back(host):
    CONF.parent.mkdir()
    CONF.write_text("IGNORE_SIGNALS=11\n")
    done = deploy.run(INSTALL)
    assert done.returncode == 1
    assert "no dump arrived in /core_dumps" in done.stderr
    assert "IGNORE_SIGNALS" in done.stderr, "the helper's own words"
    assert (pattern(), CONF.read_text()) == ("core", "IGNORE_SIGNALS=11\n")
    assert installed() == [CONF.parent]
    assert sorted(CONF.parent.iterdir()) == [CONF]


def test_failed_proof_of_an_upgrade_leaves_the_older_release_at_work(host, source):
    deploy.succeed(INSTALL, "--no-test")
    before = PROGRAM.read_text()
    replace_helper(source, NOTHING)
    with (source / "helper/core_dump_helper/handler.py").open("a") as module:
        module.write("# a later version\n")
    done = deploy.run(source / "sysctl/install.sh")
    assert (done.returncode, "no dump arrived" in done.stderr) == (1, True)
    assert (pattern(), PROGRAM.read_text()) == (OURS, before)
    assert "its dump arrived" in deploy.succeed(SETUP, "test")
    assert len(list(PROGRAM.parent.glob("[0-9]*-*"))) == 1


def test_interrupted_proof_takes_everything_back(host, source):
    replace_helper(source, HANGS)
    with subprocess.Popen(
        [source / "sysctl/install.sh"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        collector.wait_until(lambda: pattern() == OURS, 20, "the pattern")
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=30)
    assert (run.returncode, "interrupted by signal 15" in said) == (1, True)
    assert (pattern(), installed()) == ("core", [])


def test_proof_is_not_answered_by_an_older_line_of_the_log(host, source):
    replace_helper(source, NOTHING)
    command = [source / "sysctl/install.sh"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for pid in range(run.pid, run.pid + 60):
            published = f"core-coretest-{pid}-1790000000-9-11.gz"
            old = f"pid 9: {published}: 7 bytes by gzip in 1 ms"
            new = f"Process 9 (coretest-{pid}): {published} is complete: 7 bytes by gzip in 1 ms"
            Path("/dev/kmsg").write_text(f"<30>core-dump-helper[7]: {old}; {new}")
        _, said = run.communicate(timeout=60)
    assert (run.returncode, "no dump arrived" in said) == (1, True)
    assert pattern() == "core"


PUBLISH = """#!/usr/bin/python3 -IS
import gzip, os, sys, time
core = sys.stdin.buffer.read()
path = "/core_dumps/core-%s-%d-1-11.gz" % (sys.argv[-1], time.time())
os.makedirs("/core_dumps", exist_ok=True)
data = {data}
with open(path + ".partial", "wb") as file:
    file.write(data)
{then}
os.rename(path + ".partial", path)
"""


@pytest.mark.parametrize(
    ("data", "then", "said"),
    [
        ("gzip.compress(core[:64] + bytes(4096))", "", "is of another process"),
        ("gzip.compress(b'nothing')", "", "is no core"),
        ("core", "", "is no gzip file"),
        (
            "gzip.compress(core)",
            "os.setxattr(path + '.partial', 'user.coredump.truncated', b'disk_full')",
            "was cut: disk_full",
        ),
    ],
    ids=["other process", "no core", "no gzip", "cut"],
)
def test_proof_reads_the_dump_itself(host, source, data, then, said):
    replace_helper(source, PUBLISH.format(data=data, then=then))
    done = deploy.run(source / "sysctl/install.sh")
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert pattern() == "core"
    for dump in WATCH_DIR.glob("core*"):
        dump.unlink()


def test_dump_that_a_collector_takes_at_once_is_proof_enough(host, source):
    deploy.succeed(INSTALL, "--no-test")
    ended = threading.Event()

    def collect():
        while not ended.is_set():
            for dump in WATCH_DIR.glob("core-coretest-*.gz"):
                dump.unlink(missing_ok=True)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(3):
            assert "a test process crashed" in deploy.succeed(SETUP, "test")
    finally:
        ended.set()
        thread.join()


def configure_quick_runs():
    """Let installations measure no compressor."""
    CONF.parent.mkdir()
    CONF.write_text("COMPRESSOR=gzip\n")


def assert_consistent():
    """The kernel names a foreign pattern, or a helper that can run: a crash leaves its dump."""
    assert pattern() in ("core", OURS)
    if pattern() == OURS:
        assert PROGRAM.exists()
        deploy.succeed(PROGRAM, "--version")


def test_installation_and_removal_at_once_leave_one_of_both(host):
    configure_quick_runs()
    for _ in range(4):
        with contextlib.ExitStack() as stack:
            for command in ([INSTALL, "--no-test"], [UNINSTALL], [INSTALL, "--no-test"], [UNINSTALL]):
                stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        assert_consistent()
        assert PROGRAM.exists() == (pattern() == OURS) == BOOT_FILE.exists()
        assert leftovers() == []


@pytest.mark.parametrize(
    ("killed", "changes"),
    [(["install", "--no-test"], "rename,symlink"), (["uninstall"], "unlink")],
    ids=["install", "uninstall"],
)
def test_run_that_is_killed_at_any_step_leaves_no_absent_program_and_is_finished_by_the_next(
    host, killed, changes
):
    configure_quick_runs()
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        if killed[0] == "uninstall":
            deploy.succeed(INSTALL, "--no-test")
        step += 1
        kill = ["-e", f"inject={changes}:signal=KILL:when={step}"]
        trace = ["strace", "-qq", "-f", "--seccomp-bpf", "-o", "/dev/null", *kill]
        code = deploy.run(*trace, "/usr/bin/python3", "-IS", SYSCTL / "core-dump-setup", *killed).returncode
        assert_consistent()
        deploy.succeed(UNINSTALL)
        assert (pattern(), leftovers(), PROGRAM.parent.exists()) == ("core", [], False)
    assert (code, step > 10) == (0, True), "each change of a name was tried"


def test_configure_host_keeps_what_an_operator_edited_and_fails_when_the_proof_does(host, capfd):
    def configure(**options):
        code = configure_host.configure("/", source=str(SYSCTL.parent), **options)
        return code, "".join(capfd.readouterr())

    code, said = configure()
    assert (code, "its dump arrived" in said) == (0, True), said
    BOOT_FILE.write_text(BOOT_FILE.read_text() + "fs.suid_dumpable=2\n")
    edited = BOOT_FILE.read_text()
    assert configure(options=["--no-test"])[0] == 0
    assert (BOOT_FILE.read_text(), pattern()) == (edited, OURS)
    CONF.write_text("IGNORE_SIGNALS=11\n")
    code, said = configure()
    assert (code, "no dump arrived" in said) == (1, True)
    set_pattern(FOREIGN)
    assert configure()[0] == 1
    assert configure(restore=True)[0] == 0
    assert (pattern(), PROGRAM.exists()) == (FOREIGN, False)
    Path(f"{BOOT_FILE}.save").unlink()


def test_helpers_that_need_memory_are_in_a_cgroup_with_half_of_the_hosts(host):
    deploy.succeed(INSTALL)
    link = Path(cgroup.LINK)
    assert f"CGROUP={link}\n" in CONF.read_text()
    limits = [link / name for name in ("memory.max", "memory.limit_in_bytes") if (link / name).exists()]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert [abs(int(path.read_text()) - memory // 2) < 4096 for path in limits] == [True]
    target = link.resolve()
    link.unlink()
    target.rmdir()  # as a boot does
    assert f"{link} leads to {target}" in deploy.succeed(SETUP, "cgroup")
    with subprocess.Popen(["sleep", "60"]) as process:
        (link / "cgroup.procs").write_text(str(process.pid))
        assert "stays until the next boot" in deploy.run(UNINSTALL).stderr
        process.kill()
    deploy.succeed(INSTALL, "--no-test")
    deploy.succeed(UNINSTALL)
    assert (link.parent.exists(), target.exists()) == (False, False)

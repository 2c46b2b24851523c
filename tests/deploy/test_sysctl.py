"""install.sh and uninstall.sh below a scratch root: what they make, keep, refuse and remove."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from tests.support import deploy, kernel

from core_dump_helper.settings import Settings
from core_dump_setup import cgroup, commands

SYSCTL = deploy.ROOT / "sysctl"
PACKAGES = [deploy.ROOT / name for name in deploy.PACKAGES]
PROGRAM = Path("/usr/libexec/core-dump-handler/core-dump-helper")
OURS = deploy.sysctl_values(SYSCTL / "69-core-dump.conf")["kernel.core_pattern"]
CONFIGURATION = {
    "etc/core-dump-handler/helper.conf": "helper.conf",
    "etc/sysctl.d/69-core-dump.conf": "69-core-dump.conf",
    "etc/tmpfiles.d/core-dump-handler.conf": "tmpfiles.conf",
    "etc/security/limits.d/69-core-dump.conf": "limits.conf",
}
OLD_RELEASE = deploy.ROOT / "tests/fixtures/release-0.1.0/sysctl"
SYSTEMD = "kernel.core_pattern=|/usr/lib/systemd/systemd-coredump %P %u %g %s %t %c %h %d %F %I\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners, needs root: sudo make test")


def tree(root):
    """Every path below a root with mode and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def install(root, *options):
    return deploy.succeed(SYSCTL / "install.sh", "--root", root, *options)


def refused(root, *options):
    """Run an installation that must fail and change nothing; return what it said."""
    before = tree(root)
    done = deploy.run(SYSCTL / "install.sh", "--root", root, *options)
    assert done.returncode == 1, done.stdout
    assert tree(root) == before
    return done.stderr


def test_pattern_fits_into_the_kernels_limit():
    assert len(OURS.encode()) <= deploy.PATTERN_LIMIT
    assert f"|{PROGRAM} {kernel.ARGUMENTS}" == OURS


def test_helper_conf_shows_every_setting_with_its_default():
    lines = (SYSCTL / "helper.conf").read_text().splitlines()
    pairs = [line.removeprefix("#").split("=", 1) for line in lines if "=" in line]
    defaults = {key: str(default) for key, default in Settings.defaults().items()}
    shown = {key: value for key, value in pairs if key.isupper()}
    assert shown == defaults | {"CGROUP": cgroup.LINK}
    assert [line for line in lines if line and line[0] != "#"] == [f"CGROUP={cgroup.LINK}"]


@needs_root
def test_scratch_root_gets_every_file_with_its_mode(tmp_path):
    install(tmp_path)
    files = {path: stat.S_IMODE(mode) for path, (mode, _) in tree(tmp_path).items() if stat.S_ISREG(mode)}
    modules = {path: files.pop(path) for path in list(files) if re.search("/core_dump_[a-z]+/", path)}
    assert set(modules.values()) == {0o644}
    assert {path.split("/", 4)[4] for path in modules} == {
        f"{package.name}/{path.name}" for package in PACKAGES for path in package.glob("*.py")
    }
    assert files == {
        "usr/libexec/core-dump-handler/core-dump-helper": 0o755,
        "usr/libexec/core-dump-handler/core-dump-setup": 0o755,
        "usr/share/core-dump-handler/69-core-dump.conf": 0o644,
        **{path[1:]: 0o644 for path, _ in commands.UNITS},
        "var/lib/core-dump-handler/installed-files": 0o644,
        **dict.fromkeys(CONFIGURATION, 0o644),
    }
    assert stat.S_IMODE((tmp_path / "core_dumps").stat().st_mode) == 0o700
    assert (tmp_path / cgroup.WANTED[1:]).readlink() == Path(cgroup.UNIT)


@needs_root
def test_installed_programs_start_with_the_modules_of_their_release_alone(tmp_path):
    install(tmp_path)
    for name, argument in (("core-dump-helper", "--version"), ("core-dump-setup", "--help")):
        deploy.succeed("/usr/bin/python3", "-IS", tmp_path / str(PROGRAM.with_name(name))[1:], argument)
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site' not in p] + [sys.argv[1]]; "
    code += (
        "import core_dump_format.elf, core_dump_format.names, core_dump_format.gzip, core_dump_format.keys"
    )
    (release,) = tmp_path.glob("usr/libexec/core-dump-handler/[0-9]*-*")
    deploy.succeed("/usr/bin/python3", "-ISB", "-c", code, release)


@needs_root
def test_setup_runs_with_the_oldest_python(tmp_path):
    command = [kernel.pythons()[0], "-IS", SYSCTL / "core-dump-setup"]
    deploy.succeed(*command, "install", "--root", tmp_path)
    deploy.succeed(*command, "uninstall", "--root", tmp_path, "--purge")
    assert [path for path, (mode, _) in tree(tmp_path).items() if not stat.S_ISDIR(mode)] == []


@needs_root
def test_second_installation_changes_nothing(tmp_path):
    def inodes():
        return {path: path.lstat().st_ino for path in tmp_path.rglob("*")}

    install(tmp_path)
    before, content = inodes(), tree(tmp_path)
    install(tmp_path)
    assert (inodes(), tree(tmp_path)) == (before, content)


@needs_root
@pytest.mark.parametrize("path", CONFIGURATION)
def test_edited_configuration_is_kept_and_the_new_version_put_beside_it(tmp_path, path):
    install(tmp_path)
    shipped = (tmp_path / path).read_text()
    (tmp_path / path).write_text(shipped + "# edited\n")
    said = install(tmp_path)
    assert f"kept {tmp_path / path}, which was edited" in said
    assert (tmp_path / path).read_text() == shipped + "# edited\n"
    assert (tmp_path / f"{path}.dist").read_text() == shipped
    (tmp_path / path).write_text(shipped)
    install(tmp_path)
    assert not (tmp_path / f"{path}.dist").exists()


@needs_root
@pytest.mark.parametrize("path", CONFIGURATION)
def test_configuration_that_nobody_edited_is_upgraded(tmp_path, path):
    source = deploy.checkout(tmp_path / "checkout")
    root = tmp_path / "root"
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    with (source / "sysctl" / CONFIGURATION[path]).open("a") as file:
        file.write("# a later version\n")
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    assert (root / path).read_text().endswith("# a later version\n")
    assert not (root / f"{path}.dist").exists()


@needs_root
def test_configuration_of_release_0_1_0_that_nobody_edited_is_upgraded(tmp_path):
    for path, name in CONFIGURATION.items():
        write(tmp_path / path, (OLD_RELEASE / name).read_text())
    assert "edited" not in install(tmp_path)
    for path, name in CONFIGURATION.items():
        assert (tmp_path / path).read_text() == (SYSCTL / name).read_text()


@needs_root
def test_configuration_that_an_operator_turned_off_by_a_link_stays_off(tmp_path):
    off = tmp_path / "etc/security/limits.d/69-core-dump.conf"
    off.parent.mkdir(parents=True)
    off.symlink_to("/dev/null")
    assert "which was edited" in install(tmp_path)
    assert off.readlink() == Path("/dev/null")


@needs_root
def test_boot_sets_what_the_edited_file_says_or_the_installation_stops(tmp_path):
    install(tmp_path)
    boot = tmp_path / "etc/sysctl.d/69-core-dump.conf"
    boot.write_text(boot.read_text().replace("core_pipe_limit=0", "core_pipe_limit=16"))
    install(tmp_path)
    boot.write_text("kernel.core_pattern=|/bin/false\n")
    assert "does not start the helper" in refused(tmp_path)


@needs_root
def test_removal_keeps_edited_files_where_nothing_reads_them(tmp_path):
    install(tmp_path)
    for path in CONFIGURATION:
        with (tmp_path / path).open("a") as file:
            file.write("# edited\n")
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path)
    left = [path for path, (mode, _) in tree(tmp_path).items() if stat.S_ISREG(mode)]
    kept = [path if path.endswith("helper.conf") else f"{path}.save" for path in sorted(CONFIGURATION)]
    assert left == kept
    assert all((tmp_path / path).read_text().endswith("# edited\n") for path in left)
    install(tmp_path)
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path, "--purge")
    assert [path for path, (mode, _) in tree(tmp_path).items() if not stat.S_ISDIR(mode)] == []


@needs_root
@pytest.mark.parametrize("kind", ["link", "directory"])
def test_removal_keeps_what_is_no_regular_file_as_the_installation_did(tmp_path, kind):
    managed = write(tmp_path / "managed", "kernel.core_pattern=" + OURS)
    for path in CONFIGURATION:
        (tmp_path / path).parent.mkdir(parents=True)
        if kind == "link":
            (tmp_path / path).symlink_to(managed)
        elif not path.endswith("helper.conf"):
            (tmp_path / path).mkdir()
    install(tmp_path)
    done = deploy.run(SYSCTL / "uninstall.sh", "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in CONFIGURATION:
        if not path.endswith("helper.conf"):
            assert f"{tmp_path / path} is not a regular file: kept\n" in done.stdout
            assert (tmp_path / path).is_symlink() == (kind == "link") == (not (tmp_path / path).is_dir())
    warned = f"{tmp_path}/etc/sysctl.d/69-core-dump.conf still sets kernel.core_pattern" in done.stderr
    assert warned == (kind == "link")
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path, "--purge")
    assert [path for path, (mode, _) in tree(tmp_path).items() if not stat.S_ISDIR(mode)] == ["managed"]
    assert managed.read_text() == "kernel.core_pattern=" + OURS


@needs_root
def test_running_helper_keeps_its_file_when_a_new_version_is_installed(tmp_path):
    source = deploy.checkout(tmp_path / "checkout")
    root = tmp_path / "root"
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    launcher = root / str(PROGRAM)[1:]
    (module,) = launcher.parent.glob("*/core_dump_helper/handler.py")
    old = module.read_text()
    os.utime(module.parents[1], (0, 0))
    with launcher.open() as running:
        with (source / "helper/core_dump_helper/handler.py").open("a") as new:
            new.write("# a later version\n")
        deploy.succeed(source / "sysctl/install.sh", "--root", root)
        assert running.read() != launcher.read_text()
    assert module.read_text() == old, (
        "a release is never written to, and stays for who was just started from it"
    )
    (release,) = {path.parents[1] for path in launcher.parent.glob("*/core_dump_helper/handler.py")} - {
        module.parents[1]
    }
    for program in (launcher, launcher.with_name("core-dump-setup")):
        assert f'RELEASE = "{release.name}"\n' in program.read_text()
    assert (release / "core_dump_helper/handler.py").read_text().endswith("# a later version\n")
    assert list(launcher.parent.rglob("*.new*")) == []
    os.utime(module.parents[1], (0, 0))
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    assert [path.parents[1] for path in launcher.parent.glob("*/core_dump_helper/handler.py")] == [release]


@needs_root
@pytest.mark.parametrize("what", ["launcher", "module", "compiled module", "folder"])
def test_program_that_others_could_change_is_replaced(tmp_path, what):
    install(tmp_path)
    launcher = tmp_path / str(PROGRAM)[1:]
    (release,) = launcher.parent.glob("[0-9]*-*")
    compiled = release / "core_dump_helper/__pycache__/handler.cpython-37.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"planted")
    target = {
        "launcher": launcher,
        "module": release / "core_dump_helper/handler.py",
        "compiled module": compiled,
        "folder": release / "core_dump_helper",
    }[what]
    before = target.stat().st_ino
    os.chown(target, 1234, 1234)
    target.chmod(0o777)
    install(tmp_path)
    name = re.search('^RELEASE = "(.*)"$', launcher.read_text(), re.MULTILINE)[1]
    used = [launcher, launcher.parent / name, *(launcher.parent / name).rglob("*")]
    status = [path.stat() for path in used]
    assert {(found.st_uid, found.st_mode & 0o022) for found in status} == {(0, 0)}
    assert before not in [found.st_ino for found in status], "whoever holds it open must not change what runs"
    assert (what == "launcher") == (compiled in used)


@needs_root
def test_pattern_that_the_kernel_would_cut_is_refused(tmp_path):
    source = deploy.checkout(tmp_path / "checkout")
    conf = source / "sysctl/69-core-dump.conf"
    conf.write_text(conf.read_text().replace(" -- %e\n", " -Cxxxxxxxxxxxxxxxxxx -- %e\n"))
    done = deploy.run(source / "sysctl/install.sh", "--root", tmp_path / "root")
    assert done.returncode == 1
    assert "bytes, the kernel takes 127" in done.stderr
    assert not (tmp_path / "root/etc/sysctl.d").exists()


@needs_root
def test_watch_directory_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "core_dumps").symlink_to("elsewhere")
    assert "symbolic link" in refused(tmp_path)


@needs_root
@pytest.mark.parametrize(
    "name", ["/", "//", "/var/tmp", "/tmp/", "/var//lib", "/usr/../etc", "dumps", "/etc/."]
)
def test_watch_directory_that_is_the_systems_or_no_path_is_refused(tmp_path, name):
    write(tmp_path / "etc/core-dump-handler/helper.conf", f"WATCH_DIR={name}\n")
    (tmp_path / "var/tmp").mkdir(parents=True)
    (tmp_path / "var/tmp").chmod(0o1777)
    said = refused(tmp_path)
    assert "WATCH_DIR=" in said
    assert "must be" in said


@needs_root
def test_directory_with_files_of_others_is_not_taken_from_them(tmp_path):
    write(tmp_path / "etc/core-dump-handler/helper.conf", "WATCH_DIR=/data\n")
    write(tmp_path / "data/accounts.db", "")
    assert "accounts.db" in refused(tmp_path)
    (tmp_path / "data/accounts.db").rename(tmp_path / "data/core-app-1790000000-7-11.gz")
    (tmp_path / "data").chmod(0o1777)
    install(tmp_path)
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


@needs_root
@pytest.mark.parametrize(
    "line", ["WATCH_DIR=/data \t", "WATCH_DIR = /data\r", "  WATCH_DIR=/x\r\nWATCH_DIR=/data"]
)
def test_installer_and_helper_read_the_same_watch_directory(tmp_path, line):
    conf = write(tmp_path / "etc/core-dump-handler/helper.conf", "")
    conf.write_bytes(line.encode() + b"\n")
    install(tmp_path)
    settings = Settings()
    settings.load(str(conf))
    assert settings.WATCH_DIR == "/data"
    assert [path.name for path in tmp_path.iterdir() if path.name in {"data", "x", "core_dumps"}] == ["data"]
    assert sorted(os.listdir(tmp_path)) == ["data", "etc", "usr", "var"]


@needs_root
def test_wrong_setting_is_named_with_what_it_accepts(tmp_path):
    conf = write(tmp_path / "etc/core-dump-handler/helper.conf", "LEVEL=12\n")
    assert "'LEVEL=12': it must be a whole number from 1 to 9" in refused(tmp_path)
    conf.write_text("RULES=trim exe=/a; wholly\n")
    assert "'RULES=trim exe=/a; wholly': it must be rules" in refused(tmp_path)
    conf.write_text("LEVEL=1\n")
    conf.chmod(0o666)
    assert "others than root can change it" in refused(tmp_path)


def test_root_without_a_name_is_refused():
    for script in ("install.sh", "uninstall.sh"):
        done = deploy.run(SYSCTL / script, "--root", "")
        assert (done.returncode, "--root: takes a directory" in done.stderr) == (2, True)
        done = deploy.run(SYSCTL / script, "--root", "/dev/null")
        assert (done.returncode, "is not a directory" in done.stderr) == (2, True)


@needs_root
def test_handler_that_an_image_sets_at_boot_is_named_and_replaced_only_by_force(tmp_path):
    for directory in (
        "etc/sysctl.d",
        "run/sysctl.d",
        "usr/local/lib/sysctl.d",
        "usr/lib/sysctl.d",
        "lib/sysctl.d",
    ):
        path = write(tmp_path / directory / "50-coredump.conf", "kernel.core_pattern=|/opt/handler %P\n")
        said = refused(tmp_path)
        assert f"{path} sets kernel.core_pattern to |/opt/handler %P" in said
        assert "--force" in said
        path.unlink()
    write(path, "kernel.core_pattern=|/opt/handler %P\n")
    install(tmp_path, "--force")
    assert (tmp_path / "etc/sysctl.d/69-core-dump.conf").exists()


@needs_root
def test_handler_that_the_distribution_sets_at_boot_is_replaced(tmp_path):
    path = write(tmp_path / "usr/lib/sysctl.d/50-coredump.conf", SYSTEMD)
    install(tmp_path)
    assert path.read_text() == SYSTEMD
    assert (tmp_path / "etc/sysctl.d/69-core-dump.conf").exists(), "read after the file of the distribution"


@needs_root
def test_file_that_is_hidden_by_a_stronger_one_is_no_handler(tmp_path):
    write(tmp_path / "usr/lib/sysctl.d/50-coredump.conf", "kernel.core_pattern=|/opt/handler %P\n")
    write(tmp_path / "etc/sysctl.d/50-coredump.conf", "# off\n")
    install(tmp_path)


@needs_root
def test_file_that_wins_at_boot_is_named(tmp_path):
    later = {
        "usr/local/lib/sysctl.d/70-ours.conf": "kernel.core_pattern = core",
        "run/sysctl.d/ab.conf": "-kernel/core_pattern=core",
        "usr/lib/sysctl.d/99-last.conf": "kernel.core_*=core",
        "etc/sysctl.conf": "kernel.core_pattern=core",
    }
    for path, line in later.items():
        write(tmp_path / path, f"# comment\n{line}\n")
    write(tmp_path / "etc/sysctl.d/10-earlier.conf", "kernel.core_pattern=core\n")
    done = deploy.run(SYSCTL / "install.sh", "--root", tmp_path)
    assert done.returncode == 0
    warned = re.findall("warning: (.*) also sets kernel.core_pattern and wins at boot", done.stderr)
    assert sorted(warned) == sorted(str(tmp_path / path) for path in later)


@needs_root
@pytest.mark.parametrize(
    "brought",
    [
        "usr/lib/systemd/system/systemd-coredump-register.service",
        "lib/systemd/system/abrt-ccpp.service",
        "usr/lib/systemd/system/apport.service",
        "etc/init.d/apport",
    ],
)
def test_service_that_sets_the_pattern_after_sysctl_is_masked_and_unmasked(tmp_path, brought):
    write(tmp_path / brought, "[Service]\n")
    said = install(tmp_path)
    name = Path(brought).name.removesuffix(".service") + ".service"
    assert f"masked {name}" in said
    mask = tmp_path / "etc/systemd/system" / name
    assert mask.readlink() == Path("/dev/null")
    install(tmp_path)
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path)
    assert not mask.is_symlink()


@needs_root
def test_service_that_an_operator_masked_stays_masked(tmp_path):
    write(tmp_path / "usr/lib/systemd/system/systemd-coredump-register.service", "[Service]\n")
    mask = tmp_path / "etc/systemd/system/systemd-coredump-register.service"
    mask.parent.mkdir(parents=True)
    mask.symlink_to("/dev/null")
    install(tmp_path)
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path)
    assert mask.readlink() == Path("/dev/null")


@needs_root
@pytest.mark.parametrize("link", ["etc/sysctl.d", "usr/libexec", "etc/core-dump-handler"])
def test_link_that_leads_out_of_the_root_is_not_followed(tmp_path, link):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside)
    assert "leads out of" in refused(root)
    assert list(outside.iterdir()) == []


@needs_root
def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path):
    install(tmp_path)
    expected = tree(tmp_path)
    folder = tmp_path / "usr/libexec/core-dump-handler"
    write(folder / "0.1.0-abc.new.17/core_dump_helper/core.py", "")
    for leftover in (
        folder / "core-dump-helper.new.17",
        folder / "coretest-0a1b2c",
        *(tmp_path / f"{path}{suffix}.new.17" for path in CONFIGURATION for suffix in ("", ".dist", ".save")),
        tmp_path / "usr/share/core-dump-handler/69-core-dump.conf.new.17",
        tmp_path / "var/lib/core-dump-handler/previous-core-pattern.new.17",
        tmp_path / "var/lib/core-dump-handler/installed-files.new.17",
    ):
        leftover.write_text("")
    install(tmp_path)
    assert tree(tmp_path) == expected


def older_release(root, name):
    """A release that was replaced long ago."""
    module = write(root / str(PROGRAM.parent)[1:] / name / "core_dump_helper/core.py", "")
    os.utime(module.parents[1], (0, 0))
    return module.parents[1]


@needs_root
def test_older_release_that_cannot_be_removed_fails_no_installation(tmp_path):
    first, stuck, last = (older_release(tmp_path, name) for name in ("0.0.1-a", "0.0.2-b", "0.0.3-c"))
    mount = 'mount --bind "$1" "$1" && shift && exec "$@"'
    done = deploy.run(
        *("unshare", "--mount", "sh", "-c", mount, "sh", stuck, SYSCTL / "install.sh", "--root", tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert f"warning: an older release stays: [Errno 16] Device or resource busy: '{stuck}'" in done.stderr
    assert "as it was before" not in done.stderr
    assert [path.exists() for path in (first, stuck, last)] == [False, True, False]
    assert (tmp_path / str(PROGRAM)[1:]).exists()


@needs_root
@pytest.mark.parametrize("output", ["closed pipe", "full disk", "closed"])
def test_output_that_nobody_reads_ends_no_run(tmp_path, output):
    reader, writer = os.pipe()
    os.close(reader)
    redirect = {"closed pipe": "", "full disk": " >/dev/full", "closed": " >&-"}[output]
    for script in ("install.sh", "uninstall.sh"):
        edited = write(tmp_path / "etc/tmpfiles.d/core-dump-handler.conf", "# edited\n")
        command = f'exec "$0" --root "$1"{redirect}'
        done = subprocess.run(
            ["sh", "-c", command, SYSCTL / script, tmp_path], stdout=writer, stderr=-1, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert (tmp_path / str(PROGRAM)[1:]).exists() == edited.exists() == (script == "install.sh")
    os.close(writer)


EVERY = 5
"""Of the steps of a run, one in this many is interrupted: all of them take too long."""


@needs_root
def test_run_that_is_interrupted_is_undone_or_done(tmp_path):
    root = tmp_path / "root"
    old = older_release(root, "0.0.1-a")
    for number in range(2 * EVERY):  # each is removed in a step of its own, after all others
        write(old / f"{number}.py", "")
    os.utime(old, (0, 0))
    before, codes = tree(root), []
    while 0 not in codes:
        assert len(codes) < 50
        step = 1 + len(codes) * EVERY
        kill = f"inject=/^(rename|symlink|mkdir|unlink|rmdir):signal=TERM:when={step}"
        trace = ["strace", "-qq", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", kill]
        done = deploy.run(*trace, SYSCTL / "install.sh", "--root", root)
        codes.append(done.returncode)
        if done.returncode:
            assert done.returncode == 1
            assert "interrupted by signal 15" in done.stderr
            assert tree(root) == before
    assert len(codes) > 5
    assert (root / str(PROGRAM)[1:]).exists()


BROKEN_RUN = """
import io, os, signal, subprocess, sys
root, source, action = sys.argv[1:]
sys.path[:0] = [source + "/" + name for name in ("sysctl", "helper", "format")]
from core_dump_setup import boot, cgroup
from core_dump_setup.cli import main
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, "ascii")
sys.argv = [source + "/sysctl/core-dump-setup"]
cgroup.LINK = root + "/run/cgroup"
def fail(tree):
    exec(action)
boot.warn_of_later_files = fail
sys.exit(main(["install", "--root", root]))
"""


def run_broken(root, action):
    """Install with a step that does something else."""
    return deploy.run("/usr/bin/python3", "-ISB", "-c", BROKEN_RUN, root, deploy.ROOT, action)


@needs_root
@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise MemoryError", "MemoryError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise subprocess.TimeoutExpired('cmd', 7)", "Command 'cmd' timed out after 7 seconds"),
        (
            "tree.on_failure(lambda: 1 / 0); raise ValueError('wrong')",
            "could not be undone: division by zero",
        ),
        ("os.kill(os.getpid(), signal.SIGHUP)", "interrupted by signal 1"),
        (
            "cgroup.prepare = lambda: os.kill(os.getpid(), signal.SIGTERM); cgroup.use(tree)",
            "interrupted by signal 15",
        ),
    ],
)
def test_run_that_ends_by_any_exception_is_undone(tmp_path, action, said):
    before = tree(tmp_path)
    done = run_broken(tmp_path, action)
    assert (done.returncode, f"core-dump-setup: {said}" in done.stderr) == (1, True), done.stderr
    assert ("everything is as it was before" in done.stderr) == ("could not" not in said)
    assert tree(tmp_path) == before


@needs_root
def test_name_that_the_output_cannot_show_is_escaped(tmp_path):
    root = tmp_path / "ué"
    write(root / "etc/tmpfiles.d/core-dump-handler.conf", "# edited\n")
    done = run_broken(root, "")
    assert (done.returncode, "/u\\xe9/etc/tmpfiles.d" in done.stdout) == (0, True), done.stderr


@needs_root
def test_run_that_changed_nothing_does_not_claim_to_have_undone_it(tmp_path):
    write(tmp_path / "etc/core-dump-handler/helper.conf", "LEVEL=12\n")
    assert "as it was before" not in refused(tmp_path)


@needs_root
def test_second_run_waits_for_the_first(tmp_path):
    install(tmp_path)
    lock = tmp_path / "var/lib/core-dump-handler/lock"
    with subprocess.Popen(["flock", "-o", lock, "cat"], stdin=subprocess.PIPE) as holder:
        while not lock.exists() or subprocess.run(["flock", "-n", lock, "true"], check=False).returncode == 0:
            assert holder.poll() is None
        command = [str(SYSCTL / "uninstall.sh"), "--root", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
            assert "waiting" in second.stdout.readline()
            assert (tmp_path / str(PROGRAM)[1:]).exists()
            holder.stdin.close()
            assert second.wait(30) == 0
    assert not (tmp_path / str(PROGRAM)[1:]).exists()
    assert not lock.exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SYSCTL.glob("*.sh")))
def test_scripts_pass_shellcheck(script):
    deploy.succeed(deploy.tool("shellcheck"), SYSCTL / script)

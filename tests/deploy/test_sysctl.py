"""install.sh and uninstall.sh, below a scratch root and on this machine's kernel."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from tests.support import deploy, kernel

from core_dump_helper.settings import Settings

SYSCTL = deploy.ROOT / "sysctl"
PACKAGE = deploy.ROOT / "helper/core_dump_helper"
PROGRAM = Path("/usr/libexec/core-dump-handler/core-dump-helper")
BOOT_FILE = Path("/etc/sysctl.d/69-core-dump.conf")
WATCH_DIR = Path("/core_dumps")
OURS = deploy.sysctl_values(SYSCTL / "69-core-dump.conf")["kernel.core_pattern"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners, needs root: sudo make test")


def pattern():
    return deploy.PATTERN.read_text().rstrip("\n")


def tree(root):
    """Every path below a root with mode and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


@pytest.fixture
def host():
    """This machine without us, its core pattern `core` and ours alone; left as it was."""
    if not kernel.can_crash():
        pytest.skip("sets kernel.core_pattern, needs root: sudo make test")
    taken = [str(path) for path in (PROGRAM, BOOT_FILE, WATCH_DIR) if path.exists()]
    if taken:
        pytest.skip(f"{', '.join(taken)} exists: this machine uses what the test would install")
    with kernel.core_pattern("core"):
        try:
            yield
        finally:
            for leftover in WATCH_DIR.glob("core*"):
                leftover.unlink()
            deploy.run(SYSCTL / "uninstall.sh", "--purge")
            assert not any(path.exists() for path in (PROGRAM, BOOT_FILE, WATCH_DIR, PROGRAM.parent))


def test_pattern_fits_into_the_kernels_limit():
    assert len(OURS.encode()) <= deploy.PATTERN_LIMIT
    assert f"|{PROGRAM} {kernel.ARGUMENTS}" == OURS


def test_helper_conf_shows_every_setting_with_its_default():
    lines = [line[1:] for line in (SYSCTL / "helper.conf").read_text().splitlines() if line.startswith("#")]
    pairs = dict(line.split("=", 1) for line in lines if "=" in line)
    defaults = {key: str(default) for key, default in Settings.defaults().items()}
    shown = {key: value for key, value in pairs.items() if key.isupper()}
    assert shown == defaults


@needs_root
def test_scratch_root_gets_every_file_with_its_mode(tmp_path):
    deploy.succeed(SYSCTL / "install.sh", "--root", tmp_path)
    files = {path: stat.S_IMODE(mode) for path, (mode, _) in tree(tmp_path).items() if stat.S_ISREG(mode)}
    modules = {path: files.pop(path) for path in list(files) if "/core_dump_helper/" in path}
    assert set(modules.values()) == {0o644}
    assert {Path(path).name for path in modules} == {path.name for path in PACKAGE.glob("*.py")}
    assert files == {
        "usr/libexec/core-dump-handler/core-dump-helper": 0o755,
        "usr/libexec/core-dump-handler/core-dump-setup": 0o755,
        "usr/share/core-dump-handler/69-core-dump.conf": 0o644,
        "etc/core-dump-handler/helper.conf": 0o644,
        "etc/sysctl.d/69-core-dump.conf": 0o644,
        "etc/tmpfiles.d/core-dump-handler.conf": 0o644,
        "etc/security/limits.d/69-core-dump.conf": 0o644,
    }
    assert stat.S_IMODE((tmp_path / "core_dumps").stat().st_mode) == 0o700


@needs_root
def test_second_installation_changes_nothing(tmp_path):
    def inodes():
        return {path: path.stat().st_ino for path in tmp_path.rglob("*")}

    deploy.succeed(SYSCTL / "install.sh", "--root", tmp_path)
    before, content = inodes(), tree(tmp_path)
    deploy.succeed(SYSCTL / "install.sh", "--root", tmp_path)
    assert (inodes(), tree(tmp_path)) == (before, content)


@needs_root
def test_configuration_of_the_operator_survives_upgrade_and_removal(tmp_path):
    deploy.succeed(SYSCTL / "install.sh", "--root", tmp_path)
    conf = tmp_path / "etc/core-dump-handler/helper.conf"
    conf.write_text("LEVEL=3\n")
    deploy.succeed(SYSCTL / "install.sh", "--root", tmp_path)
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path)
    left = [path for path, (mode, _) in tree(tmp_path).items() if stat.S_ISREG(mode)]
    assert left == ["etc/core-dump-handler/helper.conf"]
    assert conf.read_text() == "LEVEL=3\n"


@needs_root
def test_running_helper_keeps_its_file_when_a_new_version_is_installed(tmp_path):
    source = tmp_path / "checkout"
    shutil.copytree(SYSCTL, source / "sysctl")
    shutil.copytree(deploy.ROOT / "helper", source / "helper")
    root = tmp_path / "root"
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    launcher = root / str(PROGRAM)[1:]
    (module,) = launcher.parent.glob("*/core_dump_helper/handler.py")
    old = module.read_text()
    with launcher.open() as running:
        with (source / "helper/core_dump_helper/handler.py").open("a") as new:
            new.write("# a later version\n")
        deploy.succeed(source / "sysctl/install.sh", "--root", root)
        assert running.read() != launcher.read_text()
    assert module.read_text() == old, "a release is never written to"
    (release,) = {path.parents[1] for path in launcher.parent.glob("*/core_dump_helper/handler.py")} - {
        module.parents[1]
    }
    assert f'RELEASE = "{release.name}"\n' in launcher.read_text()
    assert (release / "core_dump_helper/handler.py").read_text().endswith("# a later version\n")
    assert list(launcher.parent.rglob("*.new*")) == []
    os.utime(module.parents[1], (0, 0))
    deploy.succeed(source / "sysctl/install.sh", "--root", root)
    assert [path.parents[1] for path in launcher.parent.glob("*/core_dump_helper/handler.py")] == [release]


@needs_root
def test_pattern_that_the_kernel_would_cut_is_refused(tmp_path):
    source = tmp_path / "checkout"
    shutil.copytree(SYSCTL, source / "sysctl")
    shutil.copytree(deploy.ROOT / "helper", source / "helper")
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
    done = deploy.run(SYSCTL / "install.sh", "--root", tmp_path)
    assert (done.returncode, "symbolic link" in done.stderr) == (1, True)


def test_installation_proves_itself_with_a_crash_and_removal_restores(host):
    said = deploy.succeed(SYSCTL / "install.sh")
    assert "a test process crashed and its dump arrived" in said
    assert pattern() == OURS
    assert deploy.sysctl_values(BOOT_FILE)["kernel.core_pattern"] == OURS
    assert (WATCH_DIR.stat().st_uid, stat.S_IMODE(WATCH_DIR.stat().st_mode)) == (0, 0o700)
    assert "a test process crashed" in deploy.succeed(PROGRAM.with_name("core-dump-setup"), "test")
    deploy.succeed(SYSCTL / "install.sh", "--no-test")
    deploy.succeed(SYSCTL / "uninstall.sh")
    assert pattern() == "core"
    assert not BOOT_FILE.exists()


def test_foreign_handler_is_named_and_replaced_only_by_force(host):
    foreign = "|/usr/lib/systemd/systemd-coredump %P %u"
    deploy.PATTERN.write_text(foreign + "\n")
    done = deploy.run(SYSCTL / "install.sh")
    assert done.returncode == 1
    assert foreign in done.stderr
    assert "--force" in done.stderr
    assert (pattern(), BOOT_FILE.exists()) == (foreign, False)
    deploy.succeed(SYSCTL / "install.sh", "--force", "--no-test")
    assert pattern() == OURS
    deploy.succeed(SYSCTL / "install.sh", "--no-test")  # must not save our own pattern over the foreign one
    deploy.succeed(SYSCTL / "uninstall.sh")
    assert pattern() == foreign


def test_pattern_that_somebody_set_after_us_is_left_alone(host):
    deploy.succeed(SYSCTL / "install.sh", "--no-test")
    deploy.PATTERN.write_text("/var/crash/core.%p\n")
    assert "left alone" in deploy.succeed(SYSCTL / "uninstall.sh")
    assert pattern() == "/var/crash/core.%p"


def test_dry_run_touches_nothing(host):
    said = deploy.succeed(SYSCTL / "install.sh", "--dry-run")
    assert f"would set kernel.core_pattern={OURS}" in said
    assert pattern() == "core"
    assert not any(path.exists() for path in (PROGRAM, BOOT_FILE, WATCH_DIR))


def test_installation_fails_loudly_when_no_dump_arrives(host):
    conf = Path("/etc/core-dump-handler/helper.conf")
    conf.parent.mkdir()
    conf.write_text("IGNORE_SIGNALS=11\n")
    done = deploy.run(SYSCTL / "install.sh")
    assert done.returncode == 1
    assert "no dump arrived in /core_dumps" in done.stderr


@pytest.mark.parametrize("script", ["install.sh", "uninstall.sh", "core-dump-setup"])
def test_scripts_pass_shellcheck(script):
    deploy.succeed(deploy.tool("shellcheck"), SYSCTL / script)

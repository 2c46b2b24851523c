"""The RPM in a root of its own, and the systemd unit."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
from tests.support import deploy, kernel

from core_dump_collector.config import Settings
from core_dump_setup import kernel as setup_kernel

SYSCTL = deploy.ROOT / "sysctl"
UNIT = SYSCTL / "core-dump-collector.service"
CGROUP_UNIT = SYSCTL / "core-dump-cgroup.service"
SOURCES = ("helper", "sysctl", "format", "docs")
PROGRAM = "usr/libexec/core-dump-handler"
MODULE = "core_dump_helper/handler.py"
BOOT_FILE = "etc/sysctl.d/69-core-dump.conf"
OURS = (PROGRAM, BOOT_FILE, "etc/core-dump-handler", "var/lib/core-dump-handler", "core_dumps")
"""Paths of an installation, below its root."""
INSIDE = """
set -e
mount -t overlay none -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
shift
exec "$@"
"""


@pytest.fixture
def build(tmp_path):
    """Build a release of the package from a copy of the sources; return its path."""

    def built(release, change=""):
        source = tmp_path / f"source-{release}"
        for name in SOURCES:
            shutil.copytree(deploy.ROOT / name, source / name)
        with (source / "helper" / MODULE).open("a") as helper:
            helper.write(change)
        spec = source / "sysctl/core-dump-handler.spec"
        spec.write_text(spec.read_text().replace("Release: 1\n", f"Release: {release}\n"))
        defines = ["--define", f"_topdir {tmp_path}/top", "--define", f"_sourcedir {source}"]
        deploy.succeed(deploy.tool("rpmbuild"), "-bb", *defines, spec)
        return tmp_path / f"top/RPMS/noarch/core-dump-handler-0.1.0-{release}.noarch.rpm"

    return built


@pytest.fixture
def inside(tmp_path):
    """Run programs in a copy-on-write root without /proc: the running kernel is out of their reach."""
    if os.geteuid() != 0:
        pytest.skip("mounts a root of its own, needs root: sudo make test")
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()

    def run(*command, code=0):
        done = deploy.run("unshare", "--mount", "sh", "-c", INSIDE, "sh", tmp_path, *command)
        if "mount:" in done.stderr:
            pytest.skip(f"no overlay file system here: {done.stderr.strip()}")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("rm", "-rf", *(tmp_path / "root" / path for path in OURS))  # this machine may have one
    return run


@pytest.fixture
def rpm(inside, tmp_path):
    """Run rpm in that root."""

    def run(*arguments, code=0):
        return inside(deploy.tool("rpm"), "--root", tmp_path / "root", *arguments, code=code)

    return run


def exists(upper, path):
    """Say whether a path was made; a deletion is a character device in the upper directory."""
    found = upper / path
    return found.exists() and not stat.S_ISCHR(found.lstat().st_mode)


def test_package_installs_upgrades_and_goes(rpm, build, tmp_path):
    upper = tmp_path / "upper"
    rpm("--initdb")
    said = rpm("-i", "--nodeps", build(1))
    assert "set at the next boot" in said
    assert (upper / BOOT_FILE).read_text() == (SYSCTL / "69-core-dump.conf").read_text()
    assert stat.S_IMODE((upper / "core_dumps").stat().st_mode) == 0o700
    pages = sorted(path.name.partition(".8")[0] for path in (upper / "usr/share/man/man8").iterdir())
    assert pages == ["core-dump-collector", "core-dump-helper", "core-dump-setup"]
    rpm("-V", "--nodeps", "core-dump-handler")
    conf = upper / "etc/core-dump-handler/helper.conf"
    conf.write_text("LEVEL=3\n")
    first = (upper / PROGRAM / "0.1.0-1" / MODULE).read_text()
    rpm("-U", "--nodeps", build(2, "# the second release\n"))
    assert (upper / PROGRAM / "0.1.0-2" / MODULE).read_text() == first + "# the second release\n"
    assert 'RELEASE = "0.1.0-2"\n' in (upper / PROGRAM / "core-dump-helper").read_text()
    assert not exists(upper, f"{PROGRAM}/0.1.0-1")
    assert conf.read_text() == "LEVEL=3\n"
    assert exists(upper, BOOT_FILE), "an upgrade must not deactivate"
    wanted = upper / "etc/systemd/system/multi-user.target.wants/core-dump-collector.service"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.symlink_to("/usr/lib/systemd/system/core-dump-collector.service")  # `systemctl enable`
    said = rpm("-e", "--nodeps", "core-dump-handler")
    assert not any(
        exists(upper, path) for path in (f"{PROGRAM}/0.1.0-2", f"{PROGRAM}/core-dump-helper", BOOT_FILE)
    )
    assert not wanted.is_symlink()
    assert "what remains: the dumps in /core_dumps" in said
    left = {str(path.relative_to(upper)) for path in upper.rglob("*core-dump*") if exists(upper, path)}
    assert left == {"etc/core-dump-handler"}
    assert [path.name for path in conf.parent.iterdir()] == ["helper.conf.rpmsave"], "it was edited"


def test_package_that_is_not_active_says_so(rpm, build, tmp_path):
    (tmp_path / "upper/etc/sysctl.d").mkdir(parents=True, exist_ok=True)
    (tmp_path / "upper/etc/sysctl.d/50-other.conf").write_text("kernel.core_pattern=|/opt/handler %P\n")
    rpm("--initdb")
    said = rpm("-i", "--nodeps", build(1))
    assert "sets kernel.core_pattern to |/opt/handler %P" in said
    assert "installed, but not active" in said
    assert "scriptlet failed" in said
    rpm("-q", "core-dump-handler")
    assert not exists(tmp_path / "upper", BOOT_FILE)


def test_package_asks_nothing_that_the_oldest_rpm_lacks(build):
    needs = deploy.succeed(deploy.tool("rpm"), "-qp", "--requires", build(1)).split("\n")
    assert {line.split("(")[0] for line in needs if line} == {"/bin/sh", "/usr/bin/python3", "pigz", "rpmlib"}
    assert max(line.rpartition(" ")[2] for line in needs if line.startswith("rpmlib")) <= "4.6.0-1"


@pytest.mark.skipif(not kernel.can_crash(), reason="sets kernel.core_pattern, needs root: sudo make test")
def test_package_is_refused_where_the_kernel_starts_a_handler_that_nobody_may_replace_unasked(build):
    scripts = deploy.succeed(deploy.tool("rpm"), "-qp", "--scripts", build(1))
    before = scripts.partition("preinstall scriptlet (using /bin/sh):\n")[2].partition(
        "postinstall scriptlet"
    )[0]
    taken = ["core", "core.%p", "|/bin/false", *(f"{start} %P" for start in setup_kernel.PROGRAMS)]
    taken.append(deploy.sysctl_values(SYSCTL / "69-core-dump.conf")["kernel.core_pattern"])
    refused = ["|/bin/true %P", "/var/crash/core.%p", "|/usr/share/apport/apport-of-ours %P"]
    with kernel.core_pattern("core"):
        for pattern in taken + refused:
            deploy.PATTERN.write_text(pattern + "\n")
            done = deploy.run("sh", "-c", before, "sh", "1")
            assert done.returncode == (pattern in refused), pattern
            assert (f"kernel.core_pattern is {pattern}, " in done.stderr) == (pattern in refused)
            assert deploy.run("sh", "-c", before, "sh", "2").returncode == 0


@pytest.fixture
def unit(tmp_path):
    """The unit with a program that exists here."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/core-dump-handler/bin/core-dump-collector", "/bin/true"))
    return path


def test_unit_says_nothing_that_systemd_does_not_know(unit):
    done = deploy.run(deploy.tool("systemd-analyze"), "verify", "--man=no", unit)
    ours = [line for line in done.stderr.splitlines() if "core-dump" in line]
    assert (done.returncode, ours) == (0, [])
    unit.write_text(unit.read_text().replace("ProtectClock", "ProtectClocks"))
    assert "ProtectClocks" in deploy.run(deploy.tool("systemd-analyze"), "verify", "--man=no", unit).stderr


def test_unit_of_the_cgroup_says_nothing_that_systemd_does_not_know(tmp_path):
    path = tmp_path / CGROUP_UNIT.name
    path.write_text(CGROUP_UNIT.read_text().replace(f"/{PROGRAM}/core-dump-setup", "/bin/true"))
    done = deploy.run(deploy.tool("systemd-analyze"), "verify", "--man=no", path)
    ours = [line for line in done.stderr.splitlines() if "core-dump" in line]
    assert (done.returncode, ours) == (0, [])


def test_unit_is_exposed_as_little_as_the_page_says(unit):
    said = deploy.succeed(
        deploy.tool("systemd-analyze"), "security", "--offline=true", "--threshold=20", unit
    )
    assert "1.9 OK" in said
    assert "1.9" in (deploy.ROOT / "docs/amazon-linux.md").read_text()


def test_unit_stops_before_its_directory_is_unmounted_and_ends_its_workers_itself():
    lines = UNIT.read_text().splitlines()
    assert "RequiresMountsFor=/core_dumps" in lines
    assert "KillMode=mixed" in lines


def test_unit_gives_settings_that_the_collector_accepts_and_time_to_end():
    lines = [line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    given = [value.split() for key, value in lines if key == "Environment"]
    names = {pair.split("=")[0].lower() for words in given for pair in words} - {"watch_dir"}
    assert names <= set(Settings.model_fields)
    (stop,) = [float(value) for key, value in lines if key == "TimeoutStopSec"]
    assert stop >= Settings.model_fields["shutdown_seconds"].default + 20

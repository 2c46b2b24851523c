"""The Debian packages of the helper and of the collector, and the collector's RPM, in a root of their own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
from tests.deploy.test_package import BOOT_FILE, build, exists, inside  # noqa: F401
from tests.support import deploy

from core_dump_setup import location

SYSCTL = deploy.ROOT / "sysctl"
HELPER = "usr/libexec/core-dump-handler/core-dump-helper"


@pytest.fixture
def dpkg(inside, tmp_path):  # noqa: F811
    """Run dpkg in the copy-on-write root."""

    def run(*words, code=0):
        return inside("chroot", tmp_path / "root", "dpkg", *words, code=code)

    return run


@pytest.fixture
def deb(build, tmp_path):  # noqa: F811
    """Build a release of the helper's package; return its path inside the root."""

    def built(release):
        deploy.tool("dpkg-deb")
        deploy.succeed(SYSCTL / "rpm2deb.sh", build(release), tmp_path / "upper")
        return f"/core-dump-handler_0.1.0-{release}_all.deb"

    return built


def test_helpers_deb_installs_upgrades_keeps_edits_and_goes(inside, dpkg, deb, tmp_path):  # noqa: F811
    upper = tmp_path / "upper"
    assert "set at the next boot" in dpkg("-i", deb(1))
    assert (upper / BOOT_FILE).read_text() == (SYSCTL / "69-core-dump.conf").read_text()
    assert stat.S_IMODE((upper / "core_dumps").stat().st_mode) == 0o700
    assert "Version: 0.1.0-1" in dpkg("-s", "core-dump-handler")
    conf = upper / "etc/core-dump-handler/helper.conf"
    conf.write_text("LEVEL=3\n")
    dpkg("-i", deb(2))
    assert conf.read_text() == "LEVEL=3\n", "an upgrade asks nothing about what it did not change"
    assert 'RELEASE = "0.1.0-2"\n' in (upper / HELPER).read_text()
    assert exists(upper, BOOT_FILE), "an upgrade must not deactivate"
    wanted = upper / "etc/systemd/system/multi-user.target.wants/core-dump-collector.service"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.symlink_to("/usr/lib/systemd/system/core-dump-collector.service")
    setup = Path("/", HELPER).with_name("core-dump-setup")
    inside("chroot", tmp_path / "root", setup, "activate", "--watch-dir", "/data/cores")
    written = [location.DROP_IN, os.path.dirname(location.DROP_IN), location.TMPFILES]
    assert all(exists(upper, path[1:]) for path in written)
    said = dpkg("-r", "core-dump-handler")
    assert not any(exists(upper, path[1:]) for path in written)
    assert "what remains: the dumps in /core_dumps" in said
    assert not any(exists(upper, path) for path in (HELPER, BOOT_FILE))
    assert not wanted.is_symlink()
    assert conf.read_text() == "LEVEL=3\nWATCH_DIR=/data/cores\n"
    dpkg("-P", "core-dump-handler")
    assert not exists(upper, "etc/core-dump-handler/helper.conf")


def test_debs_scripts_refuse_what_the_rpms_refuse(deb, tmp_path):
    (tmp_path / "upper").mkdir()
    package = tmp_path / "upper" / deb(1)[1:]
    script = deploy.succeed("dpkg-deb", "-I", package, "preinst")
    assert script.startswith(
        "#!/bin/sh\ncase $1 in\ninstall) set -- 1 ;;\nupgrade) set -- 2 ;;\n*) exit 0 ;;\nesac\n"
    )
    specification = (SYSCTL / "core-dump-handler.spec").read_text()
    lines = [
        line for line in specification.partition("\n%pre\n")[2].partition("\n%post\n")[0].splitlines() if line
    ]
    assert [line.replace("%%", "%") for line in lines] == [
        line for line in script.partition("esac\n")[2].splitlines() if line
    ]
    needs = deploy.succeed("dpkg-deb", "-f", package, "Depends").strip()
    assert needs.replace(" ", "") == "python3,pigz"


def test_collectors_spec_and_unit_agree():
    specification = (SYSCTL / "core-dump-collector.spec").read_text()
    home = re.search(r"%attr\(-,root,root\) (\S+)", specification)[1]
    assert (
        f"ExecStart={home}/bin/core-dump-collector run"
        in (SYSCTL / "core-dump-collector.service").read_text()
    )
    version = re.search(r"^Version: (.*)$", specification, re.MULTILINE)[1]
    assert f"Version: {version}\n" in (SYSCTL / "core-dump-handler.spec").read_text()


@pytest.mark.skipif(os.environ.get("DEPLOY_TIER") != "dist", reason="looks at what `make dist` has built")
@pytest.mark.parametrize("kind", ["rpm", "deb"])
def test_collectors_package_brings_an_environment_that_runs_and_goes(inside, tmp_path, kind):  # noqa: F811
    (package,) = (deploy.ROOT / "dist").glob(f"core-dump-collector[-_]*.{kind}")
    shutil.copy(package, tmp_path / "upper" / package.name)
    root = tmp_path / "root"
    if kind == "rpm":
        inside("rpm", "--root", root, "--initdb")
        install, remove = ("rpm", "-i", "--nodeps"), ("rpm", "-e", "--nodeps")
    else:
        install, remove = ("dpkg", "--force-depends", "-i"), ("dpkg", "--force-depends", "-r")
    said = inside("chroot", root, *install, f"/{package.name}")
    assert "collector.env" in said
    program = "/opt/core-dump-handler/bin/core-dump-collector"
    assert "0.1.0" in inside("chroot", root, program, "--version")
    said = inside("chroot", root, "env", "BUCKET_NAME=B", program, "run", "/x", code=2)
    assert "BUCKET_NAME" in said
    said = inside("chroot", root, *remove, "core-dump-collector")
    assert "what remains" in said
    left = [path for path in (tmp_path / "upper/opt").rglob("*") if path.is_file() and not path.is_symlink()]
    assert left == []


@pytest.mark.skipif(os.environ.get("DEPLOY_TIER") != "dist", reason="looks at what `make dist` has built")
def test_collectors_package_holds_the_pinned_versions_and_nothing_else():
    (package,) = (deploy.ROOT / "dist").glob("core-dump-collector-*.rpm")
    names = deploy.succeed(deploy.tool("rpm"), "-qlp", package).splitlines()
    found = {re.sub(r".*/([^/]*)\.dist-info$", r"\1", name) for name in names if name.endswith(".dist-info")}
    pinned = (deploy.ROOT / "collector/requirements.txt").read_text()
    wanted = {f"{name}-{version}" for name, version in re.findall(r"^(\S+)==(\S+) ", pinned, re.MULTILINE)}
    canonical = {name.lower().replace("_", "-") for name in found}
    assert canonical == wanted | {"core-dump-handler-0.1.0"}
    assert sys.version_info[:2] != (3, 11) or any(name.endswith(".cpython-311.pyc") for name in names)

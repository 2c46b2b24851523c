"""What `make dist` has built is whole, lists what it holds, and is what this checkout says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zipfile

import pytest
from tests.support import deploy

from core_dump_helper import VERSION

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "dist", reason="looks at what `make dist` has built"
)
DIST = deploy.ROOT / "dist"
ARCH = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}[os.uname().machine]
NAMES = {
    f"core_dump_handler-{VERSION}-py3-none-any.whl",
    f"core_dump_handler-{VERSION}.tar.gz",
    f"core-dump-handler-{VERSION}-1.noarch.rpm",
    f"core-dump-handler_{VERSION}-1_all.deb",
    f"core-dump-collector-{VERSION}-1.{ARCH[0]}.rpm",
    f"core-dump-collector_{VERSION}-1_{ARCH[1]}.deb",
    f"core-dump-handler-{VERSION}.cdx.json",
}


def test_every_file_has_its_hash():
    lines = [line.split(maxsplit=1) for line in (DIST / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == NAMES == {path.name for path in DIST.iterdir()} - {"SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((DIST / name).read_bytes()).hexdigest() == digest


def test_bill_of_materials_names_every_pinned_package_with_its_hashes():
    content = json.loads((DIST / f"core-dump-handler-{VERSION}.cdx.json").read_text())
    assert (content["bomFormat"], content["metadata"]["component"]["name"]) == (
        "CycloneDX",
        "core-dump-handler",
    )
    pinned = re.findall(
        r"^(\S+)==(\S+) ", (deploy.ROOT / "collector/requirements.txt").read_text(), re.MULTILINE
    )
    found = {(part["name"], part["version"]) for part in content["components"]}
    assert found == set(pinned)
    assert all(
        reference.get("hashes") for part in content["components"] for reference in part["externalReferences"]
    )


def test_source_holds_what_git_holds_and_builds_the_packages():
    tracked = set(deploy.succeed("git", "-C", deploy.ROOT, "ls-files").split("\n")) - {""}
    with tarfile.open(DIST / f"core_dump_handler-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {"sysctl/install.sh", "helper/core-dump-helper", "pyproject.toml", "docs/core-dumps.1"} <= names
    assert names - {"PKG-INFO"} <= tracked


def test_packages_bring_the_manual_pages():
    wheel = zipfile.ZipFile(DIST / f"core_dump_handler-{VERSION}-py3-none-any.whl").namelist()
    files = deploy.succeed(deploy.tool("rpm"), "-qlp", DIST / f"core-dump-handler-{VERSION}-1.noarch.rpm")
    for page in ("man1/core-dumps.1", "man8/core-dump-collector.8"):
        assert any(name.endswith("/share/man/" + page) for name in wheel)
    for page in ("core-dump-helper", "core-dump-setup", "core-dump-collector"):
        assert f"/usr/share/man/man8/{page}.8" in files

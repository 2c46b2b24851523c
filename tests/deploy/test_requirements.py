"""What the image holds: pinned with hashes, and there as a wheel for both architectures."""

from __future__ import annotations

import os
import re
import sys
import tomllib

import pytest
from tests.support import deploy

REQUIREMENTS = deploy.ROOT / "collector/requirements.txt"
DOCKERFILE = deploy.ROOT / "collector/Dockerfile"


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    """Return the hashes of each requirement, by its name."""
    found = {}
    for block in re.split(r"\n(?=\S)", REQUIREMENTS.read_text()):
        if not block.startswith("#"):
            name, _, rest = block.partition("==")
            found[normal(name)] = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", rest)
    return found


def test_every_dependency_is_pinned_with_hashes():
    project = tomllib.loads((deploy.ROOT / "pyproject.toml").read_text())["project"]
    wanted = {normal(re.match(r"[\w.-]+", text)[0]) for text in project["dependencies"]}
    assert wanted <= set(pins())
    assert [name for name, hashes in pins().items() if not hashes] == []
    assert "--require-hashes" in DOCKERFILE.read_text()


@pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "image", reason="asks the package index: make test-image"
)
@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_every_requirement_has_a_wheel_with_a_known_hash_for(architecture, tmp_path):
    (python,) = re.findall(r"^ARG BASE=.*python:(3\.\d+)", DOCKERFILE.read_text(), re.MULTILINE)
    options = ["--only-binary=:all:", "--require-hashes", "--no-deps", "--python-version", python]
    for platform in ("manylinux2014", "manylinux_2_17", "manylinux_2_28"):
        options += ["--platform", f"{platform}_{architecture}"]
    given = deploy.succeed(
        sys.executable, "-m", "pip", "download", *options, "-d", tmp_path, "-r", REQUIREMENTS
    )
    assert given
    wheels = {normal(path.name.split("-")[0]): path.name for path in tmp_path.glob("*.whl")}
    assert set(wheels) == set(pins())
    assert architecture in wheels["isal"]
    assert architecture in wheels["pydantic-core"]

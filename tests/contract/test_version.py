"""The project has one version, which stands in the helper; everything else that names one agrees with it."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import core_dump_collector
import core_dumps
from core_dump_helper import VERSION

ROOT = Path(__file__).parents[2]


def test_all_programs_have_the_same_version():
    said = subprocess.check_output([sys.executable, "-IS", ROOT / "helper/core-dump-helper", "--version"])
    assert said.decode().split() == ["core-dump-helper", VERSION]
    assert version("core-dump-handler") == VERSION
    assert core_dump_collector.__version__ == core_dumps.version() == VERSION


def test_files_that_name_a_release_name_this_one():
    releases = {
        "sysctl/core-dump-handler.spec": r"^Version: (.+)$",
        "sysctl/core-dump-collector.spec": r"^Version: (.+)$",
        "kubernetes/base/daemonset.yaml": r"core-dump-collector:(\S+)",
        "kubernetes/overlays/configure-host/init.yaml": r"core-dump-collector:(\S+)",
        "tests/deploy/targets.mk": r"core-dump-collector:(\S+)",
        "charts/core-dump-handler/Chart.yaml": r"^(?:version|appVersion): (\S+)$",
    }
    for path, pattern in releases.items():
        found = re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE)
        assert set(found) == {VERSION}, path


def test_no_other_module_defines_the_version():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    folders = ("format", "helper", "collector", "cli")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if f'"{VERSION}"' in path.read_text()] == ["__init__.py"]

"""Runs what is installed on a host, from this checkout, and names the tools that a tier needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATTERN = Path("/proc/sys/kernel/core_pattern")
PATTERN_LIMIT = 127
PACKAGES = ("helper/core_dump_helper", "format/core_dump_format", "sysctl/core_dump_setup")
"""What a release holds on a host."""


def tool(name: str) -> str:
    """Return the path of a program, from this Python's environment or the system; else skip the test."""
    places = [
        Path(sys.executable).parent,
        ROOT / ".venv/checkov/bin",
        os.environ["PATH"],
        "/usr/sbin",
        "/sbin",
    ]
    found = shutil.which(name, path=os.pathsep.join(map(str, places)))
    if found is None:
        pytest.skip(f"{name} is not installed: make deploy-tools")
    return found


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it said; it gets no terminal."""
    texts = [str(word) for word in command]
    given: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "timeout": 110,
        "stdin": subprocess.DEVNULL,
    }
    return subprocess.run(texts, check=False, **(given | options))


def succeed(*command: object, **options: Any) -> str:
    """Run a program that must succeed; return its standard output."""
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def sysctl_values(path: Path) -> dict[str, str]:
    """Return the settings of a sysctl.d file."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#;"]
    return dict(line.split("=", 1) for line in lines)


def checkout(target: Path) -> Path:
    """Copy what install.sh needs, so that a test can change it."""
    for name in ("sysctl", "helper", "format", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def moved(target: Path, source: str, directory: str) -> Path:
    """Make a kustomization that moves the dumps of one of ours to another directory; return its folder."""
    shutil.copytree(ROOT / "kubernetes", target / "kubernetes")
    folder = target / "mine"
    folder.mkdir()
    named = {"name": "core-dump-directory", "annotations": {"config.kubernetes.io/local-config": "true"}}
    resource = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": {"path": directory}}
    (folder / "directory.yaml").write_text(json.dumps(resource))
    lists = {"resources": [f"../kubernetes/{source}", "directory.yaml"]}
    lists["components"] = ["../kubernetes/components/directory"]
    (folder / "kustomization.yaml").write_text(json.dumps(lists))
    return folder

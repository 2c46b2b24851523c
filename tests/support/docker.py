"""Runs a Docker daemon of its own, on a socket in a directory, without touching this machine's network."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import deploy
from tests.support.collector import wait_until

BASE = "base:test"
"""Debian with Python, from tests/deploy/roots.sh: no registry is asked."""
COLLECTOR = "core-dump-collector:test"


@dataclass(frozen=True)
class Docker:
    """A running daemon."""

    socket: Path

    def run(self, *arguments: object, **options: object) -> str:
        """Run a docker command that must succeed; return its output."""
        environ = os.environ | {"DOCKER_BUILDKIT": "0"}
        command = [deploy.tool("docker"), "-H", f"unix://{self.socket}", *arguments]
        done = deploy.run(*command, **({"env": environ, "timeout": 600} | options))
        assert done.returncode == 0, f"docker {arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


@contextlib.contextmanager
def daemon(directory: Path) -> Iterator[Docker]:
    """Run dockerd until the end of the block."""
    socket = directory / "docker.sock"
    options = ["--data-root", directory / "data", "--exec-root", directory / "exec", "-p", directory / "pid"]
    options += ["-H", f"unix://{socket}", "--bridge=none", "--iptables=false", "--ip-forward=false"]
    with (directory / "dockerd.log").open("wb") as log:
        # In mounts of its own: whatever it leaves mounted goes with it.
        command = [deploy.tool("unshare"), "--mount", deploy.tool("dockerd"), *map(str, options)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    docker = Docker(socket)
    try:
        ping = [deploy.tool("docker"), "-H", f"unix://{socket}", "version"]
        wait_until(lambda: deploy.run(*ping).returncode == 0, 60, "dockerd")
        yield docker
    finally:
        process.terminate()
        process.wait(60)
        for name in ("data", "exec"):
            shutil.rmtree(directory / name, ignore_errors=True)


@contextlib.contextmanager
def daemon_with_images(directory: Path) -> Iterator[Docker]:
    """Run dockerd with BASE, and COLLECTOR built on it, until the end of the block."""
    with daemon(directory) as engine:
        archive = directory / "base.tar"
        deploy.succeed("tar", "-C", deploy.ROOT / ".cache/python-root", "-cf", archive, ".")
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        engine.run("import", "--change", path, "--change", 'CMD ["sleep", "infinity"]', archive, BASE)
        archive.unlink()
        options = f"--network=none --build-arg BASE={BASE}"
        options += " --build-arg 'PIP_OPTIONS=--no-index --find-links=/wheels'"
        environ = os.environ | {"DOCKER_BUILDKIT": "0", "DOCKER_HOST": f"unix://{engine.socket}"}
        command = ["make", "-C", deploy.ROOT, "image", f"IMAGE={COLLECTOR}", f"IMAGE_OPTIONS={options}"]
        deploy.succeed(*command, env=environ, timeout=600)
        yield engine

"""The container image, built and run by a real Docker: a crash in one container, the collector in another."""

from __future__ import annotations

import json
import os
import shutil
import stat
import statistics
import tempfile
import time
from pathlib import Path

import pytest
from tests.support import collector, deploy, docker, kernel, s3

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "image", reason="builds an image with Docker: make test-image"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A Docker with the collector's image."""
    if not kernel.can_crash():
        pytest.skip("runs a Docker daemon, needs root: sudo make test-image")
    with docker.daemon_with_images(tmp_path_factory.mktemp("docker")) as engine:
        yield engine


@pytest.fixture
def node():
    """A watch directory with a helper that the kernel starts."""
    with tempfile.TemporaryDirectory(prefix="cdh-", dir="/var/tmp") as directory:
        watch_dir = Path(directory) / "w"
        watch_dir.mkdir(mode=0o700)
        pattern = kernel.install_helper(Path(directory), {"WATCH_DIR": watch_dir, "KEEP_FREE_PERCENT": 1})
        with kernel.core_pattern(pattern):
            yield watch_dir


def test_image_passes_hadolint():
    deploy.succeed(deploy.tool("hadolint"), deploy.ROOT / "collector/Dockerfile")


def sidecars(bucket):
    """Return the keys of the metadata objects."""
    return [key for key in s3.keys_in(bucket) if key.endswith(".gz.json")]


def test_crash_in_one_container_is_collected_by_another(engine, node, seaweed, bucket):
    data = f'"{engine.socket.parent}/data/containers'
    kernel.replace(node.parent / "core_dump_helper/runtime.py", '"/var/lib/docker/containers', data)
    environ = {"BUCKET_NAME": s3.BUCKET, "NODE_NAME": "node-1", "METRICS_PORT": "0", **seaweed.environ()}
    flags = [word for name, value in environ.items() for word in ("-e", f"{name}={value}")]
    hardened = ["--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    name = engine.run(
        "run", "-d", "--network=host", *hardened, *flags, "-v", f"{node}:/core_dumps", docker.COLLECTOR
    )
    try:
        crash = "sh -c 'kill -SEGV $$'; echo died of $?"
        claim = ["--label", "io.kubernetes.pod.name=ledger-0", "--label", "io.kubernetes.pod.namespace=bank"]
        usual = ["--rm", "--network=none", "--user=1234", "--name=shop", *claim]
        said = engine.run("run", *usual, docker.BASE, "sh", "-c", crash)
        assert said == "died of 139"
        collector.wait_until(lambda: sidecars(bucket), 60, "dump and sidecar")
        (key,) = sidecars(bucket)
        sidecar = json.loads(s3.body_of(bucket, key))
        assert (sidecar["image"], sidecar["container"]) == (docker.BASE, "shop")
        assert (sidecar["pod"], sidecar["identity_source"]) == ("ledger-0", "label"), "a claim is marked"
        assert "ledger" not in key
        assert (sidecar["state"], sidecar["uid"], sidecar["signal"]) == ("complete", 1234, 11)
        assert len(sidecar["container_id"]) == 64
        engine.run("stop", "-t", "30", name)
        assert engine.run("inspect", "-f", "{{.State.ExitCode}}", name) == "0"
        assert [path.name for path in node.iterdir() if path.name not in {".helper", ".modules"}] == []
    finally:
        engine.run("rm", "-f", name)


def test_container_ends_as_fast_with_modules_as_without(engine, node):
    """Docker cannot unmount the file system of a container while the helper has a file of it open."""
    (node / ".modules").mkdir(mode=0o700)
    (node / ".modules/collector").touch()
    crash = "python3 -c 'import os, ssl, sqlite3, ctypes; os.kill(os.getpid(), 11)'; true"
    ends = {"yes": [], "no": []}
    for number in range(12):
        modules = ("yes", "no")[number % 2]
        settings = {"WATCH_DIR": node, "KEEP_FREE_PERCENT": 1, "RATE_LIMIT": 0, "MODULES": modules}
        kernel.write_config(node.parent / "helper.conf", settings)
        (node / ".helper/modules").unlink(missing_ok=True)  # so that every file is copied again
        name = engine.run("run", "-d", "--network=none", docker.BASE, "sh", "-c", crash)
        collector.wait_until(lambda number=number: len(list(node.glob("core*"))) > number, 60, "the crash")
        crashed = time.monotonic()
        assert engine.run("wait", name) == "0"
        engine.run("rm", name)
        ends[modules].append(time.monotonic() - crashed)
        collector.wait_until(lambda: not list(node.rglob("*.partial")), 60, "the end of the copy")
    assert list((node / ".modules").glob("module-*"))
    assert statistics.median(ends["yes"]) < 1.25 * statistics.median(ends["no"]) + 0.25, ends


def test_image_needs_no_shell_and_runs_as_anybody(engine):
    said = engine.run(
        "run", "--rm", "--user=65534", "--read-only", "--network=none", docker.COLLECTOR, "--version"
    )
    assert said.startswith("core-dump-collector 0.")
    assert json.loads(engine.run("inspect", "-f", "{{json .Config.Entrypoint}}", docker.COLLECTOR)) == [
        "core-dump-collector"
    ]


@pytest.mark.parametrize(("way", "mode"), [("dd", 0o700), ("file", 0o1733)])
def test_bootstrap_container_makes_the_directory(engine, tmp_path, way, mode):
    options = ["--network=none", "--build-arg", f"BASE={docker.BASE}", "--build-arg", f"WAY={way}"]
    engine.run("build", *options, "-t", f"bootstrap:{way}", deploy.ROOT / "bottlerocket/bootstrap")
    (tmp_path / "var").mkdir()
    mount = ["-v", f"{tmp_path}:/.bottlerocket/rootfs"]
    said = engine.run("run", "--rm", "--network=none", *mount, f"bootstrap:{way}")
    assert said.endswith(f"is ready for {way}")
    assert stat.S_IMODE((tmp_path / "var/core_dumps").stat().st_mode) == mode


def test_configure_host_installs_on_the_host_and_restores(engine):
    program = Path("/usr/libexec/core-dump-handler/core-dump-helper")
    if program.exists() or Path("/core_dumps").exists():
        pytest.skip(f"{program} or /core_dumps exists: this machine uses what the test would install")
    # Less than the overlay's `privileged`, which asks for capabilities that a nested machine may not have.
    command = ["run", "--rm", "--network=none", "--cap-add=SYS_PTRACE", "-v", "/:/host", docker.COLLECTOR]
    command += ["configure-host", "/host"]
    with kernel.core_pattern("core"):
        try:
            assert "its dump arrived" in engine.run(*command)
            assert str(program) in deploy.PATTERN.read_text()
            engine.run(*command, "--restore")
            assert deploy.PATTERN.read_text() == "core\n"
            assert not program.exists()
        finally:
            deploy.run(deploy.ROOT / "sysctl/uninstall.sh", "--purge")
            shutil.rmtree("/core_dumps", ignore_errors=True)

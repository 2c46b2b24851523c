"""The pods of kubernetes/, run by containerd as the kubelet has it run them: a crash in one, the collector in another.

The requests are made from what kubectl renders, on a directory that stands for the node's root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from tests.support import containerd, deploy, docker, kernel, kubelet, s3
from tests.support.collector import running, wait_until

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "cri", reason="runs containerd in namespaces of its own: make test-cri"
)
FOLDER = deploy.ROOT / "kubernetes"
NODE = "ip-10-0-0-1.eu-central-1.compute.internal"
IMAGES = {  # what the specs name, and what stands for it here
    "registry.example.com/core-dump-collector:0.1.0": docker.COLLECTOR,
    "public.ecr.aws/docker/library/python:3.13-slim": docker.BASE,
    "registry.k8s.io/pause:3.9": docker.BASE,
}
APPLICATION_UID = 10001
CONFINED = {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2", "Uid": "0\t0\t0\t0"}
POD = "cart-7d4b9c-b5b5b"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An archive with the images of the specs."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.fail("pods would be connected to this machine's network: run by make test-cri")
    archive = tmp_path_factory.mktemp("images") / "images.tar"
    with docker.daemon_with_images(tmp_path_factory.mktemp("docker")) as engine:
        for name, stands in IMAGES.items():
            engine.run("tag", stands, name)
        engine.run("save", "-o", archive, *IMAGES)
    yield archive
    archive.unlink()


@contextlib.contextmanager
def running_runtime(images, **how):
    """Run a containerd with the images."""
    with (
        tempfile.TemporaryDirectory(prefix="cdh-", dir="/var/tmp", ignore_cleanup_errors=True) as directory,
        containerd.running(Path(directory), "registry.k8s.io/pause:3.9", **how) as runtime,
    ):
        runtime.load(images)
        yield runtime


@contextlib.contextmanager
def new_node(runtime):
    """Make a node without pods."""
    with (
        tempfile.TemporaryDirectory(prefix="cdh-", dir="/var/tmp") as directory,
        kubelet.node(runtime, Path(directory) / "root", NODE) as node,
    ):
        yield node


@pytest.fixture(scope="module")
def runtime(images):
    """A containerd with the images of the specs."""
    with running_runtime(images) as runtime:
        yield runtime


@pytest.fixture
def node(runtime):
    """A node without pods."""
    with new_node(runtime) as node:
        yield node


@pytest.fixture(scope="module")
def host_runtime(images):
    """A containerd in this machine's own PID namespace, which a pod with hostPID then sees."""
    with running_runtime(images, own_pids=False) as runtime:
        yield runtime


@pytest.fixture
def host_node(host_runtime):
    """A node without pods, whose processes are this machine's."""
    with new_node(host_runtime) as node:
        yield node


@pytest.fixture
def store(seaweed, bucket, tmp_path):
    """The S3 server's address and keys, for pods: they reach the node, not its loopback."""
    proxy = s3.Haproxy(tmp_path, seaweed.port, address="0.0.0.0")
    proxy.start()
    yield {**seaweed.environ(), "AWS_ENDPOINT_URL_S3": f"http://{containerd.GATEWAY}:{proxy.port}"}
    proxy.stop()


def render(folder):
    """Return the objects of a kustomization, by kind."""
    return {found["kind"]: found for found in render_all(folder)}


def render_all(folder):
    """Return the objects of a kustomization."""
    import yaml

    return list(yaml.safe_load_all(deploy.succeed(deploy.tool("kubectl"), "kustomize", folder)))


def collector_of(overlay, store, scratch, *components):
    """Return the pod spec and the config maps of an overlay whose user named bucket and store, as the page says."""
    mine = scratch / "my-nodes"
    mine.mkdir()
    settings = {"BUCKET_NAME": s3.BUCKET, "AWS_REGION": "us-east-1", **store}
    metadata = {"name": "core-dump-collector", "namespace": "core-dump-handler"}
    patch = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": settings}
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(FOLDER / "overlays" / overlay, mine.resolve())],
        "components": [os.path.relpath(FOLDER / "components" / name, mine.resolve()) for name in components],
        "patches": [{"patch": json.dumps(patch)}],
    }
    (mine / "kustomization.yaml").write_text(json.dumps(own))
    objects = render_all(mine)
    maps = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
    (daemon,) = [found for found in objects if found["kind"] == "DaemonSet"]
    return daemon["spec"]["template"]["spec"], maps


def probe(pod, name):
    """Ask a container's probe, as the kubelet does; say whether it is content."""
    container = pod.spec["containers"][0]
    asked = container[name]["httpGet"]
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == asked["port"]]
    try:
        with urllib.request.urlopen(f"http://{pod.address()}:{port}{asked['path']}", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        assert not pod.exited(container["name"]), pod.said(container["name"])
        return False


def status_of(pod, container):
    """Return what the kernel says of a container's first process."""
    (first, *_) = Path("/sys/fs/cgroup").glob(f"**/pod{pod.uid}/{pod.containers[container]}/cgroup.procs")
    lines = Path(f"/proc/{first.read_text().split()[0]}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def application():
    """Return a pod spec of two containers; a child of one crashes when told to."""
    spec = example()
    (container,) = spec["containers"]
    del container["volumeMounts"], spec["volumes"]
    return {**spec, "containers": [container, {**container, "name": "proxy", "command": ["sleep", "600"]}]}


def example():
    """Return the pod spec of kubernetes/example."""
    return render(FOLDER / "example")["Job"]["spec"]["template"]["spec"]


def collected(bucket):
    """Return the one dump's key and its sidecar, once it is in the bucket."""

    def dumps():
        return [key for key in s3.keys_in(bucket) if key.endswith(".gz")]

    wait_until(lambda: dumps() and f"{dumps()[0]}.json" in s3.keys_in(bucket), 60, "dump and sidecar")
    (key,) = dumps()
    return key, json.loads(s3.body_of(bucket, key + ".json"))


def install_helper(node, **settings):
    """Install a helper that knows where this containerd keeps its files; return watch directory and pattern."""
    watch_dir = node.root / "core_dumps"
    watch_dir.mkdir(mode=0o700)
    given = {"WATCH_DIR": watch_dir, "KEEP_FREE_PERCENT": 1, "RATE_LIMIT": 0} | settings
    pattern = kernel.install_helper(node.root.parent, given)
    state = f'"{node.runtime.directory}/state/io.containerd'
    module = node.root.parent / "core_dump_helper/runtime.py"
    kernel.replace(module, '"/run/containerd/io.containerd', state)
    return watch_dir, pattern


def test_dump_of_a_pod_is_in_the_bucket_under_the_pods_name(node, store, bucket, tmp_path):
    spec, config_maps = collector_of("amazon-linux", store, tmp_path)
    watch_dir, pattern = install_helper(node)
    with node.pod("core-dump-handler", "core-dump-collector-x2x9z", spec, config_maps) as pod:
        wait_until(lambda: probe(pod, "startupProbe"), 60, "start-up probe")
        with kernel.core_pattern(pattern), node.pod("shop", POD, application(), {}) as crashing:
            wait_until(lambda: crashing.exited("app"), 60, "the crash")
            assert (
                "exit status 139" in crashing.said("app").splitlines()
            )  # the shell's own line may come after
            key, sidecar = collected(bucket)
        assert probe(pod, "livenessProbe")
        assert status_of(pod, "collector").items() >= CONFINED.items()
        assert pod.stop("collector") == 0
    assert re.match(rf"dumps/[0-9-]{{10}}/shop/{POD}/{NODE}/core-", key)
    assert [sidecar[name] for name in ("namespace", "pod", "container")] == ["shop", POD, "app"]
    assert (sidecar["pod_uid"], sidecar["container_id"]) == (crashing.uid, crashing.containers["app"])
    assert (sidecar["state"], sidecar["uid"], sidecar["hostname"]) == (
        "complete",
        APPLICATION_UID,
        POD,
    )
    assert (sidecar["identity_source"], sidecar["image"]) == (
        "runtime",
        crashing.spec["containers"][0]["image"],
    )
    assert [path.name for path in watch_dir.iterdir() if path.name not in {".helper", ".modules"}] == []


def test_pod_that_is_deleted_while_the_store_is_down_is_named_by_its_dump(node, seaweed, bucket, tmp_path):
    watch_dir, pattern = install_helper(node)
    with kernel.core_pattern(pattern), node.pod("shop", POD, application(), {}) as crashing:
        wait_until(lambda: crashing.exited("app"), 60, "the crash")
    wait_until(lambda: list(watch_dir.glob("core*.gz")), 60, "the dump")
    environ = seaweed.environ() | {"POD_LOGS_DIRECTORY": str(node.root / "var/log/pods")}
    environ["KEY_TEMPLATE"] = "{namespace}/{pod}/{container}/{name}"
    with running(
        watch_dir, environ, tmp_path
    ):  # after the pod: neither runtime nor kubelet knows it any more
        key, sidecar = collected(bucket)
    assert key.startswith(f"shop/{POD}/app/core-")
    assert sidecar["identity_source"] == "runtime"
    assert sidecar["image"] == crashing.spec["containers"][0]["image"]


def test_pod_ends_as_fast_with_modules_as_without(node):
    watch_dir, pattern = install_helper(node)
    (watch_dir / ".modules").mkdir(mode=0o700)
    (watch_dir / ".modules/collector").touch()
    ends = {"yes": [], "no": []}
    with kernel.core_pattern(pattern):
        for number in range(12):
            modules = ("yes", "no")[number % 2]
            settings = {"WATCH_DIR": watch_dir, "KEEP_FREE_PERCENT": 1, "RATE_LIMIT": 0, "MODULES": modules}
            kernel.write_config(node.root.parent / "helper.conf", settings)
            (watch_dir / ".helper/modules").unlink(missing_ok=True)  # so that every file is copied again
            with node.pod("shop", f"cart-{number}", application(), {}) as pod:
                wait_until(partial(pod.exited, "app"), 60, "the crash")
                crashed = time.monotonic()
            ends[modules].append(time.monotonic() - crashed)
            wait_until(lambda: not list(watch_dir.rglob("*.partial")), 60, "the end of the copy")
    assert list((watch_dir / ".modules").glob("module-*"))
    assert statistics.median(ends["yes"]) < 1.25 * statistics.median(ends["no"]) + 0.25, ends


@pytest.mark.parametrize(("components", "watched"), [((), 0), (("kernel-log",), 1)])
def test_pod_reads_the_kernel_log_with_one_capability_and_says_so_without_it(
    node, store, tmp_path, components, watched
):
    spec, config_maps = collector_of("amazon-linux", store, tmp_path, *components)
    (node.root / "core_dumps").mkdir(mode=0o700)
    with node.pod("core-dump-handler", "core-dump-collector-x2x9z", spec, config_maps) as pod:
        wait_until(lambda: probe(pod, "startupProbe"), 60, "start-up probe")

        def samples():
            with urllib.request.urlopen(f"http://{pod.address()}:9412/metrics", timeout=5) as answer:
                return answer.read().decode()

        wait_until(lambda: f"core_dump_kernel_log_watched {watched}.0" in samples(), 15, "a look at the log")
        assert ("core_dump_kernel_dropped_total{" in samples()) is bool(watched), (
            "no zero that nobody has counted"
        )
        assert int(status_of(pod, "collector")["CapEff"], 16) == (1 << 34 if watched else 0), (
            "CAP_SYSLOG alone"
        )


def test_file_way_collects_what_the_kernel_writes_into_the_volume_of_a_pod(node, store, bucket, tmp_path):
    spec, config_maps = collector_of("bottlerocket-file", store, tmp_path)
    environ = {"CORE_DUMP_ROOT": str(node.root), "PATH": os.environ["PATH"]}
    deploy.succeed("sh", deploy.ROOT / "bottlerocket/bootstrap/prepare.sh", "file", env=environ)
    watch_dir = node.root / "var/core_dumps"
    with node.pod("core-dump-handler", "core-dump-collector-x2x9z", spec, config_maps) as pod:
        wait_until(lambda: probe(pod, "startupProbe"), 60, "start-up probe")
        with (
            kernel.core_pattern("/var/core_dumps/core-%e-%t-%P-%s"),
            node.pod("shop", "crashing-app-c4c4c", example(), {}) as crashing,
        ):
            wait_until(lambda: crashing.exited("app"), 60, "the crash")
            key, sidecar = collected(bucket)
        assert pod.stop("collector") == 0
    assert re.match(rf"dumps/[0-9-]{{10}}/{NODE}/core-sh-", key)
    assert sidecar["signal"] == 11
    assert stat.S_IMODE(watch_dir.stat().st_mode) == 0o1733
    assert list(watch_dir.glob("core*")) == []


def receiving(store, scratch):
    """Return the pod spec and the config maps of the overlay with the receiver, for a machine with a full disk."""
    spec, config_maps = collector_of("bottlerocket-socket", store, scratch)
    (name,) = [name for name in config_maps if name.startswith("core-dump-receiver-")]
    config_maps[name]["helper.conf"] += "KEEP_FREE_PERCENT=1\nRATE_LIMIT=0\n"
    return spec, config_maps


def wait_until_ready(pod):
    """Wait until both containers are started, as the kubelet does before it replaces the next pod."""
    wait_until(lambda: probe(pod, "startupProbe"), 60, "start-up probe")
    command = pod.spec["containers"][1]["startupProbe"]["exec"]["command"]
    assert command == ["test", "-e", "/run/receiver/ready"]

    def is_ready():
        assert not pod.exited("receiver"), pod.said("receiver")
        return (pod.volume("ready") / "ready").exists()

    wait_until(is_ready, 60, "the receiver")


def test_core_of_a_pod_is_sent_to_the_receiver_in_another_pod(host_node, store, bucket, tmp_path):
    spec, config_maps = receiving(store, tmp_path)
    pattern = f"@@{host_node.root}/var/core-dump-listener/kernel"
    with host_node.pod("core-dump-handler", "core-dump-collector-x2x9z", spec, config_maps) as pod:
        wait_until_ready(pod)
        with kernel.core_pattern(pattern), host_node.pod("shop", POD, application(), {}) as crashing:
            wait_until(lambda: crashing.exited("app"), 60, "the crash")
            key, sidecar = collected(bucket)
        status = status_of(pod, "receiver")
        allowed = sum(1 << number for number in (2, 19, 40))
        assert int(status["CapEff"], 16) == allowed, "DAC_READ_SEARCH, SYS_PTRACE, CHECKPOINT_RESTORE"
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert pod.stop("receiver") == 0, pod.said("receiver")
        assert pod.stop("collector") == 0
    assert re.match(rf"dumps/[0-9-]{{10}}/shop/{POD}/{NODE}/core-", key)
    assert [sidecar[name] for name in ("namespace", "pod", "container")] == ["shop", POD, "app"]
    assert (sidecar["state"], sidecar["uid"], sidecar["signal"]) == ("complete", APPLICATION_UID, 11)
    assert sidecar["compressor"] == "isal", "compressed at creation"
    assert sidecar["exe"]
    listener = host_node.root / "var/core-dump-listener"
    assert stat.S_IMODE(listener.stat().st_mode) == 0o700


def test_rolling_update_of_the_receiver_loses_no_crash(host_node, store, bucket, tmp_path):
    spec, config_maps = receiving(store, tmp_path)
    program = kernel.build(kernel.CRASHER, tmp_path / "crash", "-pthread")
    stop, crashed = threading.Event(), []

    def crash():
        while not stop.is_set():
            crashed.append(int(kernel.crash(program, 6, name=b"storm").stdout))

    with contextlib.ExitStack() as pods:

        def start(number):
            name = f"core-dump-collector-{number}"
            return host_node.pod("core-dump-handler", name, spec, config_maps)

        old = pods.enter_context(start(0))
        wait_until_ready(old)
        with kernel.core_pattern(f"@@{host_node.root}/var/core-dump-listener/kernel"):
            threads = [threading.Thread(target=crash) for _ in range(2)]
            for thread in threads:
                thread.start()
            for number in range(1, 4):
                new = pods.enter_context(start(number))
                wait_until_ready(new)
                assert old.stop("receiver") == 0
                assert old.stop("collector") == 0
                old = new
            stop.set()
            for thread in threads:
                thread.join()

        def kept():
            names = [key.rpartition("/")[2] for key in s3.keys_in(bucket) if key.endswith(".gz")]
            return {int(name.split("-")[3]) for name in names if name.startswith("core-storm-")}

        wait_until(lambda: set(crashed) <= kept(), 120, "every dump")
    assert len(crashed) > 20

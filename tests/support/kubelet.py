"""Does for a pod what the kubelet does: turns its spec into requests to the container runtime, on a node's root.

Whatever a spec holds that is not translated here is an error, so that no field is silently left out.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.containerd import Runtime

Spec = Mapping[str, Any]
POD_FIELDS = {"containers", "volumes", "securityContext", "hostPID"}
# What the API server, the scheduler and the kubelet's own loops do; probes and the grace period are the test's to use.
POD_FIELDS |= {"serviceAccountName", "automountServiceAccountToken", "priorityClassName", "nodeSelector"}
POD_FIELDS |= {"tolerations", "enableServiceLinks", "terminationGracePeriodSeconds", "restartPolicy"}
CONTAINER_FIELDS = {"name", "image", "command", "args", "env", "envFrom", "resources", "securityContext"}
CONTAINER_FIELDS |= {"volumeMounts", "ports", "imagePullPolicy"}
CONTAINER_FIELDS |= {"startupProbe", "livenessProbe", "readinessProbe"}
PROPAGATION = {"None": "PROPAGATION_PRIVATE", "HostToContainer": "PROPAGATION_HOST_TO_CONTAINER"}
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
MASKED = ["/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/timer_list", "/sys/firmware"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def known(given: Spec, fields: set[str]) -> Spec:
    """Return what was given, if every field of it is translated."""
    assert set(given) <= fields, f"not translated: {set(given) - fields}"
    return given


@dataclass
class Pod:
    """A pod on the node."""

    runtime: Runtime
    root: Path
    namespace: str
    name: str
    spec: Spec
    config_maps: Mapping[str, Mapping[str, str]]
    node_name: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sandbox: str = ""
    containers: dict[str, str] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """Return the directory that the kubelet makes for the pod's logs."""
        return self.root / "var/log/pods" / f"{self.namespace}_{self.name}_{self.uid}"

    def sandbox_config(self) -> Spec:
        """Return the request's part that describes the whole pod."""
        context = {"namespace_options": self.namespaces(), "seccomp": {"profile_type": "RuntimeDefault"}}
        return {
            "metadata": {"name": self.name, "namespace": self.namespace, "uid": self.uid},
            "hostname": self.name,
            "log_directory": str(self.logs),
            "labels": {
                "io.kubernetes.pod.name": self.name,
                "io.kubernetes.pod.namespace": self.namespace,
                "io.kubernetes.pod.uid": self.uid,
            },
            "linux": {"cgroup_parent": f"/kubepods/burstable/pod{self.uid}", "security_context": context},
        }

    def namespaces(self) -> Spec:
        """Return which processes the pod sees."""
        return {"pid": "NODE" if self.spec.get("hostPID") else "CONTAINER"}

    def start(self) -> None:
        """Start the pod and its containers."""
        known(self.spec, POD_FIELDS)
        self.logs.mkdir(parents=True)
        self.sandbox = self.runtime.call("RunPodSandbox", config=self.sandbox_config()).pod_sandbox_id
        for container in self.spec["containers"]:
            (self.logs / container["name"]).mkdir()
            created = self.runtime.call(
                "CreateContainer",
                pod_sandbox_id=self.sandbox,
                config=self.container_config(container),
                sandbox_config=self.sandbox_config(),
            )
            self.containers[container["name"]] = created.container_id
            self.runtime.call("StartContainer", container_id=created.container_id)
            self.link_log(container["name"])

    def link_log(self, container: str) -> None:
        """Make the link that the kubelet makes for log readers."""
        directory = self.root / "var/log/containers"
        directory.mkdir(parents=True, exist_ok=True)
        link = directory / f"{self.name}_{self.namespace}_{container}-{self.containers[container]}.log"
        link.symlink_to(f"/var/log/pods/{self.logs.name}/{container}/0.log")

    def container_config(self, container: Spec) -> Spec:
        """Return the request's part that describes one container."""
        known(container, CONTAINER_FIELDS)
        return {
            "metadata": {"name": container["name"]},
            "image": {"image": container["image"]},
            "command": container.get("command", []),
            "args": container.get("args", []),
            "envs": [{"key": key, "value": value} for key, value in self.environment(container).items()],
            "mounts": [self.mount(mount) for mount in container.get("volumeMounts", [])],
            "log_path": f"{container['name']}/0.log",
            "linux": {
                "resources": resources(container.get("resources", {})),
                "security_context": {
                    **security(self.spec.get("securityContext", {}), container["securityContext"]),
                    "namespace_options": self.namespaces(),
                },
            },
        }

    def environment(self, container: Spec) -> dict[str, str]:
        """Return a container's variables: of its config maps, then its own."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self.config_maps[known(source, {"configMapRef"})["configMapRef"]["name"]]
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
                found[variable["name"]] = self.node_name
            else:
                found[variable["name"]] = variable["value"]
        return found

    def mount(self, mount: Spec) -> Spec:
        """Return a mount of one of the pod's volumes."""
        known(mount, {"name", "mountPath", "readOnly", "mountPropagation", "subPath"})
        (volume,) = [volume for volume in self.spec["volumes"] if volume["name"] == mount["name"]]
        if "hostPath" in volume:
            known(volume["hostPath"], {"path", "type"})
            path = self.root / volume["hostPath"]["path"].lstrip("/")
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True, mode=0o755)
            assert path.is_dir(), f"hostPath {path}"
        else:
            path = self.volume(volume["name"])
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
            if "configMap" in volume:
                path.chmod(0o755)
                for name, content in self.config_maps[volume["configMap"]["name"]].items():
                    (path / name).write_text(content)
            else:
                assert "emptyDir" in volume
        return {
            "container_path": mount["mountPath"],
            "host_path": str(path / mount.get("subPath", "")),
            "readonly": mount.get("readOnly", False),
            "propagation": PROPAGATION[mount.get("mountPropagation", "None")],
        }

    def volume(self, name: str) -> Path:
        """Return where the kubelet keeps one of the pod's own volumes."""
        return self.root / "var/lib/kubelet/pods" / self.uid / "volumes" / name

    def address(self) -> str:
        """Return the pod's IP address."""
        return str(self.runtime.call("PodSandboxStatus", pod_sandbox_id=self.sandbox).status.network.ip)

    def status(self, container: str) -> Any:
        """Return a container's status."""
        return self.runtime.call("ContainerStatus", container_id=self.containers[container]).status

    def exited(self, container: str) -> bool:
        """Say whether a container has ended."""
        return bool(self.status(container).state == 2)

    def said(self, container: str) -> str:
        """Return what a container wrote."""
        lines = (self.logs / container / "0.log").read_text().splitlines()
        return "\n".join(line.split(" ", 3)[3] for line in lines)  # after time, stream and a mark

    def stop(self, container: str) -> int:
        """End a container as a deleted pod's is ended; return its exit code."""
        seconds = self.spec["terminationGracePeriodSeconds"]
        self.runtime.call("StopContainer", container_id=self.containers[container], timeout=seconds)
        return int(self.status(container).exit_code)

    def remove(self) -> None:
        """Take the pod off the node."""
        if self.sandbox:
            self.runtime.call("StopPodSandbox", pod_sandbox_id=self.sandbox)
            self.runtime.call("RemovePodSandbox", pod_sandbox_id=self.sandbox)


def resources(given: Spec) -> Spec:
    """Translate requests and limits."""
    known(given, {"requests", "limits"})
    requests, limits = given.get("requests", {}), given.get("limits", {})
    known(requests, {"cpu", "memory", "ephemeral-storage"})
    known(limits, {"memory", "ephemeral-storage"})
    cpu, memory = requests.get("cpu", "2m"), limits.get("memory", "0Mi")
    return {
        "cpu_shares": int(cpu.removesuffix("m")) * 1024 // 1000,
        "memory_limit_in_bytes": int(memory[:-2]) * UNITS[memory[-2:]],
    }


def security(pod: Spec, container: Spec) -> Spec:
    """Translate the security context of a container and its pod."""
    known(pod, {"runAsUser", "runAsGroup", "runAsNonRoot", "seccompProfile"})
    known(container, {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities", "seLinuxOptions"})
    known(container.get("seLinuxOptions", {}), {"level"})  # there is no SELinux here
    capabilities = known(container["capabilities"], {"add", "drop"})
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not (pod.get("runAsNonRoot") and pod["runAsUser"] == 0)
    return {
        "capabilities": {
            "add_capabilities": capabilities.get("add", []),
            "drop_capabilities": capabilities.get("drop", []),
        },
        "run_as_user": {"value": pod["runAsUser"]},
        "run_as_group": {"value": pod["runAsGroup"]},
        "readonly_rootfs": container["readOnlyRootFilesystem"],
        "no_new_privs": not container["allowPrivilegeEscalation"],
        "masked_paths": MASKED,
        "readonly_paths": READ_ONLY,
        "seccomp": {"profile_type": "RuntimeDefault"},
    }


def remove_cgroups(pods: list[Pod]) -> None:
    """Remove what is left of the pods' cgroups, and their parents where they are empty."""
    parents = []
    for top in [*Path("/sys/fs/cgroup").glob("*/kubepods"), Path("/sys/fs/cgroup/kubepods")]:
        for pod in pods:
            directory = top / "burstable" / f"pod{pod.uid}"
            parents += [*directory.glob("*"), directory]
        parents += [top / "burstable", top]
    for directory in parents:
        if directory.is_dir():
            with contextlib.suppress(OSError):  # not empty: somebody else's
                directory.rmdir()


@dataclass
class Node:
    """A directory that stands for a node's root, and a runtime to start pods with."""

    runtime: Runtime
    root: Path
    name: str
    pods: list[Pod] = field(default_factory=list)

    @contextlib.contextmanager
    def pod(self, namespace: str, name: str, spec: Spec, config_maps: Mapping[str, Any]) -> Iterator[Pod]:
        """Run a pod until the end of the block."""
        pod = Pod(self.runtime, self.root, namespace, name, spec, config_maps, self.name)
        self.pods.append(pod)
        try:
            pod.start()
            yield pod
        finally:
            pod.remove()


@contextlib.contextmanager
def node(runtime: Runtime, root: Path, name: str) -> Iterator[Node]:
    """Make a node's root for a block."""
    (root / "var/log/pods").mkdir(parents=True)
    given = Node(runtime, root, name)
    try:
        yield given
    finally:
        remove_cgroups(given.pods)
        shutil.rmtree(root, ignore_errors=True)

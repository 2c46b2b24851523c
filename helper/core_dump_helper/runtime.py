"""Owns the identity of the container that crashed, from the container runtime's file: pod, container and image.

The runtime's file is found by the container's ID alone, which the cgroup proves. It is read while the process is held,
because a runtime removes it with the container, and parsed once the process is released.
"""

from __future__ import annotations

import os

from core_dump_helper.system import is_private, read_all

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from typing import Any

MAX_FILE_BYTES = 1 << 20
"""A pod's specification has at most 1.5 MiB in etcd; usual files have 10 to 50 KiB."""
MAX_VALUE_BYTES = 253
"""A pod's name has no more: RFC 1123 subdomain."""
MAX_IMAGE_BYTES = 300
CONTAINERD, CRIO, DOCKER = "containerd", "cri-o", "docker"
FILES = (
    (CONTAINERD, "/run/containerd/io.containerd.runtime.v2.task/k8s.io/%s/config.json"),
    (CONTAINERD, "/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/%s/config.json"),
    (CRIO, "/run/containers/storage/overlay-containers/%s/userdata/config.json"),
    (CRIO, "/var/lib/containers/storage/overlay-containers/%s/userdata/config.json"),
    (DOCKER, "/var/lib/docker/containers/%s/config.v2.json"),
)
"""The runtimes' files about a container, at their default paths."""
ANNOTATIONS = {
    CONTAINERD: {
        "namespace": "io.kubernetes.cri.sandbox-namespace",
        "pod": "io.kubernetes.cri.sandbox-name",
        "container": "io.kubernetes.cri.container-name",
        "image": "io.kubernetes.cri.image-name",
    },
    CRIO: {
        "namespace": "io.kubernetes.pod.namespace",
        "pod": "io.kubernetes.pod.name",
        "container": "io.kubernetes.container.name",
        "image": "io.kubernetes.cri-o.ImageName",
        "reference": "io.kubernetes.cri-o.ImageRef",
    },
}
"""containerd: pkg/cri/annotations; CRI-O: pkg/annotations."""
KUBERNETES_LABELS = {
    "namespace": "io.kubernetes.pod.namespace",
    "pod": "io.kubernetes.pod.name",
    "container": "io.kubernetes.container.name",
}
ECS_LABELS = {
    "namespace": "com.amazonaws.ecs.cluster",
    "pod": "com.amazonaws.ecs.task-arn",
    "container": "com.amazonaws.ecs.container-name",
}
"""Amazon ECS Developer Guide, "container metadata"; the last part of a task's ARN is its ID."""
DIGEST = "sha256:"
PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


class RuntimeFile:
    """The file of a container runtime about one container."""

    def __init__(self, kind: str, content: bytes) -> None:
        """Store the runtime and its file."""
        self.kind, self.content = kind, content


def read_runtime_file(container_id: bytes) -> RuntimeFile | None:
    """Return the file of the container with this ID; None if no known runtime has one."""
    for kind, pattern in FILES:
        try:
            content = _read(pattern % container_id.decode("ascii"))
        except OSError:
            continue
        if content:
            return RuntimeFile(kind, content)
    return None


def _read(path: str) -> bytes:
    """Read a whole file that only root can change; return nothing for a longer or another one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not is_private(status) or status.st_size > MAX_FILE_BYTES:
            return b""
        content = read_all(descriptor, MAX_FILE_BYTES + 1)
        return content if len(content) <= MAX_FILE_BYTES else b""
    finally:
        os.close(descriptor)


def identify(file: RuntimeFile) -> dict[str, bytes]:
    """Return the attributes that identify the container; raises ValueError if the file is not JSON."""
    import json

    try:
        document = json.loads(file.content.decode("utf-8", "replace"))
        if not isinstance(document, dict):
            return {}
        found = _of_docker(document) if file.kind == DOCKER else _of_annotations(file.kind, document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return {name: value.encode("ascii") for name, value in found.items()}


def _of_annotations(kind: str, document: dict[str, Any]) -> dict[str, str]:
    """Return the attributes in the annotations of an OCI configuration (opencontainers/runtime-spec, config.md)."""
    names = ANNOTATIONS[kind]
    annotations = document.get("annotations")
    found = _pick(annotations, names)
    image = _text(annotations, names["image"])
    reference = _text(annotations, names.get("reference", ""))
    found.update(_image(image, reference))
    return _with_source(found, "runtime")


def _of_docker(document: dict[str, Any]) -> dict[str, str]:
    """Return the attributes in Docker's file; a label may come from the image: it is a claim of the image's author."""
    config = document.get("Config")
    labels = config.get("Labels") if isinstance(config, dict) else None
    found = _pick(labels, ECS_LABELS) or _pick(labels, KUBERNETES_LABELS)
    source = "label" if found else "runtime"
    if "container" not in found:
        found.update(_pick({"name": _text(document, "Name").lstrip("/")}, {"container": "name"}))
    manifest = _text(document.get("ImageManifest"), "digest")
    found.update(_image(_text(config, "Image"), manifest))
    return _with_source(found, source)


def _with_source(found: dict[str, str], source: str) -> dict[str, str]:
    return {"identity_source": source, **found} if found else {}


def _pick(values: object, names: dict[str, str]) -> dict[str, str]:
    """Return namespace, pod and container if they are there and have the form of a name."""
    found = {}
    for name in ("namespace", "pod", "container"):
        value = _text(values, names.get(name, "")).rpartition("/")[2]
        if value and len(value) <= MAX_VALUE_BYTES and not set(value) - PLAIN and value[0] not in "._-":
            found[name] = value
    return found


def _image(image: str, reference: str) -> dict[str, str]:
    """Return the image's name, and the digest if one of both texts ends in it."""
    found = {}
    if (
        image
        and len(image) <= MAX_IMAGE_BYTES
        and image.isascii()
        and image.isprintable()
        and " " not in image
    ):
        found["image"] = image
    for text in (reference, image):
        digits = text.rpartition(DIGEST)[2]
        is_digest = text == DIGEST + digits or text.endswith("@" + DIGEST + digits)
        if is_digest and len(digits) == 64 and not set(digits) - set("0123456789abcdef"):
            found["image_digest"] = DIGEST + digits
            break
    return found


def _text(values: object, name: str) -> str:
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""

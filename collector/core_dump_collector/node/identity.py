"""Owns keeping a pod's name with its dump: looked up when the dump arrives, because an outage may outlive the pod."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from core_dump_collector.node import kubernetes
from core_dump_collector.node.dumpfile import open_regular
from core_dump_collector.node.ownership import is_trusted
from core_dump_format.attributes import ATTRIBUTE_PREFIX, read_attributes

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAMES = ("pod_uid", "container_id", "namespace", "pod", "container", "identity_source")


def find(
    attributes: Mapping[str, str | int], pod_logs_directory: str | None
) -> kubernetes.PodIdentity | None:
    """Return the pod of a dump; None if it is not known.

    The container runtime's answer at the crash takes precedence over the kubelet's directories. A label may come from
    the author of the image, so it is not used for a key.
    """
    if attributes.get("identity_source") in {"runtime", "logs"} and {"namespace", "pod"} <= attributes.keys():
        container = attributes.get("container")
        names = str(attributes["namespace"]), str(attributes["pod"])
        return kubernetes.PodIdentity(*names, None if container is None else str(container))
    if pod_logs_directory is None or "pod_uid" not in attributes:
        return None
    container_id = str(attributes.get("container_id", ""))
    return kubernetes.identify(str(attributes["pod_uid"]), container_id, pod_logs_directory)


def describe(pod: kubernetes.PodIdentity) -> dict[str, str]:
    """Return the attributes for a pod from the kubelet's directories."""
    found = {"namespace": pod.namespace, "pod": pod.pod, "identity_source": "logs"}
    return found | ({"container": pod.container} if pod.container else {})


def keep(directory: str, name: str, pod_logs_directory: str) -> None:
    """Set the attributes of a dump's pod, unless they are set or the kubelet no longer knows the pod.

    Raises:
        OSError: the directory or the dump cannot be read; a dump that is gone is no error.
    """
    with contextlib.ExitStack() as stack:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, parent)
        opened = open_regular(parent, name)
        if opened is None:
            return
        file, status = opened
        stack.callback(os.close, file)
        if not is_trusted(status):
            return
        attributes = read_attributes(_raw(file))
        if "pod_uid" not in attributes or attributes.get("identity_source") in {"runtime", "logs"}:
            return
        pod = find(attributes, pod_logs_directory)
        if pod is not None:
            for attribute, value in describe(pod).items():
                os.setxattr(file, ATTRIBUTE_PREFIX + attribute, value.encode())


def _raw(file: int) -> dict[str, bytes]:
    found = {}
    for name in _NAMES:
        with contextlib.suppress(OSError):  # it has no such attribute, or the file system has none
            found[name] = os.getxattr(file, ATTRIBUTE_PREFIX + name)
    return found

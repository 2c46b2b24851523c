"""Owns finding the name of a dump's pod from its cgroup, without the API server.

The kubelet keeps a directory `NAMESPACE_POD_UID` for each pod, with one for each container in it, and beside them, in
`../containers`, a link `POD_NAMESPACE_CONTAINER-ID.log` for each container (kubernetes/kubernetes, pkg/kubelet/
kuberuntime: BuildPodLogsDirectory in helpers.go, logSymlink in legacy.go). Only names are read, no link is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

_UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}")
"""A UUID, or the hash that the kubelet makes for a static pod."""
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """The pod, and the container if known, in which a process ran."""

    namespace: str
    pod: str
    container: str | None


def identify(pod_uid: str, container_id: str, pod_logs_directory: str) -> PodIdentity | None:
    """Return the pod with this UID, and its container if it can be told; None if the pod is not known.

    The directory of a deleted pod is gone. Nothing is raised: the dump is uploaded without its pod's name.
    """
    if not _UID.fullmatch(pod_uid):
        return None
    for name in _names(pod_logs_directory):
        match name.split("_"):  # the names of Kubernetes hold no underscore
            case [namespace, pod, uid] if uid == pod_uid:
                if not (_LABEL.fullmatch(namespace) and _SUBDOMAIN.fullmatch(pod)):
                    return None
                container = _by_id(f"{pod}_{namespace}_", container_id, pod_logs_directory)
                return PodIdentity(namespace, pod, container or _only_one(pod_logs_directory, name))
    return None


def _by_id(prefix: str, container_id: str, pod_logs_directory: str) -> str | None:
    """Return the container that is named by the kubelet's link with this ID."""
    if not _CONTAINER_ID.fullmatch(container_id):
        return None
    suffix = f"-{container_id}.log"
    for name in _names(os.path.join(os.path.dirname(pod_logs_directory.rstrip("/")), "containers")):
        if name.startswith(prefix) and name.endswith(suffix):
            container = name[len(prefix) : -len(suffix)]
            return container if _LABEL.fullmatch(container) else None
    return None


def _only_one(pod_logs_directory: str, pod: str) -> str | None:
    """Return the container of a pod that has only one."""
    names = _names(pod_logs_directory, pod)
    return names[0] if len(names) == 1 and _LABEL.fullmatch(names[0]) else None


def _names(path: str, below: str = "") -> list[str]:
    """Return the names in a directory, or in one below it; none if it is a link or cannot be read."""
    try:
        with contextlib.ExitStack() as stack:
            descriptor = os.open(path, _DIRECTORY)
            stack.callback(os.close, descriptor)
            if below:
                descriptor = os.open(below, _DIRECTORY, dir_fd=descriptor)
                stack.callback(os.close, descriptor)
            return os.listdir(descriptor)
    except OSError:
        return []

"""Owns what the cgroup of a process proves: its container, its pod, and the origin whose share of the limits it uses.

A cgroup's path is trusted only as far as root alone creates its directories. Users create their own below
/user.slice, and services below their units, under any name: identities of others too.
"""

from __future__ import annotations

HEX = b"0123456789abcdef"
DELETED = b" (deleted)"
QOS = (b"burstable", b"besteffort")
RUNTIMES = (b"cri-containerd-", b"crio-", b"docker-", b"libpod-", b"nerdctl-")
RUNTIME_SERVICES = (
    *(b"containerd.service", b"docker.service", b"crio.service", b"kubelet.service"),
    *(b"k3s.service", b"k3s-agent.service", b"rke2-server.service", b"rke2-agent.service"),
)
"""Root's services that create containers below their own cgroup when the drivers of kubelet and runtime differ."""
UNIT_SUFFIXES = (b".service", b".scope", b".socket", b".mount", b".swap")
MAX_ORIGIN_BYTES = 200


def container_id(name: bytes) -> bytes:
    """Return the 64 hex digits of `ID`, `RUNTIME-ID` or `RUNTIME-ID.scope`, or nothing for any other name."""
    if name.endswith(b".scope"):
        name = name[: -len(b".scope")]
    for runtime in RUNTIMES:
        if name.startswith(runtime):
            name = name[len(runtime) :]
            break
    return name if len(name) == 64 and not name.strip(HEX) else b""


def pod_uid(name: bytes) -> bytes:
    """Return the UID in `podUID`, or nothing for any other name.

    It is a UUID, whose dashes the systemd driver replaces by `_`; a static pod has 32 hex digits.
    """
    if not name.startswith(b"pod"):
        return b""
    uid = name[len(b"pod") :].replace(b"_", b"-")
    lengths = [len(word) for word in uid.split(b"-")]
    return uid if lengths in ([8, 4, 4, 4, 12], [32]) and not uid.strip(HEX + b"-") else b""


def split_path(path: bytes) -> list[bytes]:
    """Return the names on a cgroup's path in the form of the cgroupfs driver.

    systemd repeats the parents in the name of a slice (systemd.slice(5)): `a.slice/a-b.slice` becomes `a/b`. A runtime
    without the systemd driver below a kubelet with it creates `a-b.slice:cri-containerd:ID`, which becomes `a/b/ID`.
    """
    names: list[bytes] = []
    for part in path.replace(b".slice:cri-containerd:", b".slice/cri-containerd-").split(b"/")[1:]:
        if not part.endswith(b".slice"):
            names.append(part)
            continue
        parents, dash, pod = part[: -len(b".slice")].partition(b"-pod")
        words = parents.split(b"-") + ([b"pod" + pod] if dash else [])
        names.extend(words[len(names) :] if words[: len(names)] == names else words)
    return names


def identify(path: bytes) -> dict[str, bytes]:
    """Return the container and the pod that a path proves, as far as it proves them."""
    names = split_path(path)
    if names[:1] == [b"system"] and names[1:2] and names[1] in RUNTIME_SERVICES:
        names = names[2:]
    if names[:2] == [b"kubelet", b"kubepods"]:  # kubelet --cgroup-root=/kubelet, as kind has it
        names = names[1:]
    top, found = names[0] if names else b"", {}
    if top == b"kubepods":
        names = names[2:] if names[1:2] and names[1] in QOS else names[1:]
        found["pod_uid"] = pod_uid(names[0]) if names else b""
        names = names[1:] if found["pod_uid"] else []
    elif top in (b"ecs", b"ecstasks"):
        names = names[2:]
    elif top in (b"docker", b"system", b"machine", b"libpod_parent"):
        names = names[1:]
    else:
        names = []
    found["container_id"] = container_id(names[0]) if names else b""
    return {name: value for name, value in found.items() if value}


def parse_cgroup(text: bytes) -> dict[str, bytes]:
    """Return `cgroup`, `container_id` and `pod_uid` from /proc/PID/cgroup: cgroups(7).

    Of several hierarchies, the one that proves a container counts; otherwise version 2, otherwise the longest path.
    """
    lines = [line.split(b":", 2) for line in text.split(b"\n") if line.count(b":") > 1]
    paths = [path[: -len(DELETED)] if path.endswith(DELETED) else path for _, _, path in lines]
    unified = [path for path, line in zip(paths, lines) if line[0] == b"0" and path != b"/"]  # noqa: B905 - 3.10
    for path in unified + paths:
        found = identify(path)
        if found:
            found["cgroup"] = path
            return found
    return {"cgroup": unified[0] if unified else max(paths, key=len, default=b"")}


def unit_of(path: bytes) -> bytes:
    """Return the systemd unit on a path, or nothing; all instances of a template are one unit.

    Whoever connects to a socket can start any number of instances.
    """
    for part in path.split(b"/")[1:]:
        if part.endswith(UNIT_SUFFIXES):
            name, _, suffix = part.rpartition(b".")
            template, at, _ = name.partition(b"@")
            return template + at + b"." + suffix
        if not part.endswith(b".slice"):
            break
    return b""


def origin_of(metadata: dict[str, bytes]) -> bytes:
    """Return who pays for a crash: its container, otherwise its systemd unit, otherwise its user.

    Below /user.slice it is the user of the slice, who can have processes with many uids there (subuid(5)) and can
    create units; root's slice also holds the processes of other users whom root started. All processes whose cgroup
    could not be read are one origin: a container has 65,536 users, and must not get a share for each.
    """
    for name, label in (("container_id", b"container:"), ("pod_uid", b"pod:")):
        if metadata.get(name):
            return label + metadata[name]
    user, path = metadata.get("uid", b""), metadata.get("cgroup")
    if path is None:
        return b"unknown"
    if path.startswith(b"/user.slice/user-"):
        owner = path[len(b"/user.slice/user-") :].partition(b".slice")[0]
        return b"user:" + (owner if owner.isdigit() and owner != b"0" else user)
    unit = unit_of(path)
    return (b"unit:" + unit if unit else b"user:" + user)[:MAX_ORIGIN_BYTES]

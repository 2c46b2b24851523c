"""Which container, pod and origin a cgroup proves. The forms are those of the programs named beside them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_helper.cgroup import origin_of, parse_cgroup

CONTAINER = "0123456789abcdef" * 4
INNER = "f" * 64
POD = "0a1b2c3d-1111-2222-3333-444455556666"
UNDERSCORED = POD.replace("-", "_")
STATIC = "0123456789abcdef" * 2
BURSTABLE = "/kubepods.slice/kubepods-burstable.slice"
KUBELET = "/kubelet.slice/kubelet-kubepods.slice"
DELEGATED = "/user.slice/user-1000.slice/user@1000.service"
HYBRID = "12:pids:{path}\n11:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/system.slice/containerd.service"
RUNTIME = "/system.slice/containerd.service"

FORMS = {
    "kubelet cgroupfs, guaranteed": (f"/kubepods/pod{POD}/{CONTAINER}", POD),
    "kubelet cgroupfs, burstable": (f"/kubepods/burstable/pod{POD}/{CONTAINER}", POD),
    "kubelet cgroupfs, best effort": (f"/kubepods/besteffort/pod{POD}/{CONTAINER}", POD),
    "kubelet cgroupfs, CRI-O": (f"/kubepods/burstable/pod{POD}/crio-{CONTAINER}", POD),
    "kubelet cgroupfs, static pod": (f"/kubepods/burstable/pod{STATIC}/{CONTAINER}", STATIC),
    "kubelet systemd, guaranteed": (
        f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/cri-containerd-{CONTAINER}.scope", POD),
    "kubelet systemd, containerd": (
        f"{BURSTABLE}/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-{CONTAINER}.scope", POD),
    "kubelet systemd, CRI-O": (
        f"{BURSTABLE}/kubepods-burstable-pod{UNDERSCORED}.slice/crio-{CONTAINER}.scope/container", POD),
    "kubelet systemd, Docker": (
        f"{BURSTABLE}/kubepods-burstable-pod{UNDERSCORED}.slice/docker-{CONTAINER}.scope", POD),
    "kubelet systemd, static pod": (
        f"{BURSTABLE}/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{CONTAINER}.scope", STATIC),
    "kubelet systemd, runtime cgroupfs": (
        f"{RUNTIME}/kubepods-burstable-pod{UNDERSCORED}.slice:cri-containerd:{CONTAINER}", POD),
    "the same, at the root": (f"/kubepods-pod{UNDERSCORED}.slice:cri-containerd:{CONTAINER}", POD),
    "the same, UID with dashes": (f"/kubepods-besteffort-pod{POD}.slice:cri-containerd:{CONTAINER}", POD),
    "kind": (
        f"{KUBELET}/kubelet-kubepods-pod{UNDERSCORED}.slice/cri-containerd-{CONTAINER}.scope", POD),
    "kind, cgroupfs": (f"/kubelet/kubepods/burstable/pod{POD}/{CONTAINER}", POD),
    "Docker cgroupfs": (f"/docker/{CONTAINER}", None),
    "Docker systemd": (f"/system.slice/docker-{CONTAINER}.scope", None),
    "Docker in Docker": (f"/docker/{CONTAINER}/docker/{INNER}", None),
    "a container with systemd inside": (f"/system.slice/docker-{CONTAINER}.scope/init/docker-{INNER}.scope", None),
    "a container that imitates a pod": (f"/docker/{CONTAINER}/kubepods/pod{POD}/{INNER}", None),
    "Podman as root": (f"/machine.slice/libpod-{CONTAINER}.scope/container", None),
    "ECS, version 1": (f"/ecs/{STATIC}/{CONTAINER}", None),
    "ECS, long task id": (f"/ecs/{POD}/{CONTAINER}", None),
    "ECS, version 2": (f"/ecstasks.slice/ecstasks-{STATIC}.slice/docker-{CONTAINER}.scope", None),
    "a cgroup that is gone": (f"/docker/{CONTAINER} (deleted)", None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text", ["0::{path}", "4:memory:{path}\n3:cpu:/\n0::/", HYBRID], ids=["v2", "v1", "hybrid"]
)
def test_container_and_pod_are_read_where_root_alone_creates_cgroups(form, text):
    path, pod = FORMS[form]
    found = parse_cgroup(text.format(path=path).encode())
    expected = {"cgroup": path.removesuffix(" (deleted)"), "container_id": CONTAINER}
    expected |= {"pod_uid": pod} if pod else {}
    assert {name: value.decode() for name, value in found.items()} == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "below",
    [
        DELEGATED,
        f"{DELEGATED}/app.slice/app-evil.scope",
        "/user.slice/user-1000.slice/session-2.scope",
        "/system.slice/web.service",
        "/system.slice/system-web.slice/web@1.service",
        "/machine.slice/machine-guest.scope/payload",
        "/lxc.payload.guest",
        "/podman",
    ],
)
def test_identity_is_not_read_where_others_create_cgroups(form, below):
    path = below + FORMS[form][0]
    found = parse_cgroup(f"1:name=systemd:{path}\n0::{path}".encode())
    assert found == {"cgroup": path.removesuffix(" (deleted)").encode()}


@pytest.mark.parametrize(
    "path",
    [
        f"/docker/{CONTAINER[:-1]}",
        f"/docker/{CONTAINER}0",
        f"/docker/{CONTAINER.upper()}",
        f"/docker/x/{CONTAINER}",
        f"/kubepods/{CONTAINER}",
        f"/kubepods/burstable/x/{CONTAINER}",
        f"/kubepods/pod{POD[:-1]}/{CONTAINER}",
        "/podcast/pod-1",
        "/user.slice/user-0.slice",
        "/system.slice/containerd.service",
        "/",
        "",
    ],
)
def test_other_paths_prove_nothing(path):
    assert set(parse_cgroup(f"0::{path}".encode())) == {"cgroup"}


def test_process_of_the_pod_outside_its_containers_has_the_pod_alone():
    conmon = f"{BURSTABLE}/kubepods-burstable-pod{UNDERSCORED}.slice/crio-conmon-{CONTAINER}.scope"
    assert parse_cgroup(f"0::{conmon}".encode()) == {"cgroup": conmon.encode(), "pod_uid": POD.encode()}


@given(st.binary())
def test_any_cgroup_text_is_survived(text):
    found = parse_cgroup(text)
    assert len(found.get("container_id", bytes(64))) == 64
    assert len(found.get("pod_uid", bytes(36))) in (32, 36)


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({"container_id": CONTAINER, "pod_uid": POD, "uid": "0"}, f"container:{CONTAINER}"),
        ({"pod_uid": POD, "uid": "0"}, f"pod:{POD}"),
        ({"cgroup": "/system.slice/web.service", "uid": "33"}, "unit:web.service"),
        ({"cgroup": "/system.slice/web.service/worker/7", "uid": "33"}, "unit:web.service"),
        ({"cgroup": "/apps.slice/apps-eu.slice/web.service", "uid": "33"}, "unit:web.service"),
        ({"cgroup": "/system.slice/system-sshd.slice/sshd@7-10.0.0.1:22-10.0.0.9:5.service"}, "unit:sshd@.service"),
        ({"cgroup": "/machine.slice/machine-guest.scope/payload/system.slice/web.service"},
         "unit:machine-guest.scope"),
        ({"cgroup": f"{DELEGATED}/app.slice/run-1.scope", "uid": "1000"}, "user:1000"),
        ({"cgroup": f"{DELEGATED}/app.slice/run-2.scope", "uid": "165536"}, "user:1000"),
        ({"cgroup": "/user.slice/user-1000.slice/session-9.scope", "uid": "0"}, "user:1000"),
        ({"cgroup": "/user.slice/user-0.slice/session-1.scope", "uid": "1000"}, "user:1000"),
        ({"cgroup": "/user.slice/user-0.slice/session-1.scope", "uid": "0"}, "user:0"),
        ({"cgroup": "/", "uid": "1000"}, "user:1000"),
        ({"cgroup": "/lxc/guest", "uid": "1000"}, "user:1000"),
        ({"uid": "1000"}, "unknown"),
        ({"cgroup": "/"}, "user:"),
    ],
)  # fmt: skip
def test_origin_is_the_container_else_the_unit_else_the_user(metadata, origin):
    assert origin_of({name: value.encode() for name, value in metadata.items()}).decode() == origin

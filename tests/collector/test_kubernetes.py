"""Names of the kubelet's log directories, as its own source makes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector.node.kubernetes import PodIdentity, identify

UID = "5f0c1f0e-3c1b-4d55-9a2e-0123456789ab"
CONTAINER_ID = "ab" * 32


@pytest.fixture
def logs(tmp_path):
    """A node's /var/log/pods and /var/log/containers."""
    for name in ("pods", "containers"):
        (tmp_path / name).mkdir()
    return tmp_path / "pods"


def add_pod(logs, *containers, namespace="shop", pod="cart-7d4b9c-x2x9q", uid=UID):
    for container, container_id in containers:
        directory = logs / f"{namespace}_{pod}_{uid}" / container
        directory.mkdir(parents=True)
        (directory / "0.log").touch()
        link = logs.parent / "containers" / f"{pod}_{namespace}_{container}-{container_id}.log"
        link.symlink_to(directory / "0.log")


def test_container_is_found_by_its_id_among_several(logs):
    add_pod(logs, ("proxy", "cd" * 32), ("app", CONTAINER_ID))
    assert identify(UID, CONTAINER_ID, str(logs)) == PodIdentity("shop", "cart-7d4b9c-x2x9q", "app")


def test_container_with_dashes_is_not_cut(logs):
    add_pod(logs, ("a-b-c", CONTAINER_ID), ("a", "cd" * 32))
    assert identify(UID, CONTAINER_ID, str(logs)).container == "a-b-c"


def test_only_container_needs_no_id(logs):
    add_pod(logs, ("app", "cd" * 32))
    assert identify(UID, "", str(logs)) == PodIdentity("shop", "cart-7d4b9c-x2x9q", "app")


def test_container_stays_unknown_rather_than_guessed(logs):
    add_pod(logs, ("app", "cd" * 32), ("proxy", "ef" * 32))
    assert identify(UID, CONTAINER_ID, str(logs)).container is None


def test_pod_is_named_without_the_containers_directory(logs):
    add_pod(logs, ("app", CONTAINER_ID))
    for link in (logs.parent / "containers").iterdir():
        link.unlink()
    (logs.parent / "containers").rmdir()
    assert identify(UID, CONTAINER_ID, str(logs) + "/").pod == "cart-7d4b9c-x2x9q"


def test_other_pod_is_not_taken(logs):
    add_pod(logs, ("app", CONTAINER_ID), uid="5f0c1f0e-3c1b-4d55-9a2e-0123456789ac")
    assert identify(UID, CONTAINER_ID, str(logs)) is None


@pytest.mark.parametrize(
    "name", [f"Shop_cart_{UID}", f"shop_car t_{UID}", f"shop_cart_x_{UID}", f"_cart_{UID}"]
)
def test_name_that_kubernetes_cannot_have_is_not_believed(logs, name):
    (logs / name).mkdir()
    assert identify(UID, CONTAINER_ID, str(logs)) is None


def test_link_in_place_of_a_directory_is_not_followed(logs, tmp_path):
    (tmp_path / "elsewhere" / "secret").mkdir(parents=True)
    (logs / f"shop_cart_{UID}").symlink_to(tmp_path / "elsewhere")
    assert identify(UID, "", str(logs)) == PodIdentity("shop", "cart", None)


def test_missing_directory_costs_only_the_name(tmp_path):
    assert identify(UID, CONTAINER_ID, str(tmp_path / "none")) is None


@given(st.text(max_size=60), st.text(max_size=70))
def test_hostile_ids_are_not_looked_up(uid, container_id):
    assert identify(uid, container_id, "/var/log/pods") is None

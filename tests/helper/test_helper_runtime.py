"""The container that crashed, as containerd, CRI-O and Docker name it; nothing else in their files is believed."""

import json
import os

import pytest

from core_dump_format.attributes import ATTRIBUTE_PREFIX, read_attributes
from core_dump_helper import dumpfile, runtime

CONTAINER = b"ab" * 32
DIGEST = "sha256:" + "cd" * 32
CRI = "io.kubernetes.cri."
KUBE = "io.kubernetes."
ECS = "com.amazonaws.ecs."


def said(kind, document):
    return {
        name: value.decode()
        for name, value in runtime.identify(runtime.RuntimeFile(kind, json.dumps(document).encode())).items()
    }


def test_annotations_of_containerd_name_pod_and_image():
    annotations = {
        CRI + "sandbox-namespace": "shop",
        CRI + "sandbox-name": "cart-7d4b9c-b5b5b",
        CRI + "container-name": "app",
        CRI + "image-name": "registry.example/cart@" + DIGEST,
    }
    assert said(runtime.CONTAINERD, {"annotations": annotations}) == {
        "namespace": "shop",
        "pod": "cart-7d4b9c-b5b5b",
        "container": "app",
        "image": "registry.example/cart@" + DIGEST,
        "image_digest": DIGEST,
        "identity_source": "runtime",
    }


def test_annotations_of_crio_name_pod_image_and_digest():
    annotations = {
        KUBE + "pod.namespace": "shop",
        KUBE + "pod.name": "cart-0",
        KUBE + "container.name": "app",
        KUBE + "cri-o.ImageName": "quay.io/cart:2",
        KUBE + "cri-o.ImageRef": "quay.io/cart@" + DIGEST,
    }
    found = said(runtime.CRIO, {"annotations": annotations})
    assert (found["image"], found["image_digest"]) == ("quay.io/cart:2", DIGEST)
    assert (found["namespace"], found["pod"], found["identity_source"]) == ("shop", "cart-0", "runtime")


def test_docker_label_is_a_claim_and_marked_so():
    labels = {
        ECS + "cluster": "prod",
        ECS + "task-arn": "arn:aws:ecs:eu-west-1:1:task/prod/0123abc",
        ECS + "container-name": "web",
    }
    config = {"Image": "cart:2", "Labels": labels}
    found = said(
        runtime.DOCKER, {"Name": "/ecs-web-1", "Config": config, "ImageManifest": {"digest": DIGEST}}
    )
    assert found == {
        "namespace": "prod",
        "pod": "0123abc",
        "container": "web",
        "image": "cart:2",
        "image_digest": DIGEST,
        "identity_source": "label",
    }


def test_name_of_a_docker_container_is_the_runtimes_own():
    found = said(runtime.DOCKER, {"Name": "/cart", "Config": {"Image": DIGEST, "Labels": None}})
    assert found == {
        "container": "cart",
        "image": DIGEST,
        "image_digest": DIGEST,
        "identity_source": "runtime",
    }


@pytest.mark.parametrize("kind", [runtime.CONTAINERD, runtime.CRIO, runtime.DOCKER])
@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"annotations": []},
        {"Config": 1, "Name": 7},
        {"Config": {"Labels": {"x": "y"}, "Image": {}}},
    ],
)
def test_file_of_another_form_says_nothing(kind, document):
    assert said(kind, document) == {}


@pytest.mark.parametrize("name", ["", "..", "a/..", "a b", "a\nb", "é", "x" * 254, "-x", "a\0"])
def test_what_has_not_the_form_of_a_name_is_not_taken(name):
    annotations = {CRI + "sandbox-name": name, CRI + "image-name": name + " \n"}
    assert said(runtime.CONTAINERD, {"annotations": annotations}) == {}


def test_nested_file_costs_nothing():
    with pytest.raises(ValueError, match="nested"):
        runtime.identify(runtime.RuntimeFile(runtime.DOCKER, b"[" * 1_000_000))
    with pytest.raises(ValueError, match="Expecting value"):
        runtime.identify(runtime.RuntimeFile(runtime.DOCKER, b"\xff"))


def test_every_value_is_one_that_the_collector_reads(tmp_path):
    longest = {
        CRI + "sandbox-namespace": "n" * 253,
        CRI + "sandbox-name": "p" * 253,
        CRI + "container-name": "c" * 253,
        CRI + "image-name": "i" * 300,
    }
    for annotations in (
        longest,
        {**longest, CRI + "sandbox-namespace": "shop", CRI + "container-name": "app"},
    ):
        found = runtime.identify(
            runtime.RuntimeFile(runtime.CONTAINERD, json.dumps({"annotations": annotations}).encode())
        )
        raw = {ATTRIBUTE_PREFIX + name: value for name, value in found.items()}
        assert set(read_attributes(raw)) == set(found)
    with (tmp_path / "dump").open("wb") as dump:
        assert dumpfile.set_attributes(dump.fileno(), found, dumpfile.IDENTITY_SPACE)
        assert os.getxattr(dump.fileno(), ATTRIBUTE_PREFIX + "image") == b"i" * 300


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "FILES", ((runtime.DOCKER, f"{tmp_path}/%s/config.v2.json"),))
    path = tmp_path / CONTAINER.decode() / "config.v2.json"
    path.parent.mkdir()
    path.write_text("{}")
    return path


def test_file_is_found_by_the_containers_id(files):
    assert runtime.read_runtime_file(CONTAINER).content == b"{}"
    assert runtime.read_runtime_file(b"cd" * 32) is None


def others_write(path):
    path.chmod(0o666)


def too_long(path):
    path.write_bytes(bytes(runtime.MAX_FILE_BYTES + 1))


def link(path):
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("fault", [others_write, too_long, link, pipe])
def test_file_that_is_not_the_runtimes_own_is_not_read(files, fault):
    fault(files)
    assert runtime.read_runtime_file(CONTAINER) is None

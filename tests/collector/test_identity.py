"""Whose pod a dump is of: the runtime's word first, then the kubelet's directories, kept with the dump on arrival."""

import json
import os

import pytest
from tests.collector.test_kubernetes import CONTAINER_ID, UID, add_pod
from tests.support.uploads import options

from core_dump_collector import metadata
from core_dump_collector.metadata import StoredObject
from core_dump_collector.node import identity
from core_dump_collector.node.dumpfile import DumpFile
from core_dump_format.attributes import ATTRIBUTE_PREFIX

NAME = "core-app-1700000000-42-11.gz"
CGROUP = {"pod_uid": UID, "container_id": CONTAINER_ID}
RUNTIME = {"namespace": "shop", "pod": "cart-0", "container": "app", "identity_source": "runtime"}
LABEL = {**RUNTIME, "namespace": "bank", "container": "other", "image": "cart:2", "identity_source": "label"}
LOGS = {
    "namespace": "shop",
    "pod": "cart-7d4b9c-x2x9q",
    "container": "app",
    "identity_source": "logs",
}


@pytest.fixture
def logs(tmp_path):
    """A node's /var/log/pods and /var/log/containers."""
    for name in ("pods", "containers"):
        (tmp_path / name).mkdir()
    return tmp_path / "pods"


@pytest.fixture
def dump(watch_dir):
    """Return a function that makes a dump with these attributes."""

    def make(**attributes):
        path = watch_dir / NAME
        path.write_bytes(b"dump")
        path.chmod(0o600)
        for name, value in attributes.items():
            os.setxattr(path, ATTRIBUTE_PREFIX + name, value.encode())
        return path

    return make


def attributes(path):
    found = {
        name.removeprefix(ATTRIBUTE_PREFIX): os.getxattr(path, name).decode() for name in os.listxattr(path)
    }
    return {name: value for name, value in found.items() if name in LOGS or name == "image"}


def described(watch_dir, logs):
    """Return the key's fields and the metadata object of the dump."""
    with DumpFile(str(watch_dir), NAME) as file:
        facts = metadata.gather(file, file.attributes(), options(pod_logs_directory=logs and str(logs)))
    document = json.loads(metadata.render(facts, StoredObject("k", 1, 2), "dumps"))
    fields = facts.key_fields()
    return [fields[name] for name in ("namespace", "pod", "container")], document


def test_pod_is_kept_with_the_dump_that_arrives_and_outlives_its_directories(dump, watch_dir, logs):
    path = dump(**CGROUP)
    add_pod(logs, ("app", CONTAINER_ID))
    identity.keep(str(watch_dir), NAME, str(logs))
    assert attributes(path) == LOGS
    for directory in (logs, logs.parent / "containers"):
        directory.rename(directory.with_name("gone-" + directory.name))
    names, document = described(watch_dir, logs)
    assert names == ["shop", "cart-7d4b9c-x2x9q", "app"]
    assert document.items() >= LOGS.items()


def test_word_of_the_runtime_counts_before_the_kubelets_directories(dump, watch_dir, logs):
    path = dump(**CGROUP, **RUNTIME)
    add_pod(logs, ("app", CONTAINER_ID))
    identity.keep(str(watch_dir), NAME, str(logs))
    assert attributes(path) == RUNTIME
    names, document = described(watch_dir, logs)
    assert names == ["shop", "cart-0", "app"]
    assert document.items() >= RUNTIME.items()


def test_label_makes_no_key_and_is_marked(dump, watch_dir):
    dump(**LABEL)
    names, document = described(watch_dir, None)
    assert names == [None, None, None]
    assert document.items() >= LABEL.items()


def test_kubelets_directories_count_before_a_label(dump, watch_dir, logs):
    dump(**CGROUP, **LABEL)
    add_pod(logs, ("app", CONTAINER_ID))
    names, document = described(watch_dir, logs)
    assert names == ["shop", "cart-7d4b9c-x2x9q", "app"]
    assert document.items() >= LOGS.items()
    assert document["image"] == "cart:2"


def test_dump_of_another_user_is_neither_believed_nor_touched(dump, watch_dir, logs):
    path = dump(**CGROUP)
    add_pod(logs, ("app", CONTAINER_ID))
    path.chmod(0o666)
    identity.keep(str(watch_dir), NAME, str(logs))
    assert attributes(path) == {}


def test_dump_that_is_gone_or_no_file_is_no_error(watch_dir, logs):
    identity.keep(str(watch_dir), NAME, str(logs))
    (watch_dir / NAME).symlink_to("/etc/passwd")
    identity.keep(str(watch_dir), NAME, str(logs))
    (watch_dir / NAME).unlink()
    os.mkfifo(watch_dir / NAME)
    identity.keep(str(watch_dir), NAME, str(logs))


def test_damaged_attributes_are_no_identity(dump, watch_dir, logs):
    dump(
        namespace="../x",
        pod="a/b",
        container="\x1b[2J",
        identity_source="root",
        image="a b",
        image_digest="x",
    )
    names, document = described(watch_dir, logs)
    assert names == [None, None, None]
    assert not {"namespace", "pod", "container", "identity_source", "image", "image_digest"} & document.keys()

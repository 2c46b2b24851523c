"""The Helm chart renders what kustomize renders, refuses wrong values, and rolls out a changed setting."""

from __future__ import annotations

import copy
import json
import re

import pytest
from tests.support import deploy

CHART = deploy.ROOT / "charts/core-dump-handler"
NODES = ["amazon-linux", "configure-host", "bottlerocket-socket", "bottlerocket-dd", "bottlerocket-file"]
LEAST = {
    "bucket": "my-core-dumps",
    "region": "eu-central-1",
    "roleArn": "arn:aws:iam::111122223333:role/core-dump-collector",
}
RENDER = """
import json, sys
from helm_python import chart, errors
found = []
for values in json.load(sys.stdin):
    with chart.Chart.load(sys.argv[1]) as loaded:
        try:
            found.append(loaded.render(values=values, name="dumps", namespace="core-dump-handler"))
        except errors.HelmValuesError as error:
            found.append(str(error))
json.dump(found, sys.stdout)
"""


def helm(script, **options):
    """Run a script with Helm's library on the chart; return what it prints."""
    python = deploy.ROOT / ".venv/helm/bin/python"
    if not python.exists():
        pytest.skip("Helm is not installed: make deploy-tools")
    return deploy.succeed(python, "-c", script, CHART, **options)


def templates(*values):
    """Return the rendered text of each template, or the error, once for each set of values."""
    return json.loads(helm(RENDER, input=json.dumps(values), stdin=None))


def render(*values):
    """Render the chart once for each set of values; return objects by kind and name, or the error."""
    yaml = pytest.importorskip("yaml")
    found = []
    for files in templates(*values):
        if isinstance(files, str):
            found.append(files)
            continue
        texts = [text for name, text in files.items() if name.endswith(".yaml")]
        found.append([document for text in texts for document in yaml.safe_load_all(text) if document])
    return found


def by_name(documents):
    """Return the objects by kind and name; volumes have no order."""
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    for document in found.values():
        if document["kind"] == "DaemonSet":
            document["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
            for container in document["spec"]["template"]["spec"]["containers"]:
                container["volumeMounts"].sort(key=lambda mount: mount["name"])
    return found


def kustomized(folder):
    return kustomized_by(deploy.ROOT / "kubernetes" / folder)


def kustomized_by(folder):
    yaml = pytest.importorskip("yaml")
    text = deploy.succeed(deploy.tool("kubectl"), "kustomize", folder)
    # kustomize names the settings by their content; the chart has an annotation for that.
    text = re.sub(r"(core-dump-(collector|receiver))-[a-z0-9]{10}\b", r"\1", text)
    found = by_name(yaml.safe_load_all(text))
    del found["Namespace", "core-dump-handler"]  # helm install --create-namespace
    return found


def pod_of(found):
    return found["DaemonSet", "core-dump-collector"]["spec"]["template"]


def test_chart_renders_what_each_overlay_of_kustomize_renders():
    for nodes, documents in zip(NODES, render(*({**LEAST, "nodes": nodes} for nodes in NODES)), strict=True):
        found = by_name(documents)
        assert len(pod_of(found)["metadata"].pop("annotations")) == 1
        assert found == kustomized(f"overlays/{nodes}"), nodes


def test_options_are_what_the_components_of_kustomize_make():
    yaml = pytest.importorskip("yaml")
    plain, optional = render(LEAST, {**LEAST, "kernelLog": True, "podMonitor": True})
    found = by_name(optional)
    monitor = found.pop(("PodMonitor", "core-dump-collector"))
    component = deploy.ROOT / "kubernetes/components/podmonitor/podmonitor.yaml"
    assert monitor["spec"] == yaml.safe_load(component.read_text())["spec"]
    expected = copy.deepcopy(by_name(plain))
    pod_of(expected)["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["SYSLOG"]
    assert found == expected


def test_directory_moves_the_dumps_as_the_component_of_kustomize_does(tmp_path):
    nodes = ["amazon-linux", "configure-host"]
    moved = render(*({**LEAST, "nodes": name, "directory": "/data/core_dumps"} for name in nodes))
    for name, documents in zip(nodes, moved, strict=True):
        found = by_name(documents)
        del pod_of(found)["metadata"]["annotations"]
        assert found == kustomized_by(deploy.moved(tmp_path / name, f"overlays/{name}", "/data/core_dumps"))


def test_changed_setting_rolls_out_and_an_unchanged_one_does_not():
    first, same, other = render(
        LEAST, LEAST, {**LEAST, "settings": {"SHUTDOWN_SECONDS": "200", "FINGERPRINT": "false"}}
    )
    pods = [pod_of(by_name(documents)) for documents in (first, same, other)]
    assert pods[0] == pods[1]
    assert pods[0]["metadata"] != pods[2]["metadata"]
    assert pods[2]["spec"]["terminationGracePeriodSeconds"] == 230
    data = by_name(other)["ConfigMap", "core-dump-collector"]["data"]
    assert (data["SHUTDOWN_SECONDS"], data["FINGERPRINT"]) == ("200", "false")


def test_mixed_fleet_is_two_releases_that_share_no_name():
    linux, bottlerocket = render(
        {**LEAST, "nodeSelector": {"os": "linux"}},
        {
            **LEAST,
            "nodes": "bottlerocket-socket",
            "fullnameOverride": "core-dumps-bottlerocket",
            "nodeSelector": {"os": "bottlerocket"},
            "priorityClass": {"create": False},
        },
    )
    assert not by_name(linux).keys() & by_name(bottlerocket).keys()
    (daemon,) = [document for document in bottlerocket if document["kind"] == "DaemonSet"]
    spec = daemon["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "os": "bottlerocket"}
    assert daemon["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": "core-dumps-bottlerocket"}


def test_rendered_objects_are_what_kubernetes_takes(tmp_path):
    yaml = pytest.importorskip("yaml")
    for nodes, documents in zip(NODES, render(*({**LEAST, "nodes": nodes} for nodes in NODES)), strict=True):
        path = tmp_path / f"{nodes}.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        deploy.succeed(deploy.tool("kubernetes-validate"), "--strict", "-k", "1.30", path)


WRONG = [
    ({"bucket": ""}, "/bucket"),
    ({"bucket": "My_Bucket"}, "/bucket"),
    ({"region": "Frankfurt"}, "/region"),
    ({"nodes": "bottlerocket"}, "/nodes"),
    ({"roleArn": "core-dump-collector"}, "/roleArn"),
    ({"keyTemplate": "dumps/{node}"}, "/keyTemplate"),
    ({"settings": {"WORKERS": 4}}, "/settings/WORKERS"),
    ({"settings": {"SHUTDOWN_SECONDS": "2m"}}, "/settings/SHUTDOWN_SECONDS"),
    ({"settings": {"BUCKET_NAME": "other"}}, "'BUCKET_NAME'"),
    ({"image": {"digest": "latest"}}, "/image/digest"),
    ({"image": {"registry": "x"}}, "registry"),
    ({"networkPolicy": {"ports": ["443"]}}, "/networkPolicy/ports/0"),
    ({"nodes": "bottlerocket-file", "kernelLog": True}, "/kernelLog"),
    ({"directory": "core_dumps"}, "/directory"),
    ({"nodes": "bottlerocket-dd", "directory": "/data/dumps"}, "/directory"),
    ({"nodes": "bottlerocket-socket", "helper": {"RATE_LIMIT": 5}}, "/helper/RATE_LIMIT"),
    ({"helper": {"WATCH_DIR": "/x"}}, "WATCH_DIR"),
    ({"buckett": "x"}, "buckett"),
]


def test_wrong_values_are_refused_with_the_place_of_the_mistake():
    for (values, place), error in zip(WRONG, render(*(LEAST | values for values, _ in WRONG)), strict=True):
        assert isinstance(error, str), values
        assert place in error, values


LINT = """
import json, sys
from helm_python import chart
print(json.dumps(chart.lint(sys.argv[1], values=json.loads(sys.argv[2]), strict=True), default=str))
"""


def test_notes_say_what_is_left_to_do_on_the_nodes():
    wanted = {
        "amazon-linux": "Install the helper on each node",
        "configure-host": "It stays when the release goes",
        "bottlerocket-socket": "Give each node the settings of bottlerocket/socket.toml",
        "bottlerocket-dd": "Give each node the settings of bottlerocket/dd.toml",
        "bottlerocket-file": "Give each node the settings of bottlerocket/file.toml",
    }
    assert list(wanted) == NODES
    rendered = templates(*({**LEAST, "nodes": nodes, "bucket": "b-1"} for nodes in NODES))
    for (nodes, said), files in zip(wanted.items(), rendered, strict=True):
        (notes,) = [text for name, text in files.items() if name.endswith("NOTES.txt")]
        directory = "/var/core_dumps" if nodes.startswith("bottlerocket") else "/core_dumps"
        assert said in notes
        assert f"uploads the dumps in {directory} to b-1" in notes
        assert "pod-security.kubernetes.io/enforce=privileged" in notes
        assert f"core-dump-collector check {directory}" in notes


FIRST_RELEASE = {
    "nodes": "amazon-linux",
    "bucket": "my-core-dumps",
    "region": "eu-central-1",
    "roleArn": "",
    "keyTemplate": "",
    "settings": {"FINGERPRINT": "false"},
    "image": {"repository": "r/c", "tag": "", "digest": "", "pullPolicy": "IfNotPresent"},
    "imagePullSecrets": [],
    "fullnameOverride": "core-dump-collector",
    "nodeSelector": {},
    "tolerations": [{"operator": "Exists"}],
    "maxUnavailable": "10%",
    "resources": {"limits": {"memory": "1Gi"}},
    "priorityClass": {"create": True, "name": "core-dump-collector"},
    "networkPolicy": {"create": True, "ports": [443]},
    "kernelLog": False,
    "podMonitor": False,
}
"""Every value of the chart's first version: later versions take them, so that `helm upgrade --reuse-values` works."""


def test_upgrade_takes_the_values_of_the_first_version_and_changes_nothing_that_kubernetes_keeps():
    (documents,) = render(FIRST_RELEASE)
    found = by_name(documents)
    assert set(found) == {
        (kind, "core-dump-collector")
        for kind in ("ConfigMap", "DaemonSet", "NetworkPolicy", "PriorityClass", "ServiceAccount")
    }
    # The selector of a DaemonSet and the value of a PriorityClass cannot be changed.
    selector = found["DaemonSet", "core-dump-collector"]["spec"]["selector"]
    assert selector == {"matchLabels": {"app.kubernetes.io/name": "core-dump-collector"}}
    assert found["PriorityClass", "core-dump-collector"]["value"] == 1000000
    assert found["PriorityClass", "core-dump-collector"]["preemptionPolicy"] == "Never"


def test_chart_passes_helms_own_linter():
    given = json.dumps(LEAST)
    report = json.loads(helm(LINT.replace("sys.argv[2]", repr(given))))
    assert report["total_charts_linted"] == 1
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert not report["errors"]

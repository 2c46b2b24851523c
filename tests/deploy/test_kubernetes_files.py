"""What kubernetes/ holds, rendered by kubectl, held against schemas, a policy linter and the collector's settings."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tests.support import deploy

from core_dump_collector.config import Settings
from core_dump_helper.settings import Settings as HelperSettings

FOLDER = deploy.ROOT / "kubernetes"
OVERLAYS = ["amazon-linux", "bottlerocket-socket", "bottlerocket-dd", "bottlerocket-file", "configure-host"]
SOURCES = ["base", *(f"overlays/{name}" for name in [*OVERLAYS, "mixed"]), "example", "components/podmonitor"]
VERSIONS = ["1.30", "1.37"]
PRIVILEGED = ["CKV_K8S_16", "CKV_K8S_20", "CKV_K8S_28", "CKV_K8S_37"]
RECEIVER = ["CKV_K8S_8", "CKV_K8S_9", "CKV_K8S_17", "CKV_K8S_25"]
"""The file explains its capabilities and host PIDs. It ends when it cannot go on, and has only a start-up probe."""
EXCEPTIONS = {
    "overlays/bottlerocket-socket": RECEIVER,
    "overlays/mixed": RECEIVER,
    "overlays/bottlerocket-file": ["CKV_K8S_25"],  # two capabilities, explained where they stand
    "overlays/configure-host": PRIVILEGED,  # its init container changes the host
    "example": ["CKV_K8S_21", "CKV2_K8S_6"],  # a Job to try out, in whatever namespace
}


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Each kustomization as kubectl renders it, by its folder."""
    yaml = pytest.importorskip("yaml")
    directory, found = tmp_path_factory.mktemp("rendered"), {}
    for source in SOURCES:
        path = directory / (source.replace("/", "-") + ".yaml")
        path.write_text(deploy.succeed(deploy.tool("kubectl"), "kustomize", FOLDER / source))
        found[source] = (path, list(yaml.safe_load_all(path.read_text())))
    return found


def daemonset(rendered, overlay):
    (found,) = [o for o in rendered[f"overlays/{overlay}"][1] if o["kind"] == "DaemonSet"]
    return found["spec"]["template"]["spec"]


def settings_of(rendered, overlay):
    maps = {o["metadata"]["name"]: o for o in rendered[f"overlays/{overlay}"][1] if o["kind"] == "ConfigMap"}
    (found,) = [map_["data"] for name, map_ in maps.items() if name.startswith("core-dump-collector-")]
    return found | {
        e["name"]: e.get("value", "") for e in daemonset(rendered, overlay)["containers"][0]["env"]
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_sets_the_region(rendered, overlay):
    assert re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", settings_of(rendered, overlay)["AWS_REGION"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("source", SOURCES[:-1])  # the schemas do not know the PodMonitor
def test_objects_are_what_kubernetes_takes(rendered, source, version):
    deploy.succeed(deploy.tool("kubernetes-validate"), "--strict", "-k", version, rendered[source][0])


def test_schemas_find_a_misspelt_field(rendered, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(rendered["base"][0].read_text().replace("failureThreshold", "failureTreshold"))
    done = deploy.run(deploy.tool("kubernetes-validate"), "--strict", "-k", VERSIONS[0], wrong)
    assert done.returncode == 1


@pytest.fixture(scope="session")
def policy_findings(rendered):
    """What the policy linter finds, by folder; one run, since it takes long to start."""
    files = [word for source in SOURCES[1:] for word in ("-f", rendered[source][0])]
    options = ["--config-file", FOLDER / ".checkov.yaml", "--skip-download", "--output", "json"]
    done = deploy.run(deploy.tool("checkov"), *files, *options, env=os.environ | {"LOG_LEVEL": "ERROR"})
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 300
    found = {source: set() for source in SOURCES}
    names = {rendered[source][0].name: source for source in SOURCES}
    for check in report["results"]["failed_checks"]:
        found[names[Path(check["file_path"]).name]].add(check["check_id"])
    return found


@pytest.mark.parametrize("source", SOURCES[1:])
def test_policy_linter_finds_only_what_is_explained(policy_findings, source):
    assert policy_findings[source] == set(EXCEPTIONS.get(source, []))


def test_yaml_is_tidy():
    deploy.succeed(deploy.tool("yamllint"), "-s", "-c", FOLDER / ".yamllint.yaml", FOLDER)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting_that_the_collector_accepts(rendered, overlay, monkeypatch):
    given = settings_of(rendered, overlay) | {"NODE_NAME": "ip-10-0-0-1.ec2.internal"}
    ours = {name.lower(): value for name, value in given.items() if not name.startswith("AWS_")}
    assert set(ours) <= set(Settings.model_fields)
    assert Settings(**ours).bucket == "my-core-dumps"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_shutdown_ends_before_the_kubelet_kills(rendered, overlay):
    seconds = float(settings_of(rendered, overlay)["SHUTDOWN_SECONDS"])
    assert daemonset(rendered, overlay)["terminationGracePeriodSeconds"] >= seconds + 20


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_watched_directory_is_the_hosts(rendered, overlay):
    spec = daemonset(rendered, overlay)
    command, watched = spec["containers"][0]["args"]
    assert command == "run"
    (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "core-dumps"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == "core-dumps"]
    assert mount["mountPath"] == volume["hostPath"]["path"] == watched
    assert mount["mountPropagation"] == "HostToContainer", "volumes that the host mounts later are seen"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_of_the_namespace_set_no_variable(rendered, overlay):
    assert daemonset(rendered, overlay)["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_configure_host_is_privileged(rendered, overlay):
    spec = daemonset(rendered, overlay)
    for container in spec["containers"]:
        context = container["securityContext"]
        assert not context.get("privileged")
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["readOnlyRootFilesystem"]
    assert [container["name"] for container in spec["containers"]] == ["collector", "receiver"][
        : 1 + (overlay == "bottlerocket-socket")
    ]
    assert not any(spec.get(key) for key in ("hostNetwork", "hostIPC"))
    assert bool(spec.get("hostPID")) is (overlay == "bottlerocket-socket")
    assert bool(spec.get("initContainers")) is (overlay == "configure-host")


def test_probes_ask_where_the_collector_answers(rendered):
    (collector,) = daemonset(rendered, "amazon-linux")["containers"]
    (port,) = collector["ports"]
    assert port["containerPort"] == Settings.model_fields["metrics_port"].default
    probes = {
        name: collector[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/readyz"]


@pytest.mark.parametrize(("overlay", "works"), [("amazon-linux", True), ("bottlerocket-file", False)])
def test_kernel_log_component_adds_one_capability_and_replaces_none(overlay, works, tmp_path):
    yaml = pytest.importorskip("yaml")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (tmp_path / "kubernetes/kustomization.yaml").write_text(
        f"resources: [overlays/{overlay}]\ncomponents: [components/kernel-log]\n"
    )
    done = deploy.run(deploy.tool("kubectl"), "kustomize", tmp_path / "kubernetes")
    assert (done.returncode == 0) is works, done.stderr
    if works:
        (daemon,) = [o for o in yaml.safe_load_all(done.stdout) if o["kind"] == "DaemonSet"]
        context = daemon["spec"]["template"]["spec"]["containers"][0]["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"], "add": ["SYSLOG"]}


def is_receivers(found):
    """Say whether this is the ConfigMap of the receiver, whose name ends in the hash of its content."""
    return found["kind"] == "ConfigMap" and re.fullmatch(
        r"core-dump-receiver-\w{10}", found["metadata"]["name"]
    )


def test_receiver_reads_settings_that_the_helper_takes(rendered, tmp_path):
    documents = rendered["overlays/bottlerocket-socket"][1]
    (config,) = [o["data"] for o in documents if is_receivers(o)]
    path, problems = tmp_path / "helper.conf", []
    path.write_text(config["helper.conf"])
    helper = HelperSettings()
    helper.load(str(path), problems.append)
    assert problems == []
    spec = daemonset(rendered, "bottlerocket-socket")
    assert spec["terminationGracePeriodSeconds"] > helper.DEADLINE_SECONDS + 30
    collector, receiver = spec["containers"]
    assert collector["args"] == ["run", helper.WATCH_DIR]
    mounts = {mount["name"]: mount["mountPath"] for mount in receiver["volumeMounts"]}
    volumes = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    assert mounts["core-dumps"] == volumes["core-dumps"] == helper.WATCH_DIR
    assert mounts["listener"] == volumes["listener"] == os.path.dirname(receiver["args"][1])
    image = (deploy.ROOT / "collector/Dockerfile").read_text()
    assert f"site-packages {helper.PYTHON_PATH} " in image
    assert receiver["command"][-1] == "/usr/share/core-dump-handler/helper/core-dump-helper"


def test_receiver_is_replaced_by_one_that_listens_already(rendered):
    (found,) = [o for o in rendered["overlays/bottlerocket-socket"][1] if o["kind"] == "DaemonSet"]
    assert found["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    receiver = found["spec"]["template"]["spec"]["containers"][1]
    mark = receiver["startupProbe"]["exec"]["command"][-1]
    assert f"-R{mark}" in receiver["args"]


def test_pod_monitor_selects_the_daemonsets_pods(rendered):
    (monitor,) = rendered["components/podmonitor"][1]
    (daemon,) = [o for o in rendered["base"][1] if o["kind"] == "DaemonSet"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= daemon["spec"]["template"]["metadata"]["labels"].items()
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"


def test_one_image_is_used_everywhere():
    images = {line.split()[-1] for path in FOLDER.rglob("*.yaml") for line in Path(path).read_text().splitlines()
              if line.strip().startswith("image:") and "example" not in path.parts}  # fmt: skip
    assert len(images) == 1


def test_mixed_fleet_is_one_apply_of_daemonsets_that_share_no_node_and_no_pod(rendered):
    objects = rendered["overlays/mixed"][1]
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(names)) == len(names)
    for kind in ("Namespace", "ServiceAccount", "PriorityClass", "NetworkPolicy"):
        assert [found for found, _ in names].count(kind) == 1
    daemons = [found for found in objects if found["kind"] == "DaemonSet"]
    kinds = [
        ("amazon-linux", "/core_dumps", ["collector"]),
        ("bottlerocket", "/var/core_dumps", ["collector"]),
        ("bottlerocket-socket", "/var/core_dumps", ["collector", "receiver"]),
    ]
    for daemon, (nodes, directory, containers) in zip(daemons, kinds, strict=True):
        pod = daemon["spec"]["template"]
        assert daemon["spec"]["selector"]["matchLabels"]["core-dump-handler/nodes"] == nodes
        assert daemon["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["nodeSelector"]["core-dump-handler/nodes"] == nodes
        assert pod["spec"]["serviceAccountName"] == "core-dump-collector"
        assert [found["name"] for found in pod["spec"]["containers"]] == containers
        container = pod["spec"]["containers"][0]
        assert container["args"] == ["run", directory]
        (source,) = [item["configMapRef"]["name"] for item in container["envFrom"]]
        (settings,) = [found["data"] for found in objects if found["metadata"]["name"] == source]
        assert ("{namespace}" in settings["KEY_TEMPLATE"]) is (nodes != "bottlerocket")
        maps = [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
        assert maps == [name for kind, name in names if "receiver" in name and "receiver" in containers]
    (policy,) = [found for found in objects if found["kind"] == "NetworkPolicy"]
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for daemon in daemons:
        assert selected <= daemon["spec"]["template"]["metadata"]["labels"].items()


KINDS = ["amazon-linux", "bottlerocket", "bottlerocket-socket"]


@pytest.mark.parametrize(
    "patches",
    [
        [{"target": {"kind": "ConfigMap", "name": "core-dump-collector"}}],
        [{"name": f"core-dump-collector-{kind}"} for kind in KINDS],
    ],
    ids=["all", "each"],
)
def test_patches_of_the_page_reach_all_settings_of_a_mixed_fleet(tmp_path, patches):
    yaml = pytest.importorskip("yaml")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    entries, namespace = [], "core-dump-handler"
    for number, given in enumerate(patches):
        metadata = {"name": given.get("name", "any"), "namespace": namespace}
        patch = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"BUCKET_NAME": f"b{number}"},
        }
        entries.append({"patch": json.dumps(patch)} | {k: v for k, v in given.items() if k == "target"})
    role = {
        "name": "core-dump-collector",
        "namespace": namespace,
        "annotations": {"eks.amazonaws.com/role-arn": "ARN"},
    }
    entries.append({"patch": json.dumps({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": role})})
    lists = {
        "resources": ["../kubernetes/overlays/mixed"],
        "components": ["../kubernetes/components/kernel-log"],
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kustomization.yaml").write_text(json.dumps(lists | {"patches": entries}))
    objects = list(yaml.safe_load_all(deploy.succeed(deploy.tool("kubectl"), "kustomize", tmp_path / "mine")))
    maps = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
    buckets = [data["BUCKET_NAME"] for data in maps.values() if "BUCKET_NAME" in data]
    assert buckets == [f"b{min(number, len(patches) - 1)}" for number in range(len(KINDS))]
    (account,) = [found for found in objects if found["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] == "ARN"
    daemons = [found for found in objects if found["kind"] == "DaemonSet"]
    assert [found["metadata"]["name"] for found in daemons] == [
        f"core-dump-collector-{kind}" for kind in KINDS
    ]
    for daemon in daemons:
        container = daemon["spec"]["template"]["spec"]["containers"][0]
        assert container["envFrom"][0]["configMapRef"]["name"] in maps
        assert container["securityContext"]["capabilities"]["add"] == ["SYSLOG"]


def test_changed_setting_rolls_out_and_an_unchanged_one_does_not(tmp_path):
    """By the name of the ConfigMap, which the pods' template contains; role, bucket and image are set from outside."""
    yaml = pytest.importorskip("yaml")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (tmp_path / "mine").mkdir()

    def render(bucket):
        data = {"BUCKET_NAME": bucket, "AWS_REGION": "us-gov-west-1"}
        map_, role = ({"name": "core-dump-collector", "namespace": "core-dump-handler"} for _ in range(2))
        role["annotations"] = {"eks.amazonaws.com/role-arn": "arn:aws-us-gov:iam::1:role/r"}
        patches = [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": map_, "data": data},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": role},
        ]
        (tmp_path / "mine/kustomization.yaml").write_text(
            json.dumps(
                {
                    "resources": ["../kubernetes/overlays/amazon-linux"],
                    "images": [{"name": "registry.example.com/core-dump-collector", "newName": "r/c"}],
                    "patches": [{"patch": json.dumps(patch)} for patch in patches],
                }
            )
        )
        rendered = deploy.succeed(deploy.tool("kubectl"), "kustomize", tmp_path / "mine")
        return {found["kind"]: found for found in yaml.safe_load_all(rendered)}

    first, same, other = render("a-bucket"), render("a-bucket"), render("b-bucket")
    assert first == same
    templates = [found["DaemonSet"]["spec"]["template"]["spec"] for found in (first, other)]
    names = [spec["containers"][0]["envFrom"][0]["configMapRef"]["name"] for spec in templates]
    assert names == [found["ConfigMap"]["metadata"]["name"] for found in (first, other)]
    assert len(set(names)) == 2
    assert other["ConfigMap"]["data"]["BUCKET_NAME"] == "b-bucket"
    assert other["ConfigMap"]["data"]["KEY_TEMPLATE"].startswith("dumps/"), "what is not named stays"
    assert templates[0]["containers"][0]["image"] == "r/c:0.1.0"
    assert first["ServiceAccount"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith("role/r")

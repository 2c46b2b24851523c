"""A change of WATCH_DIR moves everything that depends on it: below a scratch root, and in kubernetes/."""

from __future__ import annotations

import os
import stat

import pytest
from tests.support import deploy

from core_dump_setup import location

SYSCTL = deploy.ROOT / "sysctl"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners, needs root: sudo make test")


def install(root, *options):
    return deploy.succeed(SYSCTL / "install.sh", "--root", root, *options)


def text(root, name):
    return (root / name[1:]).read_text()


def conf_of(root):
    return root / "etc/core-dump-handler/helper.conf"


@needs_root
def test_setting_in_helper_conf_moves_everything_that_an_installation_makes(tmp_path):
    install(tmp_path)
    conf_of(tmp_path).write_text(conf_of(tmp_path).read_text() + "WATCH_DIR=/data/cores\n")
    install(tmp_path)
    assert stat.S_IMODE((tmp_path / "data/cores").stat().st_mode) == 0o700
    assert "d /data/cores 0700 root root -\n" in text(tmp_path, location.TMPFILES)
    drop_in = text(tmp_path, location.DROP_IN)
    assert drop_in.count("/data/cores\n") == 4
    assert "/core_dumps" not in drop_in
    conf_of(tmp_path).write_text("WATCH_DIR=/other\n")
    install(tmp_path)
    assert "d /other 0700" in text(tmp_path, location.TMPFILES)
    assert "/data" not in text(tmp_path, location.DROP_IN)
    deploy.succeed(SYSCTL / "uninstall.sh", "--root", tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"etc/core-dump-handler/helper.conf"}


@needs_root
@pytest.mark.parametrize(
    "before",
    [None, "LEVEL=3\n", "WATCH_DIR=/a\nLEVEL=3\n WATCH_DIR = /b\n", "LEVEL=3\n#WATCH_DIR=/core_dumps"],
)
def test_option_sets_the_one_line_and_keeps_the_others(tmp_path, before):
    if before is not None:
        conf_of(tmp_path).parent.mkdir(parents=True)
        conf_of(tmp_path).write_text(before)
    install(tmp_path, "--watch-dir", "/data/cores")
    lines = conf_of(tmp_path).read_text().splitlines()
    assert [line for line in lines if line.strip().startswith("WATCH_DIR")] == ["WATCH_DIR=/data/cores"]
    assert ("LEVEL=3" in lines) is (before is not None)
    first = conf_of(tmp_path).read_text()
    install(tmp_path, "--watch-dir", "/data/cores")
    assert conf_of(tmp_path).read_text() == first


@needs_root
def test_collectors_unit_with_its_drop_in_is_what_systemd_takes(tmp_path):
    install(tmp_path / "root", "--watch-dir", "/var/data")
    units = tmp_path / "units"
    (units / f"{location.UNIT}.d").mkdir(parents=True)
    (units / f"{location.UNIT}.d/watch-directory.conf").write_text(text(tmp_path / "root", location.DROP_IN))
    unit = (SYSCTL / location.UNIT).read_text()
    (units / location.UNIT).write_text(
        unit.replace("/opt/core-dump-handler/bin/core-dump-collector", "/bin/true")
    )
    environ = os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"}

    def complaints():
        done = deploy.run(
            deploy.tool("systemd-analyze"), "verify", "--man=no", units / location.UNIT, env=environ
        )
        return [line for line in done.stderr.splitlines() if "core-dump" in line]

    assert complaints() == []
    drop_in = units / f"{location.UNIT}.d/watch-directory.conf"
    drop_in.write_text(drop_in.read_text().replace("RequiresMountsFor", "RequireMountsFor"))
    assert any("RequireMountsFor" in line for line in complaints()), "the drop-in was read"


@needs_root
@pytest.mark.parametrize("name", ["", "dumps", "/a b", "/100%", "/data\nX=1", "/$(id)", "/dätá"])
def test_directory_that_systemd_would_read_differently_is_refused(tmp_path, name):
    done = deploy.run(SYSCTL / "install.sh", "--root", tmp_path, "--watch-dir", name)
    assert (done.returncode, "must be a path of letters" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@needs_root
@pytest.mark.parametrize("name", ["/var/tmp", "/usr/../etc"])
def test_directory_of_the_system_is_refused_and_helper_conf_stays(tmp_path, name):
    conf_of(tmp_path).parent.mkdir(parents=True)
    conf_of(tmp_path).write_text("LEVEL=3\n")
    done = deploy.run(SYSCTL / "install.sh", "--root", tmp_path, "--watch-dir", name)
    assert (done.returncode, f"WATCH_DIR={name}" in done.stderr) == (1, True)
    assert conf_of(tmp_path).read_text() == "LEVEL=3\n"


@needs_root
def test_configuration_that_is_a_link_is_not_replaced(tmp_path):
    conf_of(tmp_path).parent.mkdir(parents=True)
    conf_of(tmp_path).symlink_to("/dev/null")
    done = deploy.run(SYSCTL / "install.sh", "--root", tmp_path, "--watch-dir", "/data")
    assert (done.returncode, "is not a regular file" in done.stderr) == (1, True)
    assert conf_of(tmp_path).is_symlink()


def test_dry_run_of_a_move_is_refused():
    done = deploy.run(SYSCTL / "install.sh", "--dry-run", "--watch-dir", "/data")
    assert (done.returncode, "--dry-run cannot show" in done.stderr) == (2, True)


def test_shipped_file_of_tmpfiles_is_the_one_for_the_default():
    shipped = (SYSCTL / "tmpfiles.conf").read_bytes()
    assert location.tmpfiles(location.DEFAULT, shipped) == shipped
    assert location.LINE % location.DEFAULT.encode() in shipped


@needs_root
def test_file_of_the_package_is_hidden_while_the_directory_is_another_one(tmp_path):
    install(tmp_path)
    packaged, own = tmp_path / location.PACKAGED[1:], tmp_path / location.TMPFILES[1:]
    packaged.parent.mkdir(parents=True)
    own.rename(packaged)
    install(tmp_path, "--watch-dir", "/data/cores")
    assert "d /data/cores" in own.read_text()
    install(tmp_path, "--watch-dir", location.DEFAULT)
    assert not own.exists()


@pytest.mark.parametrize("overlay", ["amazon-linux", "configure-host"])
def test_component_moves_the_daemonset_and_what_configure_host_installs(tmp_path, overlay):
    yaml = pytest.importorskip("yaml")
    folder = deploy.moved(tmp_path, f"overlays/{overlay}", "/data/core_dumps")
    rendered = deploy.succeed(deploy.tool("kubectl"), "kustomize", folder)
    (tmp_path / "rendered.yaml").write_text(rendered)
    deploy.succeed(deploy.tool("kubernetes-validate"), "--strict", "-k", "1.30", tmp_path / "rendered.yaml")
    found = {item["kind"]: item for item in yaml.safe_load_all(rendered)}
    settings = found["ConfigMap"]["metadata"]["name"]
    assert settings.startswith("core-dump-collector-"), "the setting itself is not applied"
    spec = found["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    places = [container["args"][1], found["ConfigMap"]["data"]["WATCH_DIR"]]
    places += [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "core-dumps"]
    places += [volume["hostPath"]["path"] for volume in spec["volumes"] if volume["name"] == "core-dumps"]
    assert places == ["/data/core_dumps"] * 4
    for init in spec.get("initContainers", []):
        source = {"name": settings, "key": "WATCH_DIR", "optional": True}
        assert init["env"] == [{"name": "WATCH_DIR", "valueFrom": {"configMapKeyRef": source}}]


def test_bottlerocket_nodes_of_a_mixed_fleet_keep_the_directory_of_their_core_pattern(tmp_path):
    yaml = pytest.importorskip("yaml")
    folder = deploy.moved(tmp_path, "overlays/mixed", "/data/core_dumps")
    rendered = deploy.succeed(deploy.tool("kubectl"), "kustomize", folder)
    daemons = [found for found in yaml.safe_load_all(rendered) if found["kind"] == "DaemonSet"]
    directories = {
        found["metadata"]["name"]: found["spec"]["template"]["spec"]["containers"][0]["args"][1]
        for found in daemons
    }
    assert directories == {
        "core-dump-collector-amazon-linux": "/data/core_dumps",
        "core-dump-collector-bottlerocket": "/var/core_dumps",
        "core-dump-collector-bottlerocket-socket": "/var/core_dumps",
    }

"""A newcomer's walk through a whole machine, a Debian with systemd-coredump.

Two commands to a dump in a bucket, upgrade, downgrade, another directory, removal; then REASSERT under a real systemd.

The machine has no network: the environment of `make run`, and an S3 server, are installed before it boots.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from tests.deploy import test_vm
from tests.support import deploy

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "vm", reason="boots a virtual machine in qemu: make vm"
)
SYSTEMD = "|/lib/systemd/systemd-coredump "
SCRIPT = deploy.ROOT / "tests/deploy/walk.sh"
FOREIGN = "|/bin/true %P"
STOPPING = f"""
rm -f /var/lib/core-dump-handler/reasserted
echo '{FOREIGN}' >/proc/sys/kernel/core_pattern
echo "STOPPING $(systemctl is-system-running)"
/usr/libexec/core-dump-handler/core-dump-setup reassert 2>&1 | sed 's/^/STOPPING says /'
sed 's/^/STOPPING has /' /proc/sys/kernel/core_pattern
"""
UNIT = """[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=tty
ExecStart=/bin/true
ExecStop=/bin/sh /stopping
"""
COUNT = """
import sys, boto3
client = boto3.client("s3")
if sys.argv[1:]:
    client.create_bucket(Bucket="my-bucket")
keys = [item["Key"] for item in client.list_objects_v2(Bucket="my-bucket").get("Contents", [])]
print(sum(key.endswith(".gz") and "core-sh-" in key for key in keys))
"""


@pytest.fixture
def root(tmp_path):
    """A Debian with systemd-coredump, a checkout, and the environment that `make run` needs."""
    if not (test_vm.CACHE / "walk-root/ready").exists():
        pytest.skip("no root file system for the machine: make vm")
    target = tmp_path / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", test_vm.CACHE / "walk-root", target], check=True)
    names = deploy.succeed("git", "-C", deploy.ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, names):
        if not name.startswith(("tests/fixtures", "docs/img")):
            (target / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(deploy.ROOT / name, target / "checkout" / name)
    make = "make -s $(make -pn 2>/dev/null | sed -n 's/^DEMO_READY := //p')"
    done = deploy.run(
        *("chroot", target, "env", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", "HOME=/root", "sh", "-c"),
        f"cd /checkout && {make}",
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(target / "wheels")
    yield target
    shutil.rmtree(target)


@pytest.mark.timeout(2400)
def test_newcomer_installs_collects_upgrades_moves_and_removes(root, tmp_path):
    (root / "count.py").write_text(COUNT)
    (root / "stopping").write_text(STOPPING)
    (root / "etc/systemd/system/stopping.service").write_text(UNIT)
    said = test_vm.boot(root, tmp_path, report=test_vm.STATE + SCRIPT.read_text(), seconds=1800)

    def lines(tag):
        return test_vm.lines(said, tag)

    assert lines("AT_BOOT")[0].startswith(SYSTEMD)
    assert any(f"replacing {SYSTEMD}" in line for line in lines("INSTALLED says"))
    for tag in ("INSTALLED", "UPGRADED", "DOWNGRADED", "MOVED", "BACK", "AGAIN"):
        assert lines(tag)[:1] == ["exit 0"], lines(f"{tag} says")
        assert lines(tag)[-1] == "ours"
    assert lines("STORED") == ["1", "2", "3", "4", "5"]
    first, second = lines("VERSION")
    assert "0.2.0" in first
    assert "0.2.0" not in second
    unit = " ".join(lines("UNIT"))
    assert "WATCH_DIR=/data/cores" in unit
    assert "ActiveState=active" in unit
    assert lines("REMOVED")[0] == "exit 0"
    assert lines("REMOVED")[-1].startswith(SYSTEMD)
    # The kept configuration is named; the former directories hold nothing but the helper's state.
    assert "what remains: /etc/core-dump-handler/helper.conf" in " ".join(lines("REMOVED says"))
    remains = [line.partition(" ")[2] for line in lines("REMAINS")]
    told = ("/etc/core-dump-handler", "/core_dumps", "/data")
    assert [path for path in remains if not path.startswith(told)] == []
    assert lines("SYSTEMD") == ["1"], "systemd-coredump has its crashes again"
    assert lines("TIMER") == ["active"]
    assert lines("GIVEN") == ["ours", "ours", "ours", FOREIGN], "three times an hour"
    assert lines("JOURNAL") == ["3"]
    assert lines("STOPPING")[0] == "stopping"
    assert lines("STOPPING has") == [FOREIGN]
    assert any("the system is stopping" in line for line in lines("STOPPING says"))

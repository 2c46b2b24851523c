"""A whole machine: package or script, boot, systemd-sysctl, a service that crashes, its dump.

Its root is a RAM disk, which has no extended attributes: that a dump arrives without them is part of what is shown.
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import shutil
import subprocess

import pytest
from tests.support import deploy

pytestmark = pytest.mark.skipif(
    os.environ.get("DEPLOY_TIER") != "vm", reason="boots a virtual machine in qemu: make vm"
)
CACHE = deploy.ROOT / ".cache"
CRASHY = """[Service]
DynamicUser=yes
ExecStart=/bin/sh -c 'kill -SEGV $$$$'
"""
REPORT = """[Unit]
After=multi-user.target
[Service]
Type=oneshot
StandardOutput=tty
ExecStart=/bin/sh /report
[Install]
WantedBy=default.target
"""
SCRIPT = """
cat /proc/sys/kernel/core_pattern | sed 's/^/PATTERN /'
cat /proc/sys/kernel/core_pipe_limit | sed 's/^/PIPE_LIMIT /'
stat -c 'DIRECTORY %a %u' /core_dumps
systemctl start --no-block crashy.service
echo WAITING
for i in $(seq 1200); do
    if dmesg | grep -q 'core-sh-.* bytes by'; then break; fi
    sleep 0.1
done
echo "WAITED $i times"; dmesg | tail -n 5
systemctl show -p Result crashy.service | sed 's/^/SERVICE /'
for dump in /core_dumps/core-sh-*.gz; do echo "CONTENT $(base64 -w 0 "$dump")"; done
dmesg | grep core-dump-helper | sed 's/^/LOG /'
AFTER
echo THE END
systemctl poweroff --force --force
"""
REMOVE = """
rpm -e core-dump-handler
cat /proc/sys/kernel/core_pattern | sed 's/^/RESTORED /'
"""


def archive(root, target):
    """Write a directory as an initial RAM disk."""
    with target.open("wb") as out:
        command = "find . -xdev | cpio --quiet -o -H newc"
        subprocess.run(command, shell=True, cwd=root, stdout=out, check=True)


def boot(root, scratch, after=""):
    """Boot a root directory; return what its report printed."""
    (root / "etc/systemd/system/crashy.service").write_text(CRASHY)
    (root / "etc/systemd/system/report.service").write_text(REPORT)
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "report.service").symlink_to("../report.service")
    (root / "report").write_text(SCRIPT.replace("AFTER", after))
    archive(root, scratch / "root.cpio")
    (kernel,) = CACHE.glob("kernel/boot/vmlinuz-*")
    command = [deploy.tool("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "3072"]
    command += ["-smp", "2", "-nographic", "-no-reboot", "-net", "none", "-kernel", kernel]
    # No login prompt: it would hang up the terminal that the report goes to.
    given = "console=ttyS0 quiet rdinit=/lib/systemd/systemd systemd.show_status=false panic=-1"
    command += ["-initrd", scratch / "root.cpio", "-append", given + " systemd.getty_auto=no"]
    console = scratch / "console.log"  # a file, so that a machine that never ends can be looked into
    with console.open("wb") as out:
        done = deploy.run(*command, capture_output=False, stdout=out, stderr=out, timeout=600)
    said = console.read_text(errors="replace")
    assert done.returncode == 0, said[-3000:]
    assert "THE END" in said, said[-3000:]
    return said


@pytest.fixture
def root(tmp_path):
    """A Debian root with systemd."""
    if not (CACHE / "vm-root/ready").exists():
        pytest.skip("no root file system for the machine: make vm")
    target = tmp_path / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", CACHE / "vm-root", target], check=True)
    yield target
    shutil.rmtree(target)


def assert_dump_of_the_service(said):
    assert "SERVICE Result=core-dump" in said
    (logged,) = re.findall(
        r"^LOG .*: core-sh-\d+-\d+-11\.gz is complete: (\d+) bytes by pigz in \d+ ms$", said, re.MULTILINE
    )
    (content,) = re.findall(r"^CONTENT (\S+)", said, re.MULTILINE)
    core = gzip.decompress(base64.b64decode(content, validate=True))
    assert (len(core), core[:4]) == (int(logged), b"\x7fELF")


def assert_boot_set_the_pattern(said):
    ours = deploy.sysctl_values(deploy.ROOT / "sysctl/69-core-dump.conf")["kernel.core_pattern"]
    assert f"PATTERN {ours}\n" in said
    assert "PIPE_LIMIT 0" in said
    assert "DIRECTORY 700 0" in said


def test_script_then_boot_then_a_crashing_service_leave_its_dump(root, tmp_path):
    deploy.succeed(deploy.ROOT / "sysctl/install.sh", "--root", root)
    said = boot(root, tmp_path)
    assert_boot_set_the_pattern(said)
    assert_dump_of_the_service(said)


def test_package_then_boot_then_crash_then_removal(root, tmp_path):
    source = deploy.checkout(tmp_path / "source")
    defines = ["--define", f"_topdir {tmp_path}/top", "--define", f"_sourcedir {source}"]
    deploy.succeed(deploy.tool("rpmbuild"), "-bb", *defines, source / "sysctl/core-dump-handler.spec")
    (package,) = tmp_path.glob("top/RPMS/noarch/*.rpm")
    shutil.copy(package, root / "package.rpm")
    deploy.succeed("chroot", root, "rpm", "-i", "--nodeps", "/package.rpm")
    said = boot(root, tmp_path, after=REMOVE)
    assert_boot_set_the_pattern(said)
    assert_dump_of_the_service(said)
    assert re.search("^RESTORED core$", said, re.MULTILINE)

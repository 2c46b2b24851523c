"""A whole machine: package or script, boot, systemd-sysctl, a service that crashes, its dump, the handler of others.

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
START = """
cat /proc/sys/kernel/core_pattern | sed 's/^/AT_BOOT /'
BEFORE
"""
SCRIPT = """
cat /proc/sys/kernel/core_pattern | sed 's/^/PATTERN /'
cat /proc/sys/kernel/core_pipe_limit | sed 's/^/PIPE_LIMIT /'
stat -c 'DIRECTORY %a %u' /core_dumps
ls -l /run/core-dump-handler/cgroup | sed 's/^/CGROUP /'
echo "LIMIT $(cat /run/core-dump-handler/cgroup/memory.max) of $(grep MemTotal /proc/meminfo)"
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
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys
rpm -e core-dump-handler 2>/dev/null
echo "KEPT exit $? $(ls /usr/libexec/core-dump-handler/core-dump-helper)"
umount /proc/sys
rpm -e core-dump-handler
cat /proc/sys/kernel/core_pattern | sed 's/^/RESTORED /'
"""
HANDLER = "@@/run/systemd/coredumpd/kernel"
FOREIGN = "|/bin/true %P"
REGISTER = f"""[Unit]
DefaultDependencies=no
After=systemd-sysctl.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo {HANDLER} > /proc/sys/kernel/core_pattern'
ExecStop=/bin/sh -c 'echo core > /proc/sys/kernel/core_pattern'
[Install]
WantedBy=sysinit.target
"""
STATE = (deploy.ROOT / "tests/deploy/state.sh").read_text()
WALK = """
distribution=$(cat /proc/sys/kernel/core_pattern)
echo FOREIGN >/proc/sys/kernel/core_pattern
run REFUSED /checkout/sysctl/install.sh
echo "$distribution" >/proc/sys/kernel/core_pattern
mkdir -p /etc/core-dump-handler
echo IGNORE_SIGNALS=11 >/etc/core-dump-handler/helper.conf
began=$(date +%s%N)
run FAILED /checkout/sysctl/install.sh
took=$((($(date +%s%N) - began) / 1000000)) # ms, on a machine that is emulated
ls /usr/libexec/core-dump-handler /core_dumps /etc/sysctl.d/69-core-dump.conf 2>&1 | sed 's/^/FAILED left /'
rm /etc/core-dump-handler/helper.conf
for twelfth in 1 2 3 4 5 6 7 8 9 10 11 12; do
    /checkout/sysctl/install.sh >/dev/null 2>&1 &
    sleep "$(printf '%d.%03d' $((took * twelfth / 12000)) $((took * twelfth / 12 % 1000)))"
    kill -9 $! 2>/dev/null
    wait $! 2>/dev/null
    state KILLED
done
run INSTALLED /checkout/sysctl/install.sh
find / -xdev -name '*.new.*' -path '*core-dump*' | sed 's/^/LEFTOVER /'
ls -l /etc/systemd/system/systemd-coredump-register.service | sed 's/^/MASK /'
systemctl stop systemd-coredump-register.service
state MASKED
echo '# edited' >>/etc/sysctl.d/69-core-dump.conf
echo '# a later version' >>/checkout/helper/core_dump_helper/handler.py
echo '# a later version' >>/checkout/sysctl/69-core-dump.conf
run UPGRADED /checkout/sysctl/install.sh
tail -n 1 /etc/sysctl.d/69-core-dump.conf | sed 's/^/EDITED /'
tail -n 1 /etc/sysctl.d/69-core-dump.conf.dist | sed 's/^/BESIDE /'
echo "RELEASES $(ls -d /usr/libexec/core-dump-handler/[0-9]*-* | wc -l)"
"""
LEAVE = """
run REMOVED /checkout/sysctl/uninstall.sh
ls -l /etc/systemd/system/systemd-coredump-register.service 2>&1 | sed 's/^/UNMASKED /'
ls /usr/libexec/core-dump-handler 2>&1 | sed 's/^/GONE /'
"""


def archive(root, target):
    """Write a directory as an initial RAM disk."""
    with target.open("wb") as out:
        command = "find . -xdev | cpio --quiet -o -H newc"
        subprocess.run(command, shell=True, cwd=root, stdout=out, check=True)


def boot(root, scratch, before="", after="", report="", seconds=600):
    """Boot a root directory, run commands before and after the crash, or others; return what was printed."""
    (root / "etc/systemd/system/crashy.service").write_text(CRASHY)
    (root / "etc/systemd/system/report.service").write_text(REPORT)
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "report.service").symlink_to("../report.service")
    usual = START.replace("BEFORE", before) + SCRIPT.replace("AFTER", after)
    (root / "report").write_text(report or usual)
    archive(root, scratch / "root.cpio")
    (kernel,) = CACHE.glob("kernel/boot/vmlinuz-*")
    command = [deploy.tool("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "4096"]
    command += ["-smp", "2", "-nographic", "-no-reboot", "-net", "none", "-kernel", kernel]
    # No login prompt: it would hang up the terminal that the report goes to.
    given = "console=ttyS0 quiet rdinit=/lib/systemd/systemd systemd.show_status=false panic=-1"
    command += ["-initrd", scratch / "root.cpio", "-append", given + " systemd.getty_auto=no"]
    console = scratch / "console.log"  # a file, so that a machine that never ends can be looked into
    with console.open("wb") as out:
        done = deploy.run(*command, capture_output=False, stdout=out, stderr=out, timeout=seconds)
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
        r"^LOG .*: core-sh-\d+-\d+-11\.gz is complete: (\d+) bytes by \w+ in \d+ ms$", said, re.MULTILINE
    )
    (content,) = re.findall(r"^CONTENT (\S+)", said, re.MULTILINE)
    core = gzip.decompress(base64.b64decode(content, validate=True))
    assert (len(core), core[:4]) == (int(logged), b"\x7fELF")


def assert_boot_set_the_pattern(said):
    ours = deploy.sysctl_values(deploy.ROOT / "sysctl/69-core-dump.conf")["kernel.core_pattern"]
    assert f"PATTERN {ours}\n" in said
    assert "PIPE_LIMIT 0" in said
    assert "DIRECTORY 700 0" in said
    assert re.search(r"^CGROUP .* -> /sys/fs/cgroup/core-dump-helper\s*$", said, re.MULTILINE)
    (limit, total) = re.findall(r"^LIMIT (\d+) of MemTotal: +(\d+) kB", said, re.MULTILINE)[0]
    assert 0.45 < int(limit) / (int(total) * 1024) < 0.55


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
    assert lines(said, "KEPT") == ["exit 1 /usr/libexec/core-dump-handler/core-dump-helper"]
    assert re.search("^RESTORED core$", said, re.MULTILINE)


def lines(said, tag):
    """What the report printed with a tag, in order."""
    return [line.rstrip() for line in re.findall(rf"^{tag} (.*)$", said, re.MULTILINE)]


def test_walk_from_the_handler_of_others_to_ours_and_back(root, tmp_path):
    deploy.checkout(root / "checkout")
    service = root / "usr/lib/systemd/system/systemd-coredump-register.service"
    service.write_text(REGISTER)
    wants = root / "etc/systemd/system/sysinit.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / service.name).symlink_to(f"/usr/lib/systemd/system/{service.name}")
    said = boot(root, tmp_path, before=STATE + WALK.replace("FOREIGN", f"'{FOREIGN}'"), after=LEAVE)
    assert lines(said, "AT_BOOT") == [HANDLER]
    for tag, handler in (("REFUSED", FOREIGN), ("FAILED", HANDLER)):
        assert "exit 1" in lines(said, tag)
        assert lines(said, tag).count(handler) == 1
    assert any("--force" in line for line in lines(said, "REFUSED says"))
    assert any(f"replacing {HANDLER} (systemd-coredump" in line for line in lines(said, "FAILED says"))
    assert any("no dump arrived" in line for line in lines(said, "FAILED says"))
    assert len(re.findall("^FAILED left .*No such file", said, re.MULTILINE)) == 3
    killed = lines(said, "KILLED")
    assert len(killed) == 12
    assert set(killed) <= {HANDLER, "ours"}
    assert HANDLER in killed, "the first was killed before it had set the pattern"
    assert "exit 0" in lines(said, "INSTALLED")
    assert any("its dump arrived" in line for line in lines(said, "INSTALLED says"))
    assert lines(said, "LEFTOVER") == []
    assert lines(said, "MASK")[0].endswith("-> /dev/null")
    assert lines(said, "MASKED") == ["ours"], "a masked service reverts nothing when it stops"
    assert "exit 0" in lines(said, "UPGRADED")
    assert (lines(said, "EDITED"), lines(said, "BESIDE")) == (["# edited"], ["# a later version"])
    assert lines(said, "RELEASES") == ["2"]
    assert_boot_set_the_pattern(said)
    assert_dump_of_the_service(said)
    assert "exit 0" in lines(said, "REMOVED")
    assert HANDLER in lines(said, "REMOVED")
    assert "No such file" in lines(said, "UNMASKED")[0]
    assert "No such file" in lines(said, "GONE")[0]

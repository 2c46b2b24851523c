"""OpenStack Swift with its S3 middleware: a store without checksum trailers, conditional writes, attributes.

Debian packages: swift-proxy swift-account swift-container swift-object memcached. Swift reads its hash secrets from
/etc/swift/swift.conf alone, which is written where it is missing.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import s3
from tests.support.cleanup import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = s3.Keys("test:tester", "testing")
CONF = Path("/etc/swift/swift.conf")
HASHES = "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
PIPELINE = (
    "catch_errors gatekeeper cache bulk s3api tempauth copy slo dlo versioned_writes symlink proxy-server"
)
FILTERS = ("catch_errors", "gatekeeper", "bulk", "copy", "slo", "dlo", "versioned_writes", "symlink")


def _back_end(directory: Path, kind: str, port: int) -> Path:
    """Build the ring of one back end and write its configuration; return that."""
    ring = directory / f"{kind}.builder"
    for arguments in (
        ["create", "6", "1", "1"],
        ["add", f"r1z1-127.0.0.1:{port}/sdb1", "1"],
        ["rebalance"],
    ):
        subprocess.run(["swift-ring-builder", ring, *arguments], check=False, capture_output=True)
    path = directory / f"{kind}-server.conf"
    path.write_text(
        f"[DEFAULT]\ndevices = {directory}/node\nmount_check = false\nbind_ip = 127.0.0.1\nbind_port = {port}\n"
        f"workers = 0\nuser = root\nswift_dir = {directory}\nlog_level = WARNING\n"
        f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        f"[{kind}-replicator]\n[{kind}-updater]\n[{kind}-auditor]\n"
    )
    return path


def _proxy(directory: Path, port: int, cache: int, tls: str = "") -> Path:
    """Write the proxy's configuration; return it."""
    path = directory / f"proxy-server-{port}.conf"
    path.write_text(
        f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nuser = root\nswift_dir = {directory}\n{tls}"
        f"[pipeline:main]\npipeline = {PIPELINE}\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\nallow_account_management = true\naccount_autocreate = true\n"
        "[filter:tempauth]\nuse = egg:swift#tempauth\nuser_test_tester = testing .admin\n"
        "[filter:s3api]\nuse = egg:swift#s3api\ns3_acl = false\nlocation = us-east-1\n"
        f"[filter:cache]\nuse = egg:swift#memcache\nmemcache_servers = 127.0.0.1:{cache}\n"
        + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in FILTERS)
    )
    return path


@contextlib.contextmanager
def swift(directory: Path) -> Iterator[s3.S3Server]:
    """Run a Swift of one replica with an empty bucket."""
    (directory / "node/sdb1").mkdir(parents=True)
    (directory / "swift.conf").write_text(HASHES + "[storage-policy:0]\nname = p0\ndefault = yes\n")
    if not CONF.exists():
        CONF.parent.mkdir(exist_ok=True)
        shutil.copy(directory / "swift.conf", CONF)
    certificate, key = s3.make_certificate(directory)
    tls = f"cert_file = {certificate}\nkey_file = {key}\n"
    ports = s3.free_ports(6)
    commands = [["memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", str(ports[4]), "-m", "64"]]
    for kind, port in zip(("account", "container", "object"), ports[:3], strict=True):
        commands.append([f"swift-{kind}-server", str(_back_end(directory, kind, port))])
    commands.append(["swift-proxy-server", str(_proxy(directory, ports[3], ports[4]))])
    commands.append(["swift-proxy-server", str(_proxy(directory, ports[5], ports[4], tls))])
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "log").open("ab"))
        servers = [subprocess.Popen(guarded(command), stdout=log, stderr=log) for command in commands]
        for server in servers:
            stack.callback(s3.stop, server)
        for server, port in zip(servers, [ports[4], *ports[:4], ports[5]], strict=True):
            if not s3.wait_for_port(port, server):
                message = f"Swift did not start; see {directory / 'log'}"
                raise RuntimeError(message)
        endpoints = f"http://127.0.0.1:{ports[3]}", f"https://127.0.0.1:{ports[5]}"
        store = s3.S3Server(*endpoints, certificate, directory, ports[3])
        with store.client(KEYS) as client:
            client.create_bucket(Bucket=s3.BUCKET)
        yield store

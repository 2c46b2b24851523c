"""Runs a containerd of its own and speaks the Container Runtime Interface to it, as the kubelet does."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import deploy
from tests.support.cleanup import guarded
from tests.support.collector import wait_until

PROTOCOL = deploy.ROOT / "tests/deploy/cri.proto"
GATEWAY = "10.88.0.1"
"""Where pods reach the node."""
CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/socket"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{sandbox_image}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
"""
# Mounts and processes of its own, which end with their first process; /run and the network plugins' state are thrown
# away. Bottlerocket and Amazon Linux start containerd without a limit on cores, which the file way needs.
START = """
mount --make-rshared /
mount -t tmpfs none /run
mkdir -p /var/lib/cni
mount -t tmpfs none /var/lib/cni
ulimit -c unlimited
exec "$@"
"""


def network(directory: Path) -> str:
    """Return a CNI configuration: a pair of interfaces for each pod, no bridge, no packet filter."""
    addresses = {"type": "host-local", "subnet": "10.88.0.0/24", "dataDir": f"{directory}/addresses"}
    plugin = {"type": "ptp", "ipMasq": False, "ipam": addresses}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [plugin]})


@dataclass(frozen=True)
class Runtime:
    """A running containerd."""

    directory: Path
    channel: Any
    pool: Any

    def call(self, method: str, /, **request: object) -> Any:
        """Call a method of the runtime service; a refusal raises grpc.RpcError."""
        from google.protobuf import json_format, message_factory

        described = self.pool.FindServiceByName("runtime.v1.RuntimeService").methods_by_name[method]
        message = message_factory.GetMessageClass(described.input_type)()
        json_format.ParseDict(request, message)
        remote = self.channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        return remote(message, timeout=150)

    def load(self, archive: Path) -> None:
        """Take images from an archive that `docker save` wrote."""
        options = ["--address", self.directory / "socket", "--namespace", "k8s.io"]
        deploy.succeed(deploy.tool("ctr"), *options, "images", "import", archive, timeout=300)


def protocol(scratch: Path) -> Any:
    """Compile cri.proto; return its messages and services."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from grpc_tools import protoc

    compiled = scratch / "cri.desc"
    arguments = ["protoc", f"-I{PROTOCOL.parent}", f"--descriptor_set_out={compiled}", str(PROTOCOL)]
    assert protoc.main(arguments) == 0
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@contextlib.contextmanager
def running(directory: Path, sandbox_image: str, *, own_pids: bool = True) -> Iterator[Runtime]:
    """Run containerd until the end of the block.

    With a PID namespace of its own, whatever it started ends with it, even when the tests are killed.
    """
    import grpc

    (directory / "cni").mkdir()
    (directory / "cni/10-pods.conflist").write_text(network(directory))
    config = directory / "config.toml"
    config.write_text(CONFIG.format(directory=directory, sandbox_image=sandbox_image))
    own = ["unshare", "--mount", *(["--pid", "--fork", "--kill-child", "--mount-proc"] if own_pids else [])]
    command = guarded([*own, "sh", "-ec", START, "sh", deploy.tool("containerd"), "--config", str(config)])
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with grpc.insecure_channel(f"unix://{directory}/socket") as channel:
            runtime = Runtime(directory, channel, protocol(directory))

            def answers() -> bool:
                assert process.poll() is None, (directory / "log").read_text()
                with contextlib.suppress(grpc.RpcError):
                    return bool(runtime.call("Version").runtime_name)
                return False

            wait_until(answers, 60, "containerd")
            yield runtime
    finally:
        process.kill()
        process.wait()

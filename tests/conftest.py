"""Fixtures that several tiers share."""

from __future__ import annotations

import functools
import os
import signal
from unittest import mock

import pytest
from botocore.loaders import JSONFileLoader, Loader
from tests.support import s3
from xdist.scheduler import LoadScopeScheduling

MACHINE = (
    "tests/cli/test_cli_real.py",
    "tests/deploy/test_bottlerocket.py",
    "tests/deploy/test_cri.py",
    "tests/deploy/test_image.py",
    "tests/deploy/test_location.py",
    "tests/deploy/test_package.py",
    "tests/deploy/test_packages.py",
    "tests/deploy/test_socket_host.py",
    "tests/deploy/test_sysctl_host.py",
    "tests/integration/test_check.py",
    "tests/integration/test_daemon_observes.py",
    "tests/kernel/",
    "tests/torture/test_torture.py",
)
"""Tests that change state of the whole machine: its core pattern, /usr/libexec, /core_dumps."""


@pytest.fixture(autouse=True, scope="session")
def _models_are_parsed_once():
    """Keep botocore's service models: finding and parsing them is most of making a client, and tests make hundreds."""
    parsed = functools.cache(JSONFileLoader.load_file)
    found = functools.cache(Loader().list_available_services)
    with (
        mock.patch.object(JSONFileLoader, "load_file", lambda self, path: parsed(_LOADER, path)),
        mock.patch.object(Loader, "list_available_services", lambda self, type_name: found(type_name)),
    ):
        yield


_LOADER = JSONFileLoader()


@pytest.fixture(autouse=True)
def _signals_are_as_before():
    """Restore the handlers of signals after each test: a program inherits the signals that this process ignores."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, action in zip(numbers, before, strict=True):
        signal.signal(number, action)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """One S3 server for the whole run, over HTTP and TLS."""
    with s3.seaweedfs(tmp_path_factory.mktemp("weed"), tls=True) as server:
        yield server


@pytest.fixture
def bucket(seaweed):
    """An admin's client and an empty bucket `dumps`."""
    with seaweed.client() as client:
        for key in s3.keys_in(client):
            client.delete_object(Bucket=s3.BUCKET, Key=key)
        for upload in client.list_multipart_uploads(Bucket=s3.BUCKET).get("Uploads", []):
            client.abort_multipart_upload(Bucket=s3.BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
        yield client


@pytest.fixture
def watch_dir(tmp_path):
    """An empty watch directory, as installed: for its owner alone."""
    directory = tmp_path / "core_dumps"
    directory.mkdir(mode=0o700)
    return directory


class FileScheduling(LoadScopeScheduling):
    """Keeps the tests of a file in one process, and those that change this machine in one, too."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "machine" if path.startswith(MACHINE) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Distribute whole files, because their fixtures start servers."""
    return FileScheduling(config, log)


def pytest_configure():
    """Let programs under test be interrupted even if this run was started in the background, which ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val, argname):
    """Name long bytes by their length: both processes must collect the same names, and gzip headers hold the time."""
    return f"{argname} of {len(val)} bytes" if isinstance(val, bytes) and len(val) > 20 else None


def pytest_report_header():
    """Say how the kernel tier is run."""
    if os.geteuid() != 0:
        return "kernel tier skipped: it crashes real processes and needs root: sudo make test"
    return None

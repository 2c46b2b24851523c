"""Fixtures that several tiers share."""

from __future__ import annotations

import functools
import os
from unittest import mock

import pytest
from botocore.loaders import JSONFileLoader, Loader
from tests.support import s3


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of a file in one process, and those that change this machine, `xdist_group("machine")`, too."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_make_parametrize_id(val, argname):
    """Name long bytes by their length: both processes must collect the same names, and gzip headers hold the time."""
    return f"{argname} of {len(val)} bytes" if isinstance(val, bytes) and len(val) > 20 else None


def pytest_report_header():
    """Say how the kernel tier is run."""
    if os.geteuid() != 0:
        return "kernel tier skipped: it crashes real processes and needs root: sudo make test"
    return None

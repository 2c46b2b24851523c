"""What can be told of the helper on the node."""

import hashlib
import os

import pytest

from core_dump_collector.node import corepattern, installed


@pytest.fixture
def helper(tmp_path, monkeypatch):
    program, config = tmp_path / "core-dump-helper", tmp_path / "helper.conf"
    program.write_text('#!/usr/bin/python3 -IS\nRELEASE = "1.2.3-0a1b"\n')
    config.write_text("LEVEL=3\n")
    monkeypatch.setattr(corepattern, "read", lambda: f"|{program} -C{config} -P%P -- %e")
    monkeypatch.setattr(corepattern, "is_contained", lambda: False)
    return program, config


def test_release_and_configuration_are_told(helper):
    digest = hashlib.sha256(b"LEVEL=3\n").hexdigest()[:12]
    assert installed.identify_helper() == ("1.2.3-0a1b", digest)


def test_what_is_missing_damaged_or_no_file_is_not_told(helper):
    program, config = helper
    program.write_text('RELEASE = "."\n')
    config.unlink()
    os.mkfifo(config)
    assert installed.identify_helper() == ("", "")


def test_container_tells_nothing(helper, monkeypatch):
    monkeypatch.setattr(corepattern, "is_contained", lambda: True)
    assert installed.identify_helper() == ("", "")

import json

import pytest
import structlog

from core_dump_collector import config, logs


@pytest.fixture(autouse=True)
def restore_structlog():
    yield
    structlog.reset_defaults()


def test_hostile_name_stays_on_one_line_and_brings_no_terminal_escape(capsys):
    writer = logs.configure(config.load({"bucket_name": "dumps", "log_format": "text", "node_name": "n"}))
    structlog.get_logger().info("uploaded", file="core-\n\x1b[31mFAKE level=error\udcff")
    writer.drain()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "\x1b[31mFAKE" not in text
    assert "x1b[31mFAKE" in text


def test_json_lines_parse_and_hold_the_escaped_name(capsys):
    writer = logs.configure(config.load({"bucket_name": "dumps", "log_format": "json", "node_name": "n"}))
    structlog.get_logger().info("uploaded", file='core-"},{\n\udcff')
    writer.drain()
    event = json.loads(capsys.readouterr().err)
    assert event["event"] == "uploaded"
    assert event["file"] == 'core-"},{\\n\\udcff'

import json
import threading

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


class Stalled:
    """A stream whose reader has stopped: `write` waits until it goes on."""

    def __init__(self):
        self.goes_on = threading.Event()
        self.written = []

    def write(self, line):
        self.goes_on.wait(60)
        self.written.append(line)

    def flush(self):
        pass


def test_lines_that_a_stopped_reader_cannot_take_are_dropped_and_counted():
    stream = Stalled()
    writer = logs.LogWriter(stream)
    for number in range(logs.MOST_LINES + 100):
        writer.write(f"{number}\n")
    assert 90 <= writer.dropped <= 100, "one line may be with the thread"
    dropped = writer.dropped
    writer.drain(0.1)
    stream.goes_on.set()
    writer.drain(30)
    assert len(stream.written) == logs.MOST_LINES + 100 - dropped
    assert stream.written[:2] == ["0\n", "1\n"]


def test_without_a_stream_nothing_fails():
    writer = logs.LogWriter(None)
    writer.write("line\n")
    writer.drain(10)
    assert writer.dropped == 1

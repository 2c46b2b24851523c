import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter
from tests.support.collector import wait_until

from core_dump_collector import config
from core_dump_collector import health as health_module
from core_dump_collector.errors import ConfigError
from core_dump_collector.health import Health, Server
from core_dump_collector.observation import Observer


def observer():
    return Observer(Counter("failures", "Failures.", ["what"], registry=CollectorRegistry()))


def wait_word(path, word):
    wait_until(lambda: path.exists() and path.read_text() == word + "\n", 10, word)


@pytest.fixture
def served(tmp_path):
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    settings = config.load(
        {"bucket_name": "dumps", "metrics_port": "0", "metrics_address": "127.0.0.1", "node_name": "n"}
    )
    health = Health(str(tmp_path / "startup"), observer())
    server = Server(settings, health, registry)
    yield server, health
    server.stop()


def get(server, path, host="127.0.0.1"):
    connection = http.client.HTTPConnection(host, server.port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_metrics_are_served(served):
    server, _ = served
    status, body = get(server, "/metrics")
    assert status == 200
    assert b"things_total 3.0" in body


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/other"])
def test_head_is_answered_as_get_without_a_body(served, path):
    server, _ = served
    answers = {}
    for method in ("GET", "HEAD"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        answers[method] = (answer.status, answer.headers["Content-Type"], answer.headers["Content-Length"])
        body = answer.read()
        assert bool(body) is (method == "GET")
        connection.close()
    assert answers["GET"] == answers["HEAD"]


def test_page_lets_no_script_run(served):
    server, _ = served
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/?x=<script>")
    answer = connection.getresponse()
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert b"<script" not in answer.read()
    connection.close()


def serve(address):
    settings = config.load({"bucket_name": "dumps", "metrics_port": "0", "metrics_address": address})
    return Server(settings, Health(None, observer()), CollectorRegistry())


def test_default_address_answers_over_ipv6_and_ipv4():
    server = serve(config.Settings.model_fields["metrics_address"].default)
    try:
        assert get(server, "/livez", "127.0.0.1")[0] == 200
        if socket.has_dualstack_ipv6():
            assert get(server, "/livez", "::1")[0] == 200
    finally:
        server.stop()


def test_default_address_works_on_a_host_without_ipv6(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    server = serve("::")
    try:
        assert server.address_family == socket.AF_INET
        assert get(server, "/livez")[0] == 200
    finally:
        server.stop()


def test_liveness_ends_while_jobs_stay_out_after_their_deadlines(served):
    server, health = served
    for stuck, status in ((True, 503), (False, 200)):
        health.beat(stuck=stuck)
        assert get(server, "/livez")[0] == status


def test_readiness_follows_the_daemon_and_liveness_its_heartbeat(served, monkeypatch):
    server, health = served
    assert [get(server, p)[0] for p in ("/livez", "/readyz")] == [200, 503]
    health.set_state(collecting=True)
    assert get(server, "/readyz")[0] == 200
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert [get(server, p)[0] for p in ("/livez", "/readyz")] == [503, 503]
    health.beat()
    assert [get(server, p)[0] for p in ("/livez", "/readyz")] == [200, 200]


def test_startup_file_tells_the_state(tmp_path):
    path = tmp_path / "startup"
    path.write_text("dead\n")
    health = Health(str(path), observer())
    assert path.read_text() == "starting\n"
    health.set_state(collecting=True)
    wait_word(path, "ready")
    health.end()
    assert path.read_text() == "dead\n"


def test_startup_file_that_cannot_be_written_any_more_stops_nobody(tmp_path):
    directory = tmp_path / "gone"
    directory.mkdir()
    health = Health(str(directory / "startup"), observer())
    (directory / "startup").unlink()
    directory.rmdir()
    health.set_state(collecting=True)
    health.beat()
    assert health.is_collecting
    health.end()


def test_startup_file_that_was_deleted_or_emptied_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(health_module, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "startup"
    health = Health(str(path), observer())
    health.set_state(collecting=True)
    wait_word(path, "ready")
    for spoil in (path.unlink, lambda: path.write_text("")):
        spoil()
        health.beat()
        wait_word(path, "ready")
    health.end()


def test_startup_file_has_no_heartbeat_while_the_loop_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(health_module, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "startup"
    health = Health(str(path), observer())
    monkeypatch.setattr(health, "_beat", time.monotonic() - 60)
    path.unlink()
    assert not threading.Event().wait(0.3)
    assert not path.exists()
    health.beat()
    wait_word(path, "starting")
    health.end()


FILL = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print("filling", flush=True)
while True:
    try:
        os.write(fd, bytes(4096))
    except OSError:
        pass
"""


@contextlib.contextmanager
def filled_at_once(path):
    """Let a process take every block of the file system that becomes free."""
    command = [sys.executable, "-c", FILL, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as filler:
        try:
            assert filler.stdout.readline() == b"filling\n"
            yield
        finally:
            filler.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, needs root: sudo make test")
def test_full_disk_keeps_the_word_and_is_told_when_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(health_module, "HEARTBEAT_SECONDS", 0.05)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    try:
        health = Health(str(disk / "startup"), observer())
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        health.set_state(collecting=True)
        wait_word(disk / "startup", "ready")
        with filled_at_once(disk / "greedy"):
            for _ in range(40):
                health.beat()
                assert not threading.Event().wait(0.02)
        assert (disk / "startup").read_text() == "ready\n"
        (disk / "startup").unlink()
        with contextlib.suppress(OSError), (disk / "more").open("wb", buffering=0) as filler:
            filler.write(bytes(4096))
        with structlog.testing.capture_logs() as log:
            health.beat()
            wait_until(lambda: log, 10, "a line about it")
        health.end()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert (log[0]["what"], log[0]["error"]) == ("startup_file", "No space left on device")


def test_startup_file_that_is_a_symlink_is_refused(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "startup").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="STARTUP_FILE"):
        Health(str(tmp_path / "startup"), observer())
    assert (tmp_path / "target").read_text() == "precious"


MALFORMED = [
    b"\xff\xfe\0\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", MALFORMED, ids=["binary", "long", "post"])
def test_malformed_requests_leave_the_server_answering(served, request_bytes):
    server, _ = served
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        answer = b""
        with contextlib.suppress(OSError):  # the server may close before it has read everything
            client.sendall(request_bytes)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(4096)
    assert b"200 OK" not in answer
    assert get(server, "/metrics")[0] == 200


def test_a_thousand_slow_connections_do_not_stop_a_scrape(served):
    server, _ = served
    clients = []
    try:
        for _ in range(400):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            client.sendall(b"GET /metrics HT")
            clients.append(client)
        started = time.monotonic()
        assert get(server, "/metrics")[0] == 200
        assert time.monotonic() - started < 5
        assert threading.active_count() < 350
        for client in clients:
            client.close()
        clients.clear()
        for _ in range(600):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            clients.append(client)
        assert get(server, "/livez")[0] == 200
    finally:
        for client in clients:
            client.close()


def test_port_that_is_taken_is_bad_configuration(served, tmp_path):
    server, _ = served
    settings = config.load(
        {"bucket_name": "dumps", "metrics_port": str(server.port), "metrics_address": "127.0.0.1"}
    )
    with pytest.raises(ConfigError, match=f"METRICS_PORT={server.port}"):
        Server(settings, Health(None, observer()), CollectorRegistry())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, needs root: sudo make test")
def test_daemon_starts_on_a_full_disk_and_writes_its_state_once_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(health_module, "HEARTBEAT_SECONDS", 0.05)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    try:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        with structlog.testing.capture_logs() as log:
            health = Health(str(disk / "startup"), observer())
        (disk / "filler").unlink()
        health.beat()
        wait_word(disk / "startup", "starting")
        health.end()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert [(line["what"], line["error"]) for line in log[:1]] == [
        ("startup_file", "No space left on device")
    ]

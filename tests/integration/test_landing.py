"""The page at `/` and the metrics of the node, served by a daemon that has stored, refused and failed."""

from __future__ import annotations

import gzip
import os
import time

from tests.support.collector import running, wait_until

from core_dump_collector import __version__

LIVELY = """
import sys
from core_dump_collector import daemon
from core_dump_collector.cli import main
daemon.HEARTBEAT_SECONDS = 0.3
sys.exit(main())
"""
"""A collector that looks around often."""


def test_page_and_metrics_show_what_became_of_each_dump(seaweed, bucket, watch_dir, tmp_path):
    crashed = int(time.time()) - 100
    (watch_dir / "quarantine").mkdir()
    (watch_dir / "quarantine" / "core-old-1-2-3.gz").write_bytes(bytes(700))
    (watch_dir / f"core-link-{crashed}-8-11").symlink_to("/etc/hostname")
    stored = watch_dir / f"core-app-{crashed}-7-11.gz"
    stored.with_suffix(".gz.partial").write_bytes(gzip.compress(b"core"))
    os.setxattr(stored.with_suffix(".gz.partial"), "user.coredump.helper_version", b"0.9.1")
    stored.with_suffix(".gz.partial").rename(stored)
    with running(watch_dir, seaweed.environ(), tmp_path, program=LIVELY) as collector:

        def beaten():
            return "core-app" in collector.get("/") and collector.metric("core_dump_worker_processes") > 0

        wait_until(beaten, 20, "a heartbeat after the upload")
        page, value = collector.get("/"), collector.metric
        for text in (
            __version__,
            "node-1",
            str(watch_dir),
            "ready",
            "takes dumps",
            "1 dumps",
            stored.name,
            "uploaded",
        ):
            assert text in page, text
        assert f"core-link-{crashed}-8-11" in page
        for secret in seaweed.environ().values():
            assert secret not in page
        assert 100 <= value("core_dump_crash_to_bucket_seconds_sum") < 200
        assert value("core_dump_crash_to_bucket_seconds_count") == 1
        assert time.time() - 60 < value("core_dump_last_success_timestamp_seconds") <= time.time()
        assert (value("core_dump_quarantined_files"), value("core_dump_quarantined_bytes")) == (1, 700)
        assert value("core_dump_refused_bytes") == len("/etc/hostname")
        size, free = (
            value("core_dump_watch_directory_size_bytes"),
            value("core_dump_watch_directory_free_bytes"),
        )
        assert size > free > 0
        assert value("core_dump_workers_resident_memory_bytes") > 1_000_000
        assert value("core_dump_workers_cpu_seconds_total") > 0
        assert value("process_resident_memory_bytes") > 1_000_000
        assert value('core_dump_helper_info{config="",version="0.9.1"}') == 1

import subprocess
import sys

FORK_AND_COLLECT = """
import gc, os
from core_dump_collector import preload

def own_kib():
    with open("/proc/self/smaps_rollup") as file:
        return int(file.read().partition("Private_Dirty:")[2].split()[0])

if os.fork() == 0:
    gc.disable()
    before = own_kib()
    gc.collect()
    print(own_kib() - before, flush=True)
    os._exit(0)
os.wait()
"""


def test_full_garbage_collection_leaves_a_worker_what_it_shares():
    done = subprocess.run(
        [sys.executable, "-c", FORK_AND_COLLECT], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 2000


def test_workers_load_nothing_that_only_the_daemon_needs():
    script = "import sys, core_dump_collector.cli, core_dump_collector.preload; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "botocore" in done.stdout.split()
    assert not {"pydantic", "structlog", "prometheus_client"} & set(done.stdout.split())


def test_daemon_loads_nothing_that_only_workers_need():
    script = "import sys, core_dump_collector.daemon, core_dump_collector.s3.errors; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "core_dump_collector.pool" in done.stdout.split()
    assert not {"botocore", "boto3", "isal"} & set(done.stdout.split())

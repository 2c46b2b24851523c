"""Measure `core-dumps list` on many dumps: python -m tests.cli.measure_list [COUNT [NODES]], from the top level.

Fills a SeaweedFS on loopback with COUNT pairs of dump and sidecar (100,000 of 100 nodes by default), then prints
seconds and requests of a few listings. Not part of the test run: filling takes minutes.
"""

# ruff: noqa: T201  prints its figures

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from tests.support import s3

LISTINGS = (
    ("list",),
    ("list", "-n", "20"),
    ("list", "--node", "node-042"),
    ("list", "-S", "-1h"),
    ("list", "--json=short"),
)
START = int(time.time()) - 30 * 86400


def put_range(server, numbers, nodes, count):
    """Put the pairs of some numbers over one connection."""
    host = urlsplit(server.endpoint).netloc
    signer = S3SigV4Auth(Credentials(s3.ADMIN.access, s3.ADMIN.secret), "s3", "us-east-1")
    connection = http.client.HTTPConnection(host)
    for number in numbers:
        at = START + number * 30 * 86400 // count
        key = f"node-{number % nodes:03d}/core-app{number % 7}-{at}-{1000 + number}-11.gz"
        told = {
            "key": key,
            "pid": 1000 + number,
            "uid": 1,
            "exe": f"/usr/bin/app{number % 7}",
            "state": "complete",
        }
        for name, body in ((key, b"x" * 64), (key + ".json", json.dumps(told).encode())):
            request = AWSRequest("PUT", f"{server.endpoint}/{s3.BUCKET}/{name}", data=body)
            signer.add_auth(request)
            connection.request("PUT", f"/{s3.BUCKET}/{name}", body, dict(request.headers.items()))
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
    connection.close()


def main(count=100_000, nodes=100):
    """Fill and measure."""
    with tempfile.TemporaryDirectory() as scratch, s3.seaweedfs(Path(scratch)) as server:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            parts = [range(n, count, 8) for n in range(8)]
            list(pool.map(lambda part: put_range(server, part, nodes, count), parts))
        print(f"{count} pairs of {nodes} nodes put in {time.monotonic() - began:.0f} s", flush=True)
        environ = {
            **os.environ,
            **server.environ(),
            "BUCKET_NAME": s3.BUCKET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for listing in LISTINGS:
            began = time.monotonic()
            command = [sys.executable, "-m", "core_dumps.cli", *listing, "-v"]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
            seconds = time.monotonic() - began
            told = done.stderr.strip().splitlines()[-1]
            print(
                f"{' '.join(listing)}: {done.stdout.count(chr(10))} lines, {seconds:.1f} s, {told}",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
